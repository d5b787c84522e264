"""A trace of requests through an engine in real time, and the figures of it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from readme_jax import artifacts
from readme_jax.config import DataError, require
from readme_jax.serving import report
from readme_jax.serving.bank import Bank
from readme_jax.serving.engine import Engine
from readme_jax.serving.optimum import fewest_loads
from readme_jax.serving.options import RESIDENCIES
from readme_jax.serving.recorder import Recorder
from readme_jax.serving.request import SamplingParams
from readme_jax.serving.residency import Mode, Residency
from readme_jax.serving.traces import TraceRequest


def data_folder(model: Path) -> Path | None:
    """The `data` folder that a result of `alternate` names, if it is there; None for other models."""
    if not (model / artifacts.MANIFEST).is_file():
        return None
    named = artifacts.read_manifest(model)["config"].get("data")
    places = [Path(named), model.parent / Path(named).name] if isinstance(named, str) else []
    return next((place for place in places if (place / artifacts.MANIFEST).is_file()), None)


def check(engine: Engine, trace: Sequence[TraceRequest]) -> None:
    """DataError for a request that the engine's pages cannot hold."""
    for one in trace:
        engine.parts.check_room(one.prompt_tokens + one.output_tokens)


def replay(engine: Engine, trace: Sequence[TraceRequest], bar: Any = None) -> float:
    """Serve the requests, oldest first, as they arrive; seconds from the first arrival to the last token.

    Every output has its full length, whatever the model says. bar: moved on by one for each token.
    """
    require(bool(trace), "the trace has no requests", DataError)
    place, start = 0, engine.clock() - trace[0].arrival
    while place < len(trace) or engine.unfinished:
        now = engine.clock() - start
        while place < len(trace) and trace[place].arrival <= now:
            one = trace[place]
            require(one.prompt is not None, "a request of the trace has no prompt", DataError)
            sampling = SamplingParams(max_new_tokens=one.output_tokens, ignore_eos=True)
            engine.add_request(one.prompt or [], sampling, arrival=start + one.arrival)
            place += 1
        if engine.unfinished:
            for update in engine.step():
                if bar is not None:
                    bar.update(len(update.tokens))
        else:
            time.sleep(max(0.0, trace[place].arrival - now))
    return engine.clock() - start - trace[0].arrival


def figures(engine: Engine, recorder: Recorder, duration: float, goal: dict[str, float] | None) -> dict[str, Any]:
    """`report.figures` of a replay, and what only a real engine can tell."""
    accesses = engine.parts.residency.accesses
    assert accesses is not None, "an engine with a recorder keeps them"
    # an engine that begins with all pages in their place loads none, and nothing less can be
    least = 0 if engine.parts.runner.resident else fewest_loads(accesses, engine.parts.residency.slots)
    out = report.figures(recorder.served, recorder.steps, duration, goal=goal, least_loads=least)
    stats = engine.stats()
    names = ("bytes_prefetch", "bytes_demand", "host_share", "programs", "compiles_after_start", "tokens_from_prefix")
    names += ("bytes_read_device",)
    return out | {name: stats[name] for name in names}


def memory_curve(
    recorder: Recorder, bank: Bank, budgets: Sequence[int], mode: Mode
) -> dict[str, list[dict[str, float]]]:
    """Hits and loads of every residency policy at other budgets, for the batches that were run.

    Exact for that order of batches: policies are told what they were told then. One entry a budget (bytes): hit ratios
    by token and by byte, loaded bytes. Budgets below the least are left out.
    """
    curves: dict[str, list[dict[str, float]]] = {}
    for policy in RESIDENCIES:
        curves[policy] = []
        for budget in budgets:
            if budget < bank.least(mode) * bank.page_bytes:
                continue
            residency = Residency(bank, budget, policy=policy, mode=mode)
            for experts, future, counts in recorder.planned:
                residency.plan(experts, future, counts)
            counters = residency.counters
            curves[policy].append(
                {
                    "memory": budget,
                    "token_hit_ratio": counters.token_hit_ratio,
                    "byte_hit_ratio": counters.hit_ratio,
                    "bytes_loaded": counters.bytes_loaded,
                }
            )
    return curves
