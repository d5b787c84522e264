"""Labels of the router: what a dense run says of each token's experts (METHOD section 3).

All kinds reduce to one target distribution per token: the reference's loss is linear in it, and the mean over layers of
the losses is the loss of the mean target (up to the reference's sum in place of the mean).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from readme_jax.config import require
from readme_jax.models.layers import ACTIVATION, flat


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Router labels from a dense run."""

    kind: Literal["overlap", "energy"] = "energy"
    """`overlap`: channels among the token's most active that an expert owns (reference). `energy`: share of the FFN
    output's energy that an expert keeps."""
    signed: bool = False
    """Rank h instead of |h| in `overlap` (the reference's oversight, for parity); needs kind=overlap."""
    hard_weight: float = 0.0
    """Weight of the arg-max label (reference: 0.75)."""
    soft_weight: float = 1.0
    """Weight of the softmax label (reference: 0.25)."""
    label_smoothing: float = 0.0
    """Smoothing of the arg-max label (reference: 0.5)."""
    temperature: float = 0.02
    """Divides the score before the softmax (reference: 0.1)."""

    def __post_init__(self):
        require(self.kind == "overlap" or not self.signed, "signed=true has no meaning for kind=energy")
        require(self.temperature > 0, f"temperature={self.temperature} must be positive")
        require(0 <= self.label_smoothing < 1, f"label_smoothing={self.label_smoothing} must be in [0, 1)")
        require(
            min(self.hard_weight, self.soft_weight) >= 0 and self.hard_weight + self.soft_weight > 0,
            f"hard_weight={self.hard_weight} and soft_weight={self.soft_weight} must be >= 0 and not both 0",
        )


PAPER_LABELS = LabelConfig(
    kind="overlap", signed=True, hard_weight=0.75, soft_weight=0.25, label_smoothing=0.5, temperature=0.1
)


def kth_largest(x: jax.Array, rank: int) -> jax.Array:
    """The value at zero-based descending `rank` along the last axis, keepdims; exact, float32.

    Bisection on the order-preserving integer image of the floats: 32 passes of compare and count instead of a sort,
    which XLA runs 10x slower on CPU.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    key = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def narrow(i, found):
        trial = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough = jnp.sum(key >= trial, -1, keepdims=True, dtype=jnp.int32) > rank
        return jnp.where(enough, trial, found)

    zero = jnp.sum(key, -1, keepdims=True) & jnp.uint32(0)  # placed like the counts, whatever the mesh
    found = jax.lax.fori_loop(0, 32, narrow, zero)
    bits = jnp.where(found >> 31 == 1, found ^ jnp.uint32(1 << 31), ~found)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def overlap_score(h_BTF: jax.Array, exclusive_EF: jax.Array, signed: bool) -> jax.Array:
    """The reference's `overlap` score of a layer, float32 [B, T, E], before its factor 10.

    exclusive_EF: bool masks without the channels common to all experts. With n channels in expert 0's mask and s the
    activations in descending order: f = sum over m in {n-1, 4n/5, 3n/5, 2n/5, n/5} of [h > s_m] / 3n, score = f M^T.
    Subtracting the batch mean, as the reference does, changes neither softmax nor argmax.
    """
    ranked = h_BTF.astype(jnp.float32) if signed else jnp.abs(h_BTF.astype(jnp.float32))
    n = jnp.sum(exclusive_EF[0], dtype=jnp.int32)
    # n differs by layer inside the scan, so the rank is traced.
    ranks = [n - 1] + [(k * n) // 5 for k in (4, 3, 2, 1)]
    marks_BTF = sum((ranked > kth_largest(ranked, jnp.maximum(m, 0))).astype(jnp.float32) for m in ranks)
    return _over_experts(marks_BTF, exclusive_EF) / (3.0 * jnp.maximum(n, 1))


def energy_score(h_BTF: jax.Array, w_down_FD: jax.Array, mask_EF: jax.Array) -> jax.Array:
    """Share of sum_j h_j^2 ||w_j||^2 that each expert keeps, float32 [B, T, E]; w_j is column j of down_proj."""
    norm_F = jnp.sum(jnp.square(w_down_FD.astype(jnp.float32)), -1)
    energy_BTF = jnp.square(h_BTF.astype(jnp.float32)) * norm_F
    everyone_1F = jnp.ones_like(mask_EF[:1])  # all channels, as one expert more: a sum over [1, T, F] is slow on CPU
    kept_BTE = _over_experts(energy_BTF, jnp.concatenate([mask_EF, everyone_1F]))
    return kept_BTE[..., :-1] / jnp.maximum(kept_BTE[..., -1:], 1e-30)


def _over_experts(value_BTF: jax.Array, mask_EF: jax.Array) -> jax.Array:
    """Sum of a value over each expert's channels, [B, T, E]."""
    (b, t, _), place = value_BTF.shape, jax.P(ACTIVATION[0], None)
    sum_ME = jnp.einsum("mf,ef->me", flat(value_BTF), mask_EF.astype(jnp.float32), out_sharding=place)
    return jnp.reshape(sum_ME, (b, t, len(mask_EF)), out_sharding=ACTIVATION)


def target(score_BTE: jax.Array, config: LabelConfig) -> jax.Array:
    """Target distribution [B, T, E] of a score: hard_weight * smoothed one-hot + soft_weight * softmax(score / T)."""
    experts = score_BTE.shape[-1]
    hard_BTE = jax.nn.one_hot(jnp.argmax(score_BTE, -1), experts) * (1 - config.label_smoothing)
    hard_BTE += config.label_smoothing / experts
    return config.hard_weight * hard_BTE + config.soft_weight * jax.nn.softmax(score_BTE / config.temperature, -1)


def label_tap(config: LabelConfig):
    """What `backbone.forward(tap=...)` needs to label tokens in a dense run with the expert table given."""

    def tap(h_BTF, layer, table):
        mask_EF = jnp.pad(table.mask_LEU, ((0, 0), (0, h_BTF.shape[-1] - table.mask_LEU.shape[-1])))
        if config.kind == "energy":
            return energy_score(h_BTF, layer.w_down[...], mask_EF)
        exclusive_EF = mask_EF & ~jnp.all(mask_EF, axis=0, keepdims=True)
        return target(overlap_score(h_BTF, exclusive_EF, config.signed), config)

    return tap


def combine_layers(seen_LBTE: jax.Array, config: LabelConfig) -> jax.Array:
    """Target distribution [B, T, E] from what `label_tap` gave per layer.

    `overlap`: the mean of the layers' targets. `energy`: the target of the mean share.
    """
    mean_BTE = jnp.mean(seen_LBTE, axis=0)
    return target(mean_BTE, config) if config.kind == "energy" else mean_BTE
