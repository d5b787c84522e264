"""Requests of a simulation: when they come, how long they are, and which expert each of their tokens takes.

Expert ids come from a routing trace (recorded from a live engine) or are drawn: a token keeps the expert of the one
before it, or changes to the request's home expert, or to any.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from readme_jax.config import require


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One request. arrival: seconds. prompt, output: tokens. experts: int16 [prompt + output], of each token.

    ids: int64 [prompt], token ids of the prompt where prefixes are to be found again; None: all different.
    """

    arrival: float
    prompt: int
    output: int
    experts: np.ndarray
    ids: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Locality:
    """How experts follow one another in a text."""

    stay: float = 0.71
    """Share of tokens that keep the expert of the token before; the paper counted 2,921 of 4,096."""
    home: float = 0.5
    """Of the tokens that change, the share that goes (back) to the request's home expert; the others go anywhere."""
    skew: float = 0.0
    """How uneven homes are: home e is drawn with weight 1 / (1 + e)^skew; 0: all alike."""

    def __post_init__(self):
        for name in ("stay", "home"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name}={value} must be in 0..1")
        require(self.skew >= 0, f"skew={self.skew} must not be negative")


def draw_experts(count: int, home: int, experts: int, locality: Locality, rng: np.random.Generator) -> np.ndarray:
    """int16 [count]: a text of `count` tokens whose home expert is `home`."""
    changes = rng.random(count) >= locality.stay
    changes[:1] = True
    target = np.where(rng.random(count) < locality.home, home, rng.integers(0, experts, count))
    last = np.maximum.accumulate(np.where(changes, np.arange(count), 0))
    return target[last].astype(np.int16)


def draw_jobs(
    lengths: Iterable[tuple[float, int, int]], experts: int, locality: Locality, *, seed: int = 0
) -> Iterator[Job]:
    """Jobs of (arrival, prompt, output) with drawn experts, one by one."""
    rng = np.random.default_rng(seed)
    weight = (1.0 + np.arange(experts)) ** -locality.skew
    bounds = np.cumsum(weight / weight.sum())
    for arrival, prompt, output in lengths:
        home = int(np.searchsorted(bounds, rng.random()))
        yield Job(arrival, prompt, output, draw_experts(prompt + output, min(home, experts - 1), experts, locality, rng))
