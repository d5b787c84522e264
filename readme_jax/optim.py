"""AdamW with the paper's schedule (METHOD section 4): cosine within a round, lower from round to round."""

import dataclasses
import math
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
    """Dtype of the phase's parameters, tuned and frozen: 4 or 2 bytes a parameter at rest, and in the result folder.
    The optimizer computes in float32 either way."""
    rounding: Rounding = "stochastic"
    """How an updated parameter becomes bfloat16 (0 bytes; float32 is not rounded). `stochastic` rounds up with the
    probability that keeps the mean exact; `nearest` loses updates below 1/512 of the parameter, for good."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of Adam's first moment at rest: 4 or 2 bytes a tuned parameter. The second moment is float32, 4 bytes."""

    def __post_init__(self):
        require(0 < self.lr < math.inf, f"lr={self.lr} must be positive and finite")
        require(0 < self.round_decay <= 1, f"round_decay={self.round_decay} must be in (0, 1]")
        require(self.clip > 0, f"clip={self.clip} must be positive")
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be at least 0 and below 1")
        finite = 0 <= self.weight_decay < math.inf
        require(finite, f"weight_decay={self.weight_decay} must not be negative, and finite")
        require(self.warmup >= 0, f"warmup={self.warmup} must not be negative")
        rounded = self.rounding == "stochastic" or self.params == "bfloat16"
        require(rounded, "rounding=nearest has no meaning with params=float32: it is not rounded")


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
        whole = name.startswith("b_") or name.endswith("norm") or name.endswith("scores")  # those of `masks`
        require(whole, f"no weight-decay rule for the parameter {name}")
        return False

    return jax.tree_util.tree_map_with_path(kind, params)


def make(config: OptimConfig, steps_per_round: int, seed: int = 0) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW on the schedule, in float32 whatever the dtype of gradients and parameters.

    Gradients and state lie like the parameters. seed: of the noise of stochastic rounding.
    """
    rate = schedule(config, max(steps_per_round, 1))
    adam = optax.adamw(
        rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed, mu_dtype=jnp.dtype(config.mu_dtype)
    )
    chain = optax.chain(optax.clip_by_global_norm(config.clip), adam)
    if config.params == "float32":
        return chain
    half = in_float32(chain)
    return optax.chain(half, rounded_stochastically(seed)) if config.rounding == "stochastic" else half


def cast(tree, dtype):
    """A tree of arrays in another dtype, each where it was; those that have it already are not copied."""
    return jax.tree.map(lambda leaf: leaf if leaf.dtype == dtype else leaf.astype(dtype), tree)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on float32 images of gradients and parameters: its state and its updates are float32."""

    def init(params):
        return tx.init(cast(params, jnp.float32))

    def update(grad, state, params=None):
        return tx.update(cast(grad, jnp.float32), state, None if params is None else cast(params, jnp.float32))

    return optax.GradientTransformation(init, update)


def rounded_stochastically(seed: int) -> optax.GradientTransformation:
    """The last of a chain: float32 updates become those that take each bfloat16 parameter to a rounded sum.

    The noise is a function of seed, number of updates and the parameter's name: a resumed run rounds alike, and a
    parameter more changes no other. The update stays float32: `optax.apply_updates` adds it in float32, which gives
    the chosen bfloat16 number but for an error of 2^-24 that its own cast removes.
    """

    def init(_):
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        key = jax.random.fold_in(jax.random.key(seed), state.count)

        def one(path, param, update):
            if param.dtype != jnp.bfloat16:
                return update
            name = zlib.crc32(jax.tree_util.keystr(path).encode())
            old = param.astype(jnp.float32)
            return stochastic_round(old + update, jax.random.fold_in(key, name)).astype(jnp.float32) - old

        rounded = jax.tree_util.tree_map_with_path(one, params, updates)
        return rounded, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """bfloat16 of a float32 array: one of the two neighbours, with the probability that makes the mean exactly x.

    A uniform 16-bit number is added to the 16 bits that are cut off: of 65536 equally likely numbers, as many carry as
    those bits say. Values that bfloat16 holds stay as they are; the numbers do not depend on the mesh.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_hashed(key, x) >> 16)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _hashed(key: jax.Array, like: jax.Array) -> jax.Array:
    """uint32 numbers for every place of `like`, by a hash of the key and the place's row and column.

    On CPU `jax.random.bits` takes forty times as long and 16 bytes a parameter; a rounding asks no more of its numbers
    than to be uniform and unlike from place to place and step to step.
    """
    lies, zero = jax.typeof(like).sharding, jnp.zeros_like(like, jnp.uint32)
    row, column = zero, zero
    for axis, size in enumerate(like.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, like.shape, axis, out_sharding=lies)
        row, column = (row, place) if axis == like.ndim - 1 else (row * jnp.uint32(size) + place, column)
    first, second = jax.random.key_data(key)
    return _mix(_mix(row + first) ^ column + second)


def _mix(h: jax.Array) -> jax.Array:
    """Every bit of a uint32 changes half of all bits: the last step of MurmurHash3 (A. Appleby, public domain)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
