"""AdamW with the paper's schedule (METHOD section 4): cosine within a round, lower from round to round."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from readme_jax.config import require


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

    def __post_init__(self):
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
    adam = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip), adam)
