"""Plain NumPy transcriptions that tests compare against: float64, loops where they are clearer, no shared code."""

import numpy as np


def rms(x, weight, eps):
    """RMS norm over the last axis, float64."""
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def rotary(x_TNH, theta):
    """Rotary embedding of [T, heads, width] at positions 0..T-1: channel i turns with channel i + width / 2."""
    T, _, H = x_TNH.shape
    angle_TJ = np.arange(T)[:, None] * theta ** (-2.0 * np.arange(H // 2) / H)
    turned = (x_TNH[..., : H // 2] + 1j * x_TNH[..., H // 2 :]) * np.exp(1j * angle_TJ)[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


def router_logits(router_params, ids_BT, heads, theta, eps):
    """Expert logits float64 [B, T, E] of the pre-gating router, one sequence and one query position at a time.

    router_params: the pure dict of the package (embedding [V, R], norm, head [E, R], b_head, layers with a leading
    layer axis). No padding: ids_BT are all real tokens. No 1/sqrt(d) in the attention, on purpose.
    """
    p = {k: np.asarray(v, np.float64) for k, v in router_params.items() if k != "layers"}
    stacked = {k: np.asarray(v, np.float64) for k, v in router_params["layers"].items()}
    rows = []
    for ids_T in np.asarray(ids_BT):
        x_TR = p["embedding"][ids_T]
        T, R = x_TR.shape
        for i in range(stacked["w_q"].shape[0]):
            w = {k: v[i] for k, v in stacked.items()}
            n_TR = rms(x_TR, w["attn_norm"], eps)
            q, k, v = (
                (n_TR @ w[f"w_{name}"].T + w[f"b_{name}"]).reshape(T, heads, R // heads) for name in ("q", "k", "v")
            )
            q, k = rotary(q, theta), rotary(k, theta)
            mixed_TNH = np.zeros_like(v)
            for t in range(T):
                for h in range(heads):
                    score = k[: t + 1, h] @ q[t, h]
                    share = np.exp(score - score.max())
                    mixed_TNH[t, h] = (share / share.sum()) @ v[: t + 1, h]
            x_TR = x_TR + mixed_TNH.reshape(T, R) @ w["w_o"].T + w["b_o"]
            pre = rms(x_TR, w["mlp_norm"], eps) @ w["w_in"].T + w["b_in"]
            x_TR = x_TR + (pre / (1 + np.exp(-pre))) @ w["w_out"].T + w["b_out"]
        rows.append(rms(x_TR, p["norm"], eps) @ p["head"].T + p["b_head"])
    return np.stack(rows)
