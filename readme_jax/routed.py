"""What the loop runs, made ready before its first step: routed batches, and steps whose programs are compiled ahead."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from readme_jax import distributed, routing
from readme_jax.alternate import AlternateConfig
from readme_jax.loop import whole
from readme_jax.metrics import Pace, Stopwatch, progress, say
from readme_jax.models import parallel
from readme_jax.models.experts import Grouped, Masked, Route
from readme_jax.sharding import batch_devices, expert_devices, put
from readme_jax.steps import Way, make_load, plan

SAMPLED = 64  # expert steps whose batches say which routes are likely; the router costs a ten-thousandth of a step


class RoutedBatches:
    """Batches of expert steps on the mesh, with the route that `way` wants.

    place(tick) gives a placed batch, route(router params, ids, segments) its experts, None when there is one expert.
    A plan of the host needs the ids there, the same on every process: those of the next step are asked for before this
    one runs, so that the host never waits for a step. `pace` is told how long it waits for the router.
    """

    def __init__(self, place: Callable[[int], dict], route: Callable | None, experts: int, way: Way, pace: Pace):
        self._place, self._route, self._experts, self._pace = place, route, experts, pace
        self._load, self._first = make_load(experts), jax.jit(jnp.zeros_like)
        self._way: Way = way
        self._sizes: tuple[int, ...] = ()
        self._ahead: tuple[int, dict, jax.Array, jax.Array] | None = None

    def take(self, tick: int, params: Any, last: bool) -> tuple[dict, jax.Array]:
        """The batch of step `tick`, and the share of its tokens that each expert gets, float32 [E].

        params: the router's; after the step that is `last` they may change.
        """
        batch, expert_ABT, load_E = self._ask(tick, params)
        if self._way == "masked":
            return batch | {"route": Masked(expert_ABT)}, load_E
        self._ahead = None if last else (tick + 1, *self._ask(tick + 1, params))
        with self._pace.waiting("device"):
            expert_ABT = jax.device_get(expert_ABT)
        return batch | {"route": plan(expert_ABT, self._experts, self._way, put, self._sizes)}, load_E

    def _ask(self, tick: int, params: Any) -> tuple[dict, jax.Array, jax.Array]:
        if self._ahead is not None and self._ahead[0] == tick:
            return self._ahead[1:]
        batch = self._place(tick)
        return batch, *self._choose(batch, params)

    def _choose(self, batch: dict, params: Any) -> tuple[jax.Array, jax.Array]:
        ids_ABT, segments_ABT = batch["ids"], batch["segments"]
        with self._pace.calling():
            expert_ABT = self._first(ids_ABT) if self._route is None else self._route(params, ids_ABT, segments_ABT)
            load_E = self._load(expert_ABT, segments_ABT)
            return expert_ABT if self._way == "masked" else whole(expert_ABT), load_E

    def shapes(self, first: Iterator[dict], params: Any) -> list[dict]:
        """Batches as shapes, one for each route that a step may have: all of `masked` (one) and `grouped` (a few), of
        `parallel` those likely by `first`, the batches of the first steps of the run (the other ways read but one).

        From then on `take` gives a batch the smallest of these routes that it fits in. They are the same at every start
        of a run, and so is every plan: the router of separate experts is frozen.
        """
        batch = next(first)
        expert_ABT = self._choose(batch, params)[0]
        shape, like = expert_ABT.shape, jax.tree.map(abstract, batch)
        routes: list[Route] = [Masked(abstract(expert_ABT))]
        if self._way == "grouped":
            routes = grouped_routes(shape, self._experts)
        if self._way == "parallel":
            peers, tokens = expert_devices(), shape[1] * shape[2] // batch_devices()
            data = batch_devices() // peers

            def need(expert_ABT: jax.Array) -> int:
                return routing.largest_pair(jax.device_get(expert_ABT), self._experts, data=data, peers=peers)

            needs = [need(expert_ABT), *(need(self._choose(batch, params)[0]) for batch in first)]
            self._sizes = routing.likely(needs, tokens, peers)
            ladder = zip(routing.ladder(tokens, peers), parallel.abstract_routes(shape, self._experts))
            routes = [route for rows, route in ladder if rows in self._sizes]
        return [like | {"route": route} for route in routes]


def grouped_routes(shape_ABT: tuple[int, int, int], experts: int) -> list[Route]:
    """Every route of the `grouped` way that a batch of this shape can have, as shapes on the current mesh."""
    a, tokens = shape_ABT[0], shape_ABT[1] * shape_ABT[2]
    rows = routing.group_rows(tokens, experts)

    def shaped(*shape: int) -> Any:
        place = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(*(None,) * len(shape)))
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)

    counts = routing.group_counts(tokens, experts, rows)
    return [Grouped(shaped(a, count, rows), shaped(a, count), shaped(a, tokens)) for count in counts]


def abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of an array."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def output(function: Any, *arguments: Any) -> jax.ShapeDtypeStruct:
    """What a jitted function of one result gives, as a shape; its program is then compiled."""
    program = function.lower(*arguments).compile()
    made = jax.eval_shape(function, *arguments)
    return jax.ShapeDtypeStruct(made.shape, made.dtype, sharding=program.output_shardings)


class Prepared:
    """A jitted step of the loop, whose last argument is a batch: compiled ahead for the batches it is told of.

    A batch of other shapes is compiled for when it comes: a line says so, and the time is kept out of the step's.
    """

    def __init__(self, name: str, step: Any, pace: Pace):
        self._name, self._step, self._pace = name, step, pace
        self._known: set[tuple] = set()

    def prepare(self, *arguments: Any) -> None:
        """Compile for these arguments, which may be shapes (`abstract`); nothing runs."""
        self._step.lower(*arguments).compile()
        self._known.add(_shapes(arguments[-1]))

    def __call__(self, *arguments: Any) -> Any:
        if _shapes(arguments[-1]) not in self._known:
            watch, known = Stopwatch(), len(self._known)
            with self._pace.waiting("compile"):
                self.prepare(*arguments)
            if distributed.is_main():
                say(f"{self._name}: compiled in {watch.seconds:.1f} s: a batch unlike the {known} compiled for so far")
        with self._pace.calling():
            return self._step(*arguments)


def _shapes(batch: Any) -> tuple:
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def likely_batches(
    config: AlternateConfig,
    tick: int,
    place: Callable[[int], dict],
    labelled: Callable[[dict], dict],
    routed: RoutedBatches,
    params: Any,
) -> dict[str, list[dict]]:
    """By phase that has steps from `tick` on: the batches, as shapes, that its program is to be compiled for.

    labelled(batch) adds the router's target; params: the router's.
    """
    found = {}
    if first := _ticks(config, "router", 1, tick):
        found["router"] = [jax.tree.map(abstract, labelled(place(first[0])))]
    if _ticks(config, "experts", 1, tick):
        found["experts"] = routed.shapes(map(place, _ticks(config, "experts", SAMPLED)), params)
    return found


def compile_ahead(steps: dict[str, Prepared], arguments: dict[str, Callable[[Any], tuple]], batches: dict[str, list]):
    """Compile the steps for their batches (shapes) under a bar, in the same order on every process.

    arguments: by phase, batch -> the arguments of its step.
    """
    total = sum(map(len, batches.values()))
    with progress(total, "compile", "program", silent=not distributed.is_main()) as bar:
        for name, likely in batches.items():
            for batch in likely:
                steps[name].prepare(*arguments[name](batch))
                bar.update()


def _ticks(config: AlternateConfig, name: str, count: int, start: int = 0) -> list[int]:
    """The first steps of a phase, from the run's step `start` on; fewer where there are not as many."""
    return list(itertools.islice((t for t in range(start, config.total) if config.at(t)[0] == name), count))
