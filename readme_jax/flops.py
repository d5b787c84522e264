"""Floating point operations of a step, per token: the matrix multiplications that each phase runs, from sizes alone.

A multiplication with its addition counts as 2. Throughput divided by the peak of the device gives MFU in the sense of
PaLM (arXiv 2204.02311, appendix B): what `remat` computes a second time is left out. It counts what runs, not the
least that would do, so it flatters where the two differ: attention is the whole [T, T] square, of which causality
needs half; `masked` experts are all channels that any expert has, and a token's mask keeps those of its own expert.
"""

import dataclasses

import numpy as np

from readme_jax import optim
from readme_jax.alternate import ExpertPhase, RouterPhase
from readme_jax.config import ExpertConfig, ModelConfig, RouterConfig
from readme_jax.data import Batches
from readme_jax.loop import PhaseFigures


@dataclasses.dataclass(frozen=True)
class Layers:
    """Forward FLOPs of one token in all layers, by what the backward pass does with them.

    projections: q, k, v and o, matrices by activations. scores: activations by activations. ffn: gate, up and down.
    """

    projections: float
    scores: float
    ffn: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.projections + self.scores + self.ffn


def layers(cfg: ModelConfig, seq: int, channels: int) -> Layers:
    """Forward FLOPs of one token of a record of `seq` tokens, with `channels` FFN channels run."""
    query, key = cfg.head * cfg.head_dim, cfg.kv_head * cfg.head_dim
    return Layers(
        projections=cfg.layer * 4.0 * cfg.embed * (query + key),
        scores=cfg.layer * 4.0 * seq * query,
        ffn=cfg.layer * 6.0 * cfg.embed * channels,
    )


def head_flops(cfg: ModelConfig) -> float:
    """Logits of one token."""
    return 2.0 * cfg.embed * cfg.vocab


def router_flops(router: RouterConfig, experts: int, seq: int) -> float:
    """One token through the router, forward: blocks of six square matrices, scores, the expert head."""
    block = 12.0 * router.width**2 + 4.0 * seq * router.width
    return router.layers * block + 2.0 * router.width * experts


def label_flops(cfg: ModelConfig, experts: int, seq: int) -> float:
    """One token's router label: a dense forward pass without the head, and the experts' shares in every layer."""
    return layers(cfg, seq, cfg.mlp).total + cfg.layer * 2.0 * cfg.mlp * experts


def run_channels(cfg: ModelConfig, experts: ExpertConfig, way: str, used: int | None = None) -> int:
    """FFN channels that one token runs: its expert's C, or with `masked` all that any expert has (`used`, else F)."""
    return (used or cfg.mlp) if way == "masked" else experts.channels


def expert_step_flops(
    cfg: ModelConfig, experts: ExpertConfig, phase: ExpertPhase, seq: int, used: int | None = None
) -> float:
    """One token of an expert step: student forward and backward, the head's loss, the dense teacher where there is one.

    The backward pass of a tuned matrix costs twice its forward pass, of a frozen one once (only the gradient of its
    input is wanted), of the scores twice.
    """
    student = layers(cfg, seq, run_channels(cfg, experts, phase.way, used))
    whole = phase.tuned == "all"
    step = (3.0 if whole else 2.0) * student.projections + 3.0 * (student.scores + student.ffn)
    step += (3.0 if whole else 2.0) * head_flops(cfg)
    if phase.kd_weight and not phase.teacher_topk:
        step += layers(cfg, seq, cfg.mlp).total + head_flops(cfg)
    return step


def mask_step_flops(cfg: ModelConfig, seq: int) -> float:
    """One token of a step of `masks`: all channels forward, backward through frozen matrices, and the dense teacher."""
    student = layers(cfg, seq, cfg.mlp)
    step = 2.0 * (student.projections + student.ffn + head_flops(cfg)) + 3.0 * student.scores
    return step + student.total + head_flops(cfg)


def refit_flops(cfg: ModelConfig, seq: int, used: int) -> float:
    """One token of `refit`: the dense layers once, the carved ones twice, the sums of [U, U] and [U, D]."""
    sums = cfg.layer * 2.0 * used * (used + cfg.embed)
    return layers(cfg, seq, cfg.mlp).total + 2.0 * layers(cfg, seq, used).total + sums


def train_flops_per_token(
    cfg: ModelConfig,
    experts: ExpertConfig,
    phase: RouterPhase | ExpertPhase,
    seq: int,
    *,
    router: RouterConfig | None = None,
    used: int | None = None,
) -> float:
    """FLOPs of one token of one step of a phase, as the loop times it: what MFU is computed from.

    phase: the phase's part of the run's config. router: the router's size where the model folder brings it (default:
    `shape` of the router phase). used: U, the channels that any expert has, known once the table is (default: F).
    A router step with teacher=current includes its labelling pass; cached labels (teacher=original) are computed
    before the loop, see `label_flops`. An expert step does not include routing, `router_flops`.
    """
    if isinstance(phase, ExpertPhase):
        return expert_step_flops(cfg, experts, phase, seq, used)
    step = 3.0 * router_flops(router or phase.shape, experts.experts, seq)
    return step + (label_flops(cfg, experts.experts, seq) if phase.teacher == "current" else 0.0)


def figures(
    cfg: ModelConfig,
    experts: ExpertConfig,
    router: RouterConfig | None,
    used: int,
    phase: RouterPhase | ExpertPhase,
    batches: Batches,
    rounds: int,
) -> PhaseFigures:
    """What a run knows of a phase before it: for `loop.Watch`. used: see `train_flops_per_token`."""
    rates = np.asarray(optim.schedule(phase.optim, max(phase.steps, 1))(np.arange(phase.steps * rounds)))
    cost = train_flops_per_token(cfg, experts, phase, batches.seq, router=router, used=used)
    return PhaseFigures(phase.steps, phase.batch * phase.accum * batches.seq, cost, rates, batches.index)
