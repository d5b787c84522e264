"""AdamW with the paper's schedule (METHOD section 4): cosine within a round, lower from round to round."""

import dataclasses
import zlib
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from readme_jax.config import require

Rounding = Literal["nearest", "stochastic"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer of one phase: AdamW, cosine within a round."""

    lr: float
    """Peak learning rate of round 0."""
    round_decay: float = 0.8
    """Factor on the peak from round to round."""
    warmup: int = 0
    """Steps of linear warm-up at the start of each round."""
    weight_decay: float = 0.01
    """AdamW decay on matrices; norms and biases are left out."""
    clip: float = 1.0
    """Bound on the global gradient norm."""
    b1: float = 0.9
    """Decay of Adam's first moment."""
    b2: float = 0.999
    """Decay of Adam's second moment."""
    params: Literal["float32", "bfloat16"] = "float32"
    """Dtype of what is trained (the masters). `bfloat16` halves them; the optimizer still computes in float32."""
    rounding: Rounding = "nearest"
    """How an updated parameter becomes bfloat16. `nearest` loses updates below 1/512 of the parameter for good;
    `stochastic` rounds up with the probability that keeps the mean exact."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of Adam's first moment at rest; the second is float32 always."""

    def __post_init__(self):
        needs = "rounding=stochastic needs params=bfloat16: nothing of a float32 parameter is rounded"
        require(self.rounding == "nearest" or self.params == "bfloat16", needs)
        require(self.lr > 0, f"lr={self.lr} must be positive")
        require(0 < self.round_decay <= 1, f"round_decay={self.round_decay} must be in (0, 1]")
        require(self.clip > 0, f"clip={self.clip} must be positive")
        require(self.warmup >= 0, f"warmup={self.warmup} must not be negative")


def schedule(config: OptimConfig, steps_per_round: int):
    """Learning rate of a phase's own step counter: lr * round_decay^round * (cosine from 1 to 0 within the round)."""

    def rate(step):
        index, within = step // steps_per_round, step % steps_per_round
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * within / steps_per_round))
        warm = jnp.minimum((within + 1) / (config.warmup + 1), 1.0)
        return config.lr * config.round_decay**index * cosine * warm

    return rate


def decayed(params) -> dict:
    """True for matrices, by name: every parameter must be one of the known kinds."""

    def kind(path, _):
        name = path[-1].key
        if name.startswith("w_") or name in ("embedding", "head"):
            return True
        require(name.startswith("b_") or name.endswith("norm"), f"no weight-decay rule for the parameter {name}")
        return False

    return jax.tree_util.tree_map_with_path(kind, params)


def make(config: OptimConfig, steps_per_round: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW on the schedule."""
    rate = schedule(config, max(steps_per_round, 1))
    adam = optax.adamw(
        rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed, mu_dtype=jnp.dtype(config.mu_dtype)
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adam)


def masters(params, config: OptimConfig):
    """A copy of a tree of arrays in the dtype of the config, placed alike: what a phase trains and donates."""
    return jax.tree.map(lambda leaf: jnp.copy(leaf).astype(config.params), params)


def float32(tree):
    """A tree of arrays in float32, as the optimizer sees parameters and gradients of any dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """bfloat16 of a float32 array: up or down to a neighbour, with the probability that makes the mean exactly x.

    A uniform 16-bit number is added to the 16 bits that are cut off: of 65536 equally likely numbers, as many carry as
    those bits say. Values that bfloat16 holds stay as they are; the bits drawn do not depend on the mesh.
    """
    lies = jax.typeof(x).sharding.spec
    noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=lies).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def apply_updates(params, updates, rounding: Rounding, seed: int, step: jax.Array):
    """params + updates (float32) in the dtype of each parameter.

    The noise of `stochastic` is a function of seed, step and the parameter's name: a resumed run rounds alike, and a
    parameter more moves no other.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)

    def one(path, param, update):
        new = param.astype(jnp.float32) + update
        if rounding == "nearest" or param.dtype != jnp.bfloat16:
            return new.astype(param.dtype)
        return stochastic_round(new, jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode())))

    return jax.tree_util.tree_map_with_path(one, params, updates)
