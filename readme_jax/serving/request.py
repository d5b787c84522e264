"""What one request wants and how far it is: plain data, no arrays of JAX."""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from readme_jax.config import DataError, require
from readme_jax.generation import Sampling

State = Literal["waiting", "running", "finished"]
Reason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams(Sampling):
    """How the tokens of one request are chosen. ConfigError for a value out of range.

    Beside `generation.Sampling`: min_p: keep tokens with at least this share of the best one's probability (0: all).
    repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output (1: off, as
    transformers). presence_penalty, frequency_penalty: taken off the logit of a token of the output, once and per
    occurrence (0: off, as OpenAI). stop: strings (or one) that end the text; they are not part of it. stop_tokens: ids
    (or one) that end it beside the model's own. ignore_eos: only length and `stop` end it. logprobs: log-probabilities
    of the chosen token and of this many best ones (None: none). n: independent continuations; choice i of seed s draws
    what a request of its own would draw.
    """

    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self):
        given: Any = self.stop
        stop = _several(given, str)
        good = stop is not None and all(isinstance(s, str) and s for s in stop)
        require(good, f"stop={given!r} must be texts that are not empty")
        object.__setattr__(self, "stop", stop)
        tokens = _several(self.stop_tokens, int | np.integer)
        good = tokens is not None and all(isinstance(t, int | np.integer) for t in tokens)
        require(good, f"stop_tokens={self.stop_tokens!r} must be token ids")
        assert tokens is not None
        object.__setattr__(self, "stop_tokens", tuple(map(int, tokens)))
        for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            require(good, f"{name}={value!r} must be a finite number")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p} must be in [0, 1]")
        fits = 1e-3 <= self.repetition_penalty <= 1e3  # logits stay finite in float32
        require(fits, f"repetition_penalty={self.repetition_penalty} must be in [0.001, 1000]")
        for name in ("presence_penalty", "frequency_penalty"):
            require(-2 <= getattr(self, name) <= 2, f"{name}={getattr(self, name)} must be in [-2, 2]")
        require(isinstance(self.ignore_eos, bool), f"ignore_eos={self.ignore_eos!r} must be true or false")
        good = self.logprobs is None or type(self.logprobs) is int and 0 <= self.logprobs <= 20
        require(good, f"logprobs={self.logprobs!r} must be None or in 0..20")
        require(type(self.n) is int and 1 <= self.n <= 64, f"n={self.n!r} must be in 1..64")
        _check_numbers(self)


def _several(values: Any, kind: Any) -> tuple | None:
    """One of a kind, none or several, as a tuple; None for what is none of these."""
    if values is None or isinstance(values, kind):
        return () if values is None else (values,)
    return tuple(values) if isinstance(values, Iterable) else None


def _check_numbers(params: SamplingParams) -> None:
    """The rules of `Sampling`, on its own fields."""
    names = [f.name for f in dataclasses.fields(Sampling)]
    checked = Sampling(**{name: getattr(params, name) for name in names})
    for name in names:
        object.__setattr__(params, name, getattr(checked, name))


_numbers = itertools.count()


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One continuation of one prompt on its way through the engine.

    tokens: prompt and output ids known so far. experts: expert of each known token, as many as have been routed.
    computed: tokens whose keys and values lie in the backbone's pages; tokens[computed:] is the work left: one token
    when decoding, more when prefilling (also again, after a preemption). flying: tokens of a batch that is on the
    device, whose result is not known yet. pages, router_pages: ids of KV pages, in order of position, all of `device`,
    a number. digests: of the full pages of `tokens`. since: number of the batch that could have taken it first;
    passed_over: batches that could have taken it and did not, over its whole life. Times (arrival, started: first batch
    formed with it, first_token, last_token) in seconds of the engine's clock.
    """

    prompt: list[int]
    sampling: SamplingParams
    arrival: float = 0.0
    choice: int = 0
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))
    state: State = "waiting"
    reason: Reason | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    experts: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    flying: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    router_pages: list[int] = dataclasses.field(default_factory=list)
    device: int = 0
    digests: list[bytes] = dataclasses.field(default_factory=list)
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    preempted: int = 0
    since: int = 0
    passed_over: int = 0

    def __post_init__(self):
        require(len(self.prompt) > 0, "the prompt is empty", DataError)
        self.tokens = list(self.prompt)

    @property
    def left(self) -> int:
        """Known tokens that no batch has taken yet."""
        return len(self.tokens) - self.computed - self.flying

    @property
    def generated(self) -> int:
        """Tokens of the output so far."""
        return len(self.tokens) - len(self.prompt)


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """`count` tokens of a request from position `start` on, run in one batch.

    experts: experts of these tokens. samples: whether they end with the last known token, so that a new one is sampled.
    Both as they were when the work was made: the request goes on.
    """

    request: Request
    start: int
    count: int
    experts: frozenset[int] = dataclasses.field(init=False)
    samples: bool = dataclasses.field(init=False)

    def __post_init__(self):
        end = self.start + self.count
        object.__setattr__(self, "experts", frozenset(self.request.experts[self.start : end]))
        object.__setattr__(self, "samples", end == len(self.request.tokens))


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """What one step runs. experts: those that any of its tokens takes. tokens: of all its works."""

    works: tuple[Work, ...]
    experts: frozenset[int] = dataclasses.field(init=False)
    tokens: int = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "experts", frozenset().union(*[work.experts for work in self.works]))
        object.__setattr__(self, "tokens", sum([work.count for work in self.works]))
