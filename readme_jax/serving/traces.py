"""Workloads: when requests come, how long they are, what they say, and which experts their tokens take.

A trace is a list of `TraceRequest`, oldest first. It is read from a file (`trace_files`) or generated here, brought to
a rate and a context length, and filled with real text, because the router reads token ids. For machines and models that
are not at hand a `RoutedRequest` holds the experts alone, recorded from an engine or drawn by `route`.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from readme_jax.config import DataError, require
from readme_jax.packing import Records
from readme_jax.serving.request import Request, SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace: arrival in seconds from its beginning, lengths in tokens.

    prompt: its token ids, where they are known. session: requests of one session are turns of one conversation, each
    prompt beginning with the one before. domain: where its text is from. DataError for a value out of range.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    prompt: list[int] | None = None
    session: int | None = None
    domain: str | None = None

    def __post_init__(self):
        good = math.isfinite(self.arrival) and self.arrival >= 0
        require(good, f"arrival={self.arrival} must be a time of 0 s or later", DataError)
        for name in ("prompt_tokens", "output_tokens"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1", DataError)
        same = self.prompt is None or len(self.prompt) == self.prompt_tokens
        require(same, f"prompt has {len(self.prompt or ())} tokens, prompt_tokens={self.prompt_tokens}", DataError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrivalsConfig:
    """A generated trace. The defaults have the lengths of the Azure conversation trace of 2023, measured."""

    requests: int
    """Requests in all."""
    rate: float
    """Requests per second, on average."""
    burstiness: float = 1.0
    """Shape of the Gamma distribution of the times between arrivals, as in `vllm bench serve`: 1 is a Poisson process,
    less comes in bursts, more is more regular."""
    prompt_mean: float = 1155.0
    """Mean tokens of a prompt; of what a turn adds to it, in a session."""
    prompt_sigma: float = 0.99
    """Standard deviation of the logarithm of the prompt's length; 0: all of the mean."""
    output_mean: float = 211.0
    """Mean tokens of an output."""
    output_sigma: float = 0.86
    """Standard deviation of the logarithm of the output's length; 0: all of the mean."""
    turns: float = 1.0
    """Mean requests of a session (geometric); 1: every request is a session of its own."""
    think: float = 30.0
    """Mean seconds from one turn's arrival to the next one's (exponential)."""
    seed: int = 0
    """Of everything random here."""

    def __post_init__(self):
        require(self.requests >= 1, f"requests={self.requests} must be at least 1")
        for name in ("rate", "burstiness", "think"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name}={value} must be positive")
        for name in ("prompt_mean", "output_mean", "turns"):
            value = getattr(self, name)
            require(1 <= value < math.inf, f"{name}={value} must be at least 1")
        for name in ("prompt_sigma", "output_sigma"):
            value = getattr(self, name)
            require(0 <= value <= 5, f"{name}={value} must be in [0, 5]")


def generate(config: ArrivalsConfig) -> list[TraceRequest]:
    """A trace of `config.requests`. Turns of a session come apart by `think`, be the one before answered or not.

    With sessions it begins in their midst, as a trace of a running service does: `rate` holds from its first second.
    """
    rng = np.random.default_rng(config.seed)
    warm = 3 * config.think * config.turns if config.turns > 1 else 0.0
    count = config.requests + math.ceil(warm * config.rate / config.turns)
    starts = _gamma_times(count, config.rate / config.turns, config.burstiness, rng)
    turns = rng.geometric(1 / config.turns, count)
    session_N = np.repeat(np.arange(count), turns)  # N turns of all sessions, those of one session together
    first_N = np.repeat(turns.cumsum() - turns, turns)
    asked_N = _lengths(len(session_N), config.prompt_mean, config.prompt_sigma, rng)
    answered_N = _lengths(len(session_N), config.output_mean, config.output_sigma, rng)
    arrival_N = starts[session_N] + _before(rng.exponential(config.think, len(session_N)), first_N)
    prompt_N = _before(asked_N + answered_N, first_N) + asked_N
    kept = np.flatnonzero(arrival_N >= warm)
    kept = kept[arrival_N[kept].argsort(kind="stable")[: config.requests]]
    columns = (arrival_N[kept], prompt_N[kept], answered_N[kept], session_N[kept])
    rows = zip(*(column.tolist() for column in columns))
    return from_zero(TraceRequest(*row[:3], session=row[3] if config.turns > 1 else None) for row in rows)


def _before(values_N: np.ndarray, first_N: np.ndarray) -> np.ndarray:
    """Sum of the values before each one, from its session's first one on."""
    sums_N = values_N.cumsum() - values_N
    return sums_N - sums_N[first_N]


def _gamma_times(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> np.ndarray:
    return rng.gamma(burstiness, 1 / (rate * burstiness), count).cumsum()


def _lengths(count: int, mean: float, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return np.maximum(1, np.rint(rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, count))).astype(int)


def from_zero(trace: Iterable[TraceRequest]) -> list[TraceRequest]:
    """The trace by arrival, the first at 0 s."""
    ordered = sorted(trace, key=lambda request: request.arrival)
    first = ordered[0].arrival if ordered else 0.0
    return [dataclasses.replace(request, arrival=request.arrival - first) for request in ordered]


def at_rate(trace: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same pattern of arrivals, faster or slower: `rate` requests per second on average. DataError for fewer than
    two requests, or if all come at once (give those times with `arriving`)."""
    require(0 < rate < math.inf, f"rate={rate} must be positive")
    span = trace[-1].arrival - trace[0].arrival if trace else 0.0
    require(span > 0, f"a trace of {len(trace)} requests that all come at once has no rate to scale", DataError)
    factor = (len(trace) - 1) / (span * rate)
    return [dataclasses.replace(request, arrival=request.arrival * factor) for request in trace]


def arriving(trace: Sequence[TraceRequest], rate: float, burstiness: float = 1.0, seed: int = 0) -> list[TraceRequest]:
    """The same requests in the same order, at new times: Gamma arrivals as in `ArrivalsConfig`."""
    for name, value in (("rate", rate), ("burstiness", burstiness)):
        require(0 < value < math.inf, f"{name}={value} must be positive")
    times = _gamma_times(len(trace), rate, burstiness, np.random.default_rng(seed))
    return from_zero(dataclasses.replace(request, arrival=float(time)) for request, time in zip(trace, times))


def clip(trace: Iterable[TraceRequest], context: int) -> list[TraceRequest]:
    """Requests cut to a context of so many tokens: outputs to half of it, then the end of the prompt."""
    require(context >= 2, f"context={context} must be at least 2")
    clipped = []
    for request in trace:
        output = min(request.output_tokens, context // 2)
        prompt = min(request.prompt_tokens, context - output)
        ids = None if request.prompt is None else request.prompt[:prompt]
        clipped.append(dataclasses.replace(request, prompt_tokens=prompt, output_tokens=output, prompt=ids))
    return clipped


def with_prompts(
    trace: Iterable[TraceRequest], records: Mapping[str, Records], seed: int = 0, *, weights: Mapping[str, float] = {}
) -> list[TraceRequest]:
    """The trace with prompts of real text, of exactly the lengths it asks for.

    records: text by domain (`data.open_records`). Each request, and each session as a whole, reads one domain from one
    place on: the prompts of a session begin alike. weights: how often each domain is drawn (1 where not given).
    Requests that have a prompt keep it. DataError for a domain without text.
    """
    require(bool(records), "with_prompts needs records of one domain at least", DataError)
    names = list(records)
    unknown = [name for name in weights if name not in records]
    require(not unknown, f"weights of {unknown}: the domains are {', '.join(names)}")
    share = np.array([weights.get(name, 1.0) for name in names], float)
    require(bool((share >= 0).all() and share.sum() > 0), f"weights={dict(weights)} must be 0 or more, not all 0")
    rng = np.random.default_rng(seed)
    places: dict[int, tuple[str, int]] = {}
    filled = []
    for request in trace:
        if request.prompt is not None:
            filled.append(request)
            continue
        place = places.get(request.session) if request.session is not None else None
        if place is None:
            name = names[rng.choice(len(names), p=share / share.sum())]
            require(len(records[name]) > 0, f"domain {name} has no records", DataError)
            place = name, int(rng.integers(len(records[name])))
            if request.session is not None:
                places[request.session] = place
        prompt = _read(records[place[0]], place[1], request.prompt_tokens, place[0])
        filled.append(dataclasses.replace(request, prompt=prompt, domain=place[0]))
    return filled


def _read(records: Records, start: int, count: int, name: str) -> list[int]:
    """`count` ids from record `start` on, without padding, and on from the first record after the last."""
    ids: list[int] = []
    for row in range(start, start + len(records)):
        ids_T, segments_T = records.take(slice(row % len(records), row % len(records) + 1))
        ids += ids_T[segments_T > 0].tolist()
        if len(ids) >= count:
            return ids[:count]
    require(bool(ids), f"domain {name} has records of padding only", DataError)
    return (ids * -(-count // len(ids)))[:count]


def as_request(traced: TraceRequest, sampling: SamplingParams, choice: int = 0) -> Request:
    """What the engine runs: `output_tokens` tokens, all else from `sampling`. DataError if the prompt is unknown."""
    require(traced.prompt is not None, "a request of the trace has no prompt; `with_prompts` gives it one", DataError)
    assert traced.prompt is not None
    sampling = dataclasses.replace(sampling, max_new_tokens=traced.output_tokens, ignore_eos=True)
    return Request(prompt=traced.prompt, sampling=sampling, arrival=traced.arrival, choice=choice)


# ---- routing --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What a simulator needs: arrival in seconds, int16 experts of prompt [P] and output [O] tokens."""

    arrival: float
    prompt_experts: np.ndarray
    output_experts: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """A router made of two numbers: how often a token keeps the expert of the one before, and how uneven experts are.

    The expert of a token is a Markov chain whose long-run shares are the popularity and whose share of tokens that keep
    their expert is `stay`, both exactly.
    """

    experts: int = 7
    """Experts to choose from."""
    stay: float = 0.71
    """Share of tokens that keep the previous token's expert (the paper's figure: 2921 of 4096)."""
    zipf: float = 0.5
    """Popularity of the k-th expert is k ** -zipf; 0: all alike."""
    domains: int = 7
    """Kinds of requests; which experts are popular is drawn anew for each."""
    seed: int = 0
    """Of everything random here."""

    def __post_init__(self):
        require(1 <= self.experts <= 32767, f"experts={self.experts} must be in 1..32767")
        require(self.domains >= 1, f"domains={self.domains} must be at least 1")
        require(0 <= self.zipf < math.inf, f"zipf={self.zipf} must be 0 or more")
        least = float((self.popularity**2).sum())
        good = least <= self.stay <= 1 or self.experts == 1
        require(good, f"stay={self.stay} must be in [{least:.3f}, 1]: independent tokens already stay that often")

    @property
    def popularity(self) -> np.ndarray:
        """Share of tokens of each expert, the most popular first, float64 [E]."""
        weights_E = np.arange(1, self.experts + 1) ** -float(self.zipf)
        return weights_E / weights_E.sum()


def route(trace: Iterable[TraceRequest], config: RouterConfig) -> Iterator[RoutedRequest]:
    """Experts for a trace. Requests of one domain, or else of one session, have the same popular experts."""
    rng = np.random.default_rng(config.seed)
    popularity_E = config.popularity
    orders = [rng.permutation(config.experts) for _ in range(config.domains)]
    again = float((popularity_E**2).sum())
    jump = 0.0 if config.experts == 1 else (1 - config.stay) / (1 - again)
    of: dict[str | int, int] = {}
    for request in trace:
        key = request.session if request.domain is None else request.domain
        kind = int(rng.integers(config.domains))
        if key is not None:
            kind = of.setdefault(key, kind)
        count = request.prompt_tokens + request.output_tokens
        jumps_T = rng.random(count) < jump
        jumps_T[0] = True
        drawn = rng.choice(config.experts, int(jumps_T.sum()), p=popularity_E)
        experts_T = orders[kind][drawn[jumps_T.cumsum() - 1]].astype(np.int16)
        yield RoutedRequest(request.arrival, experts_T[: request.prompt_tokens], experts_T[request.prompt_tokens :])
