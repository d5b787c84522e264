"""Learned masks: which channels an expert keeps, by the loss of the model and not by statistics (METHOD 5, point 5).

Every expert of every layer has a score for each channel; the C best are its channels, exactly, at each step. The
gradient reaches the scores straight through that choice; weights and router stay as they are.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from readme_jax import losses
from readme_jax.calibrate import Accumulator, make_statistics
from readme_jax.checkpoint import CheckpointConfig
from readme_jax.config import ExpertConfig, ModelConfig, RouterConfig, free, require
from readme_jax.data import Records, eval_batches
from readme_jax.models import backbone
from readme_jax.models.backbone import Params
from readme_jax.models.experts import ExpertTable, Masked
from readme_jax.optim import OptimConfig, make
from readme_jax.routing import membership
from readme_jax.sharding import put, spec
from readme_jax.steps import Phase, accumulate, update

WINDOW = 16  # tokens, of which one expert is taken to keep most


@dataclasses.dataclass(frozen=True, kw_only=True)
class MasksConfig:
    """One run of mask learning, on one device."""

    model: Path
    """Carved model folder with tied experts, and with a router where it has several: where the masks start, and, run
    densely, the teacher."""
    data: Path
    """Result of `data`; its train records are learned from, its calibration records order the channels at the start."""
    out: Path
    """Folder to write the carved model with the learned experts to."""
    steps: int
    """Optimizer steps."""
    batch: int = 1
    """Records of one microbatch."""
    accum: int = 1
    """Microbatches of one optimizer step."""
    lr: float = 0.02
    """Adam's peak rate, cosine to 0 over the run; scores start evenly spread over 0 .. 1, so this is the share of all
    channels that one may pass in a step (twice that with several experts: their own and the common scores move)."""
    head_chunk: int = 128
    """Positions whose logits exist at once."""
    seed: int = 0
    """Seed of data order."""
    checkpoint: CheckpointConfig = free(CheckpointConfig())
    """When an unfinished run saves itself."""

    def __post_init__(self):
        require(self.steps >= 1, f"steps={self.steps} must be at least 1")
        require(self.batch >= 1 and self.accum >= 1, f"batch={self.batch}, accum={self.accum} must be at least 1")
        require(self.head_chunk >= 1, f"head_chunk={self.head_chunk} must be at least 1")
        require(self.seed >= 0, f"seed={self.seed} must not be negative")
        require(0 < self.lr < math.inf, f"lr={self.lr} must be positive and finite")


def check(config: MasksConfig, experts: ExpertConfig | None, router: RouterConfig | None) -> ExpertConfig:
    """The model's experts; ConfigError where their masks cannot be learned."""
    require(experts is not None, f"model={config.model} is not carved; run `readme-jax carve` first")
    assert experts is not None
    require(experts.storage == "tied", f"model={config.model}: separate experts have no other channels to choose")
    routed = experts.experts == 1 or router is not None
    require(routed, f"model={config.model} has no router: tune one first, `readme-jax alternate` with experts.steps 0")
    return experts


def first_scores(importance_ELF: np.ndarray, table_LEC: np.ndarray) -> np.ndarray:
    """float32 [L, E, F]: rank / F of each channel, highest best. The channels of an expert in the table lead, so that
    the first masks are the table's; behind that they are ordered by importance."""
    experts, layers, mlp = importance_ELF.shape
    scores_LEF = np.empty((layers, experts, mlp), np.float32)
    member_LEF = membership(table_LEC, mlp)
    for e, own_LF in enumerate(importance_ELF):
        order_LF = np.lexsort((own_LF, member_LEF[:, e]), axis=-1)  # the last key leads, ascending
        np.put_along_axis(scores_LEF[:, e], order_LF, np.arange(mlp, dtype=np.float32) / mlp, axis=-1)
    return scores_LEF


def importance(
    cfg: ModelConfig, params: Params, records: dict[str, Records], table_LEC: np.ndarray, names: tuple[str, ...]
) -> np.ndarray:
    """float32 [E, L, F]: how much a channel matters to an expert, its share in the energy of a token's FFN output
    (METHOD 5), up to a factor. It is the mean over the domain that has the expert's name; where none has, over the
    windows of text of which this expert keeps most, each domain counting the same (all text for one that has none)."""
    layers, mlp = cfg.layer, cfg.mlp
    statistics, by_domain = make_statistics(cfg, window=WINDOW), {}
    member_EJ = membership(table_LEC, mlp).swapaxes(0, 1).reshape(len(names), -1).astype(np.float32)
    own_EJ = np.zeros((len(names), layers * mlp), np.float32)
    for name, own in records.items():
        sums = Accumulator(layers, mlp)
        for batch in eval_batches({name: own}, 1):
            placed = (put(batch[key], spec("batch", "seq")) for key in ("ids", "segments"))
            found = jax.device_get(statistics(params, *placed))
            sums.add(found, 0.0)
            share_PJ = found["windows"][:, 0].astype(np.float32).swapaxes(0, 1).reshape(-1, layers * mlp)
            best_P = np.argmax(share_PJ @ member_EJ.T, axis=1)
            real_T = np.pad(batch["segments"][0] > 0, (0, -batch["segments"].shape[1] % WINDOW))
            weight_P = np.count_nonzero(real_T.reshape(-1, WINDOW), axis=1) / np.count_nonzero(own.segments)
            np.add.at(own_EJ, best_P, share_PJ * (weight_P / mlp)[:, None].astype(np.float32))
        by_domain[name] = sums.means()["share"]
    rest_LF = np.mean(list(by_domain.values()), axis=0)
    own_ELF = own_EJ.reshape(-1, layers, mlp)
    return np.stack([
        by_domain.get(name, part_LF if part_LF.any() else rest_LF) for name, part_LF in zip(names, own_ELF)
    ])  # fmt: skip


def chosen(scores_LEF: jax.Array, channels: int) -> jax.Array:
    """bool [L, E, F]: exactly the `channels` highest scores of each row; among equals the lower id."""
    order_LEF = jnp.argsort(-scores_LEF, axis=-1, stable=True)
    return jnp.argsort(order_LEF, axis=-1) < channels


def straight_through(scores_LEF: jax.Array, channels: int) -> jax.Array:
    """float32 0 and 1 (`chosen`), whose gradient is that of the scores (Bengio et al. 2013, arXiv 1308.3432)."""
    mask_LEF = chosen(scores_LEF, channels).astype(jnp.float32)
    return scores_LEF + jax.lax.stop_gradient(mask_LEF - scores_LEF)


def begin(scores_LEF: np.ndarray) -> Params:
    """The parameters of scores, on the mesh: `scores`, and where there are several experts `common_scores` [L, 1, F],
    which is added to all of them. What is good for all tokens is so learned from all tokens, not from an expert's."""
    if scores_LEF.shape[1] == 1:
        return {"scores": put(scores_LEF)}
    common_L1F = scores_LEF.mean(1, keepdims=True)
    return {"scores": put(scores_LEF - common_L1F), "common_scores": put(common_L1F)}


def whole(params: Params) -> jax.Array:
    """float32 [L, E, F]: the scores that `begin` took apart."""
    return params["scores"] + params["common_scores"] if "common_scores" in params else params["scores"]


def table_of(scores_LEF: jax.Array, channels: int) -> np.ndarray:
    """The expert table int32 [L, E, C] of scores, sorted."""
    mask_LEF = np.asarray(jax.jit(chosen, static_argnums=1)(scores_LEF, channels))
    return np.nonzero(mask_LEF)[2].reshape(*mask_LEF.shape[:2], channels).astype(np.int32)


def optimizer(config: MasksConfig) -> optax.GradientTransformation:
    """Of the scores. Nothing decays: they are only compared with each other."""
    return make(OptimConfig(lr=config.lr, weight_decay=0.0), config.steps)


def make_mask_step(cfg: ModelConfig, channels: int, tx: optax.GradientTransformation, chunk: int):
    """jitted (phase, params, batch) -> (phase, metrics): one step of scores [L, E, F] by forward KL to the dense model.

    phase.params: as `begin` makes them; params: the frozen backbone. batch: ids, segments, expert [A, B, T]. Among the
    metrics, changed: the share of chosen channels that were not chosen a step before.
    """

    def loss_fn(tuned, params, micro):
        scores_LEF = whole(tuned)
        ids_BT, segments_BT = micro["ids"], micro["segments"]
        target_BT, weight_BT = losses.next_token(ids_BT, segments_BT)
        teacher_BTD, _ = backbone.forward(cfg, params, ids_BT, segments_BT)
        head_VD = backbone.head_weight(params)
        table = ExpertTable(jnp.zeros((*scores_LEF.shape[:2], 1), jnp.int32), straight_through(scores_LEF, channels))
        route = Masked(micro["expert"])
        x_BTD, _ = backbone.forward(cfg, params, ids_BT, segments_BT, table=table, route=route)
        static, said = losses.HeadLoss(kd=1.0, ce=0.0, chunk=chunk), losses.Dense(teacher_BTD, head_VD)
        total, parts = losses.head_loss(static, head_VD, x_BTD, said, target_BT, weight_BT)
        return total, (jnp.sum(weight_BT), {"kl": parts["kl"]})

    @functools.partial(jax.jit, donate_argnums=0)
    def step(phase: Phase, params: Params, batch: dict[str, Any]):
        before_LEF = chosen(whole(phase.params), channels)
        grad, means = accumulate(lambda tuned, micro: loss_fn(tuned, params, micro), phase.params, batch)
        phase, norm = update(phase, tx, grad)
        new_LEF = chosen(whole(phase.params), channels) & ~before_LEF
        means["changed"] = jnp.sum(new_LEF) / (channels * before_LEF.shape[0] * before_LEF.shape[1])
        return phase, means | {"grad_norm": norm}

    return step
