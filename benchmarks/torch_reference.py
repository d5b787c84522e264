"""The pipeline's computations in plain PyTorch, on the Hugging Face Llama: what `pipeline.py` compares against.

Nothing is shared with the package: forward hooks on `down_proj` see or change its input h, losses are written as in
the method (METHOD sections 2 and 3). Written to be read and trusted, not tuned; usable as an oracle in tests.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

CLIP, WEIGHT_DECAY = 1.0, 0.01


def load(folder) -> LlamaForCausalLM:
    """The dense model in float32 with Hugging Face's default attention."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def permute(model: LlamaForCausalLM, order_LF: torch.Tensor) -> None:
    """Reorder the FFN channels in place: new channel i is the old channel order[i]."""
    for block, order_F in zip(model.model.layers, order_LF, strict=True):
        for linear in (block.mlp.gate_proj, block.mlp.up_proj):
            linear.weight.copy_(linear.weight[order_F])
        block.mlp.down_proj.weight.copy_(block.mlp.down_proj.weight[:, order_F])


@contextlib.contextmanager
def hooked(model: LlamaForCausalLM, see: Callable) -> Iterator[None]:
    """While open, see(layer, h_BTF) gets the input of every down_proj; what it returns, if anything, replaces it."""

    def hook(layer):
        def call(_, args):
            changed = see(layer, args[0])
            return None if changed is None else (changed,)

        return call

    handles = [b.mlp.down_proj.register_forward_pre_hook(hook(i)) for i, b in enumerate(model.model.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, V]."""
    return model(ids_BT, use_cache=False).logits


# ---- calibration ------------------------------------------------------------------------------


def energy(model: LlamaForCausalLM, layer: int, h_BTF: torch.Tensor) -> torch.Tensor:
    """h_j^2 ||w_j||^2, w_j column j of down_proj."""
    return h_BTF.square() * model.model.layers[layer].mlp.down_proj.weight.square().sum(0)


@torch.no_grad()
def statistics(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over tokens of |h|, h^2, h and the token's share of energy, [L, F] each."""
    rows = []

    def see(layer, h_BTF):
        energy_BTF = energy(model, layer, h_BTF)
        share_BTF = energy_BTF / energy_BTF.sum(-1, keepdim=True)
        rows.append([a.sum((0, 1)) for a in (h_BTF.abs(), h_BTF.square(), h_BTF, share_BTF)])

    with hooked(model, see):
        model.model(ids_BT, use_cache=False)
    return dict(zip(("abs", "square", "mean", "share"), (torch.stack(r) for r in zip(*rows))))


# ---- router -----------------------------------------------------------------------------------


class Router(nn.Module):
    """The pre-gating router of the method, one block; rotary tables come from the LLM's own embedding module."""

    def __init__(self, vocab: int, width: int, heads: int, experts: int, theta: float):
        super().__init__()
        self.heads, self.theta = heads, theta
        self.embedding = nn.Embedding(vocab, width)
        self.attn_norm, self.mlp_norm, self.norm = (nn.RMSNorm(width, eps=1e-6) for _ in range(3))
        self.q, self.k, self.v, self.o, self.w_in, self.w_out = (nn.Linear(width, width) for _ in range(6))
        self.head = nn.Linear(width, experts)

    def fill(self, values: dict) -> None:
        """Take the values (arrays) of a router of the package with one block."""
        state = {"embedding.weight": values["embedding"], "norm.weight": values["norm"]}
        state |= {"head.weight": values["head"], "head.bias": values["b_head"]}
        for name, value in values["layers"].items():
            module = name[2:] if name[2:] in "qkvo" else name.replace("b_", "w_")
            state[f"{module}.{'bias' if name.startswith('b_') else 'weight'}"] = value[0]
        self.load_state_dict({name: torch.tensor(value) for name, value in state.items()})

    def rope(self, t: int, h: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [1, T, H] for positions 0..t-1."""
        angle_TH = torch.outer(torch.arange(t).float(), 1 / self.theta ** (torch.arange(0, h, 2).float() / h))
        angle_TH = torch.cat([angle_TH, angle_TH], -1)
        return angle_TH.cos()[None], angle_TH.sin()[None]

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, E]."""
        x = self.embedding(ids_BT)
        b, t, width = x.shape
        y = self.attn_norm(x)
        q, k, v = (w(y).view(b, t, self.heads, -1).transpose(1, 2) for w in (self.q, self.k, self.v))
        q, k = apply_rotary_pos_emb(q, k, *self.rope(t, width // self.heads))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, width))
        x = x + self.w_out(F.silu(self.w_in(self.mlp_norm(x))))
        return self.head(self.norm(x))


@torch.no_grad()
def overlap_labels(model: LlamaForCausalLM, masks_LEF: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """dist [L, B*T, E] of the reference, ranked by the signed h; masks_LEF float, 0 or 1."""
    dists = []

    def see(layer, h_BTF):
        mask_EF = masks_LEF[layer]
        mask_EF = mask_EF * (1 - mask_EF.prod(0))  # without the channels that all experts share
        h_MF = h_BTF.flatten(0, 1)
        n = int(mask_EF[0].sum())
        s_MF = h_MF.sort(-1, descending=True).values
        f_MF = torch.zeros_like(h_MF)
        for m in (n - 1, 4 * n // 5, 3 * n // 5, 2 * n // 5, n // 5):
            f_MF += (h_MF > s_MF[:, m, None]).float() / (3 * n)
        dist_ME = f_MF @ mask_EF.T
        dists.append(10 * (dist_ME - dist_ME.mean()))

    with hooked(model, see):
        model.model(ids_BT, use_cache=False)
    return torch.stack(dists)


def overlap_loss(logits_BTE: torch.Tensor, dist_LME: torch.Tensor) -> torch.Tensor:
    """The reference's loss, a mean over layers."""
    logits_ME = logits_BTE.flatten(0, 1)
    total = torch.zeros(())
    for dist_ME in dist_LME:
        hard = F.cross_entropy(logits_ME, dist_ME.argmax(-1), label_smoothing=0.5)
        soft = -(dist_ME.softmax(-1) * logits_ME.log_softmax(-1)).sum(-1).mean()
        total = total + 0.75 * hard + 0.25 * soft
    return total / len(dist_LME)  # the mean, as ours: AdamW does not see the factor, the clip does


@torch.no_grad()
def energy_labels(
    model: LlamaForCausalLM, masks_LEF: torch.Tensor, ids_BT: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Soft labels [B*T, E]: softmax of the share of energy an expert keeps, averaged over layers."""
    kept = []

    def see(layer, h_BTF):
        energy_MF = energy(model, layer, h_BTF).flatten(0, 1)
        kept.append(energy_MF @ masks_LEF[layer].T / energy_MF.sum(-1, keepdim=True))

    with hooked(model, see):
        model.model(ids_BT, use_cache=False)
    return (torch.stack(kept).mean(0) / temperature).softmax(-1)


def energy_loss(logits_BTE: torch.Tensor, target_ME: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with soft labels."""
    return F.cross_entropy(logits_BTE.flatten(0, 1), target_ME)


def make_distillation(router: Router, lr: float):
    """step(ids_BT, target_ME) -> loss of `energy_loss`: forward, backward and AdamW of the router, labels given."""
    optimizer = torch.optim.AdamW(router.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    return lambda ids_BT, target_ME: _descend(energy_loss(router(ids_BT), target_ME), router, optimizer)


def make_router_step(model, router: Router, masks_LEF: torch.Tensor, kind: str, temperature: float, lr: float):
    """step(ids_BT) -> loss: dense run for the labels, then forward, backward and AdamW of the router."""
    optimizer = torch.optim.AdamW(router.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)

    def step(ids_BT: torch.Tensor) -> float:
        if kind == "overlap":
            loss = overlap_loss(router(ids_BT), overlap_labels(model, masks_LEF, ids_BT))
        else:
            loss = energy_loss(router(ids_BT), energy_labels(model, masks_LEF, ids_BT, temperature))
        return _descend(loss, router, optimizer)

    return step


# ---- experts ----------------------------------------------------------------------------------


def make_expert_step(teacher: LlamaForCausalLM, masks_LEF: torch.Tensor, ce: float, lr: float):
    """step(ids_BT, expert_BT) -> loss: KL(dense teacher || routed student) + ce * next-token loss, tuning all."""
    student = copy.deepcopy(teacher).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)

    def step(ids_BT: torch.Tensor, expert_BT: torch.Tensor) -> float:
        wanted_MV = logits(teacher, ids_BT)[:, :-1].flatten(0, 1)
        with hooked(student, lambda layer, h_BTF: h_BTF * masks_LEF[layer][expert_BT]):
            logits_MV = student(ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        logp_MV = logits_MV.log_softmax(-1)
        kl = F.kl_div(logp_MV, wanted_MV.log_softmax(-1), log_target=True, reduction="batchmean")
        nll = F.nll_loss(logp_MV, ids_BT[:, 1:].flatten())
        return _descend(kl + ce * nll, student, optimizer)

    return step


def _descend(loss: torch.Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), CLIP)
    optimizer.step()
    return loss.item()
