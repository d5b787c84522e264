"""How an engine serves: memory, policies, batch limits. Sizes of memory are bytes, texts such as `2GiB`, or shares."""

import dataclasses
import math
import re
from typing import Literal, get_args

from readme_jax.config import require

Schedule = Literal["fcfs", "decode-first", "prefill-first", "longest-queue", "expert-aware"]
Residency = Literal["lookahead", "lru", "lfu", "random"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
RESIDENCIES: tuple[Residency, ...] = get_args(Residency)
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Everything about an engine but its model. ConfigError for a value out of range."""

    expert_memory: str = "1.0x"
    """Device memory for expert pages: bytes, `2GiB`, or `0.5x`, a share of all of them. What is not there is loaded."""
    kv_memory: str = "512MiB"
    """Device memory for keys and values of the backbone: bytes, or `2GiB`. Requests that find no room wait."""
    router_memory: str = "128MiB"
    """Device memory for keys and values of the router, which a request holds from its arrival to its end: as many
    requests can wait routed."""
    schedule: Schedule = "expert-aware"
    """Which waiting tokens make the next batch."""
    residency: Residency = "lookahead"
    """Which expert page makes room for one that is loaded."""
    mode: Literal["layer", "column"] = "layer"
    """What is held together: the pages of one layer at a time, or those of all layers of a batch."""
    batch_requests: int = 16
    """Requests in a batch at most."""
    batch_tokens: int = 256
    """Tokens in a batch at most."""
    chunk: int = 128
    """Tokens of one prompt in a batch at most."""
    max_live: int = 64
    """Requests between which a batch is chosen; those beyond wait in order of arrival."""
    max_wait: float | None = 12.0
    """Batches that longest-queue and expert-aware may pass over a request that could run, as a multiple of live
    requests / batch_requests, which is what strict turns cost; none: no bound, as in the paper."""
    context: int = 0
    """Longest prompt with its output, in tokens; 0: the model's own limit."""
    kv_page: int = 16
    """Tokens of a page of keys and values."""
    expert_page: int = 0
    """Channels of an expert page; 0: by the width of the FFN."""
    lookahead: int = 64
    """Batches ahead that the scheduler is asked for, for the eviction to see."""
    ahead: int = 4
    """Staged loads that may wait on the device; they take memory beside the budget."""
    mesh_expert: int = 1
    """Devices over which separate experts are spread, each with requests and keys and values of its own (`kv_memory`
    and `router_memory` are of each); all experts stay there, so `expert_memory` must be 1.0x. 1: one device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights, keys and values on the device."""

    def __post_init__(self):
        memory_bytes(self.expert_memory, "expert_memory", whole=1 << 40)
        memory_bytes(self.kv_memory, "kv_memory")
        memory_bytes(self.router_memory, "router_memory")
        for name, known in (("schedule", SCHEDULES), ("residency", RESIDENCIES), ("mode", ("layer", "column"))):
            value = getattr(self, name)
            require(value in known, f"{name}={value!r} is not one of {', '.join(known)}")
        require(self.dtype in ("float32", "bfloat16"), f"dtype={self.dtype!r} is not one of float32, bfloat16")
        least = {"context": 0, "expert_page": 0, "lookahead": 0}
        for field in dataclasses.fields(EngineOptions):  # not those of a program that has more
            if field.type is int:
                value, low = getattr(self, field.name), least.get(field.name, 1)
                good = type(value) is int and value >= low
                require(good, f"{field.name}={value!r} must be a whole number, at least {low}")
        wait = self.max_wait
        good = wait is None or isinstance(wait, int | float) and math.isfinite(wait) and wait >= 1
        require(good, f"max_wait={wait!r} must be at least 1, or none")
        require(
            self.batch_tokens >= self.batch_requests,
            f"batch_tokens={self.batch_tokens} must hold one token of each of batch_requests={self.batch_requests}",
        )
        require(self.chunk <= self.batch_tokens, f"chunk={self.chunk} must not exceed batch_tokens={self.batch_tokens}")


def memory_bytes(value: str | int, name: str, whole: int | None = None) -> int:
    """Bytes of `2GiB`, `500MB`, a number, or, where there are `whole` bytes to share, `0.5x`; else ConfigError."""
    shares = whole is not None
    rule = f"{name}={value!r} must be a size such as 2GiB, 500MB or a number of bytes" + (
        ", or a share such as 0.5x" * shares
    )
    require(isinstance(value, str | int) and not isinstance(value, bool), rule)
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", str(value).lower())
    require(found is not None, rule)
    assert found is not None
    number, unit = float(found[1]), found[2]
    if unit == "x" and whole is not None:
        require(0 < number <= 1, f"{name}={value!r}: a share must be in (0, 1]x")
        return round(number * whole)
    require(unit in UNITS, rule)
    require(0 < number * UNITS[unit] < 2**60, f"{name}={value!r} must be above 0")
    return round(number * UNITS[unit])
