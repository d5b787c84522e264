"""Plain NumPy (float64) transcriptions of the FFN with experts, its gradient, the router labels and the losses.

Loops where they are clearer; no code shared with the package. `random_params` is the only helper that looks at it.
"""

import jax
import numpy as np


def random_params(abstract, seed=0):
    """Random float32 NumPy values for an abstract parameter tree: nothing is left at 0 or 1, so no term can hide."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        noise = rng.normal(size=leaf.shape)
        if name.endswith("norm"):
            return (1 + 0.2 * noise).astype(np.float32)
        if name.startswith("b_"):
            return (0.2 * noise).astype(np.float32)
        fan = 1.0 if name == "embedding" else leaf.shape[-1]
        return (noise / np.sqrt(fan)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, abstract)


def random_table(layers, experts, channels, mlp, seed=0):
    """int32 [L, E, C], sorted rows, no repeats: C random channels for each expert."""
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.permutation(mlp)[:channels]) for _ in range(layers * experts)]
    return np.array(rows, np.int32).reshape(layers, experts, channels)


def packed(rows, length, vocab, seed=0):
    """(ids, segments) int32 [len(rows), length]: row i holds documents of the lengths rows[i], then padding (0)."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (len(rows), length)).astype(np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    for row, lengths in zip(segments, rows, strict=True):
        ends = np.cumsum(lengths)
        for number, (start, end) in enumerate(zip(ends - lengths, ends, strict=True)):
            row[start:end] = number + 1
    return ids, segments


# ---- one FFN with experts ----------------------------------------------------------------------


def expert_ffn(x_MD, w, table_EC, expert_M, cotangent_MD):
    """Output [M, D] of the FFN, token by token with its own expert's channels, and the gradient of
    sum(output * cotangent): (y_MD, dx_MD, {weight name: gradient}). w: dict of float arrays of one layer."""
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    y_MD, dx_MD = np.zeros(x_MD.shape), np.zeros(x_MD.shape)
    grad = {name: np.zeros(value.shape) for name, value in w.items()}
    for m, e in enumerate(expert_M):
        x, dy, ids = x_MD[m].astype(np.float64), cotangent_MD[m].astype(np.float64), table_EC[e]
        gate, up = w["w_gate"][ids] @ x, w["w_up"][ids] @ x
        if "b_gate" in w:
            gate, up = gate + w["b_gate"][ids], up + w["b_up"][ids]
        sigmoid = 1 / (1 + np.exp(-gate))
        h = gate * sigmoid * up
        y_MD[m] = h @ w["w_down"][ids]
        dh = w["w_down"][ids] @ dy
        dgate, dup = dh * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), dh * gate * sigmoid
        dx_MD[m] = dgate @ w["w_gate"][ids] + dup @ w["w_up"][ids]
        grad["w_gate"][ids] += np.outer(dgate, x)
        grad["w_up"][ids] += np.outer(dup, x)
        grad["w_down"][ids] += np.outer(h, dy)
        if "b_gate" in w:
            y_MD[m] += w["b_down"]
            grad["b_gate"][ids] += dgate
            grad["b_up"][ids] += dup
            grad["b_down"] += dy
    return y_MD, dx_MD, grad


# ---- router labels (METHOD section 3) ----------------------------------------------------------


def log_softmax(x):
    """Over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def overlap_dist(h_MF, exclusive_EF, signed=True):
    """`dist` [M, E] of METHOD section 3 for one layer. The division by 3n comes last: the sums before it are whole
    numbers, so experts that tie in the formula tie here too (the arg-max label depends on it)."""
    h_MF = h_MF if signed else np.abs(h_MF)
    n = int(exclusive_EF[0].sum())
    s_MF = -np.sort(-h_MF, axis=-1)
    f_MF = np.zeros(h_MF.shape)
    for m in (n - 1, int(4 * n / 5), int(3 * n / 5), int(2 * n / 5), int(n / 5)):
        f_MF += h_MF > s_MF[:, m : m + 1]
    dist_ME = f_MF @ exclusive_EF.T.astype(float) / (3 * n)
    return 10 * (dist_ME - dist_ME.mean())


def paper_router_loss(h_LMF, mask_LEF, logits_ME):
    """The reference's router loss of METHOD section 3: per layer 0.75 * hard + 0.25 * soft, mean over tokens, SUM over
    layers. mask_LEF: whole masks of the experts, the channels common to all are taken out here."""
    logp_ME = log_softmax(np.asarray(logits_ME, np.float64))
    experts = logp_ME.shape[-1]
    loss = 0.0
    for h_MF, mask_EF in zip(h_LMF, mask_LEF, strict=True):
        exclusive_EF = mask_EF & ~mask_EF.all(0)
        dist_ME = overlap_dist(h_MF, exclusive_EF)
        soft = -(np.exp(log_softmax(dist_ME)) * logp_ME).sum(-1).mean()
        best_M = dist_ME.argmax(-1)
        smooth_ME = np.full(logp_ME.shape, 0.5 / experts)
        smooth_ME[np.arange(len(best_M)), best_M] += 0.5
        hard = -(smooth_ME * logp_ME).sum(-1).mean()
        loss += 0.75 * hard + 0.25 * soft
    return loss


def energy_share(h_MF, w_down_FD, table_EC):
    """Share of sum_j h_j^2 ||w_j||^2 kept by each expert, [M, E]."""
    energy_MF = np.asarray(h_MF, np.float64) ** 2 * (np.asarray(w_down_FD, np.float64) ** 2).sum(-1)
    return np.stack([energy_MF[:, ids].sum(-1) for ids in table_EC], -1) / energy_MF.sum(-1, keepdims=True)


def head_loss(head_VD, x_MD, teacher_VD, teacher_MD, target_M, weight_M, kd, ce):
    """(total, kl, ce) sums of the distillation and next-token losses, all logits at once."""
    logp = log_softmax(np.asarray(x_MD, np.float64) @ np.asarray(head_VD, np.float64).T)
    logq = log_softmax(np.asarray(teacher_MD, np.float64) @ np.asarray(teacher_VD, np.float64).T)
    kl_M = (np.exp(logq) * (logq - logp)).sum(-1)
    nll_M = -logp[np.arange(len(target_M)), target_M]
    weight_M = np.asarray(weight_M, np.float64)
    return ((kd * kl_M + ce * nll_M) * weight_M).sum(), (kl_M * weight_M).sum(), (nll_M * weight_M).sum()
