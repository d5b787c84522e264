"""Peak memory of a traced step on one device, from its jaxpr: which array is alive when, by shape, dtype and sharding.

Nothing is compiled, so a 70 B model on 128 devices takes seconds on a laptop. In: the jaxpr of a jitted step, traced
on shapes under any mesh, abstract or real. Out: bytes of its arguments and of the heap that XLA would need beside them.

The model of the compiler, checked against XLA's own memory analysis in tests/test_liveness.py:
- an array on a device has the bytes of its type over its sharding; a sum over a sharded dimension makes a second array;
- elementwise and layout operations are computed inside what reads them, so they need memory only when something else
  reads them (a matmul, a loop), or when several readers would repeat an exponential, a division or the like;
- a loop holds its carries once, its stacked outputs from its start, and the values of one turn;
- an elementwise result takes the place of an operand that is read for the last time; a donated argument is the place of
  the result that replaces it;
- buffers are packed as XLA packs them: the largest first, each into the smallest gap that fits;
- the CPU backend runs whatever is ready, first come, first served; others are taken to keep the order of the trace.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from readme_jax.jaxprs import COSTLY, FUSED, LAYOUT, REDUCTIONS, Op, Program, Region, Value

ALIGN = 64


@dataclasses.dataclass(frozen=True)
class Usage:
    """Bytes on one device: of the arguments (those that are read), and of the heap beside them.

    weights: those of the heap that hold gathered weights, gradients and updates when most is alive.
    """

    arguments: int
    heap: int
    weights: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.arguments + self.heap


def _mark_needed(program: Program) -> None:
    """Leave out what no result depends on; a carry feeds its own next turn, so until nothing changes."""
    wanted, before = {id(v) for v in program.results}, -1
    while before != len(wanted):
        before = len(wanted)
        for op in reversed(program.ops):
            if any(id(v) in wanted for v in op.outs):
                op.needed = True
                if op.name != "begin":
                    wanted |= {id(v) for v in op.ins} | {id(v.root()) for v in op.ins}
    for op in program.ops:
        for value in set(op.ins) if op.needed else ():
            value.readers.append(op)


def _kernels(program: Program) -> dict[int, frozenset]:
    """What computes with each value, directly or through what is computed inside it, as far as is known by now."""
    found: dict[int, frozenset] = {}
    for op in reversed(program.ops):
        for value in op.outs if op.needed else ():
            own: set = set()
            for reader in value.readers:
                if not reader.fused:
                    own.add(reader.time)
                    continue
                for out in reader.outs:
                    own |= {id(out)} if out.stored else set()
                    own |= found.get(id(out), frozenset()) if out.again or not out.stored else frozenset()
            found[id(value)] = frozenset(own)
    return found


def _mark_stored(program: Program, results: set[int]) -> None:
    """Which values need a buffer of their own (see the module's docstring)."""
    _mark_once(program, results, None)
    _mark_once(program, results, _kernels(program))
    _mark_once(program, results, _kernels(program))


def _mark_once(program: Program, results: set[int], kernels: dict[int, frozenset] | None) -> None:
    for op in program.ops:
        for value in op.outs if op.needed else ():
            if value.loop:
                value.stored = True
                continue
            below = op.ins[-1].maker if op.name == "div" else None  # x / (broadcast y) becomes x * broadcast (1 / y)
            scaled = below is not None and below.name == "broadcast_in_dim" and below.ins and below.ins[0].size > 8
            value.costly = op.name in COSTLY and not scaled
            inside = all((r.fused or r.name in REDUCTIONS) and r.region == value.region for r in value.readers)
            uses = len(value.readers) if kernels is None else len(kernels.get(id(value), ()))
            repeated = uses > 1 and value.costly
            value.stored = id(value) in results or (bool(value.readers) and (not op.fused or not inside or repeated))
            value.again = value.stored and op.fused and not value.costly and op.name != "take"


def _breadth_first(program: Program) -> None:
    """Put the operations into the order of XLA's CPU backend: whatever has all it needs, first come, first served."""
    program.ops = _arranged(program.ops, program.arguments, ())
    starts: dict[Region, int] = {}
    for time, op in enumerate(program.ops):
        op.time = time
        starts.setdefault(op.region, time)
        if op.name == "end":
            program.ends[op.region] = time
    for value in program.values:
        if value.maker is not None:
            value.born = value.maker.time
        elif value.home is not None:
            value.born = starts.get(value.region, -1)


def _arranged(ops: list[Op], sources: Sequence[Value], region: Region) -> list[Op]:
    """`ops` of one region, breadth first; a loop runs as a whole and is arranged inside. An operation that is computed
    inside its readers comes right before the first of them.

    sources: values from outside that count as ready first, in this order.
    """
    units, inlined = _units(ops, region)
    maker = {id(value): i for i, (_, outs) in enumerate(units) for value in outs}
    needs: list[set[int]] = []
    hidden: list[list[Op]] = []
    for i, (own, outs) in enumerate(units):
        read, before = _read(own, outs, inlined)
        needs.append({id(v) for v in read if maker.get(id(v)) != i})
        hidden.append(before)
    users: dict[int, list[int]] = {}
    for i, reads in enumerate(needs):
        for key in reads:
            users.setdefault(key, []).append(i)
    outside = [key for key in users if key not in maker]
    first = {id(v): n for n, v in enumerate(sources)}
    queue: list[tuple[str, int]] = [("value", key) for key in sorted(outside, key=lambda k: first.get(k, len(first)))]
    queue += [("unit", i) for i, reads in enumerate(needs) if not reads]
    left, done, placed = [len(reads) for reads in needs], [], set()
    for kind, key in queue:  # which grows
        if kind == "unit":
            own, outs = units[key]
            for op in hidden[key]:
                if id(op) not in placed:
                    placed.add(id(op))
                    done.append(op)
            if len(own) > 1:
                start = next(i for i, op in enumerate(own) if op.name == "begin") + 1
                own = [*own[:start], *_arranged(own[start:-1], (), own[-1].region), own[-1]]
            done += own
            queue += [("value", id(value)) for value in outs if id(value) in users]
            continue
        for i in users[key]:
            left[i] -= 1
            if not left[i]:
                queue.append(("unit", i))
    return done


def _units(ops: list[Op], region: Region) -> tuple[list[tuple[list[Op], list[Value]]], dict[int, Op]]:
    """Operations that run as such, with what they make, a loop being one; and those inside readers, by their result."""
    units: list[tuple[list[Op], list[Value]]] = []
    inlined: dict[int, Op] = {}
    at = 0
    while at < len(ops):
        op = ops[at]
        at += 1
        if op.name in ("carry in", "begin"):
            last = next(i for i in range(at, len(ops)) if ops[i].name == "end" and ops[i].region[:-1] == region)
            whole = ops[at - 1 : last + 1]
            if any(inner.needed for inner in whole):
                begin = next(o for o in whole if o.name == "begin")
                units.append((whole, [*begin.ins, *begin.outs]))
            at = last + 1
        elif op.needed and (not op.fused or any(v.stored for v in op.outs)):
            units.append(([op], list(op.outs)))
        elif op.needed:
            inlined |= {id(v): op for v in op.outs}
    return units, inlined


def _read(ops: list[Op], outs: Sequence[Value], inlined: dict[int, Op]) -> tuple[list[Value], list[Op]]:
    """What a unit reads that is not inside it, and the operations computed inside it, in order."""
    inside = {id(v) for op in ops for v in op.outs} | {id(v) for v in outs}
    read: dict[int, Value] = {}
    hidden: dict[int, Op] = {}

    def walk(value: Value) -> None:
        if id(value) in inside:
            return
        op = inlined.get(id(value))
        if op is None:
            read[id(value)] = value
        elif id(op) not in hidden:
            for source in op.ins:
                walk(source)
            hidden[id(op)] = op

    for op in ops:
        for value in op.ins if op.needed and op.name != "begin" else ():
            walk(value)
    return list(read.values()), list(hidden.values())


def _mark_last(program: Program) -> None:
    """When each value is read for the last time: by what is stored, through what is computed inside it."""
    again: dict[int, int] = {}  # for values that are stored and computed again: the last time of that
    for op in reversed(program.ops):
        if not op.needed:
            continue
        times = [again.get(id(v), op.time) if v.stored else v.last for v in op.outs]
        time = max(times, default=op.time) if op.fused else op.time
        for value in op.ins:
            at = program.lift(time, op.region, value.region)
            if value.again and op.fused and op.region == value.region:
                again[id(value)] = max(again.get(id(value), -1), at)
            else:
                value.last = max(value.last, at)
    for value in program.values:
        if value.loop and value.stored:  # until the loop ends, read or not
            value.last = max(value.last, program.ends[value.turns])


def _sources(value: Value) -> Iterator[Value]:
    """The stored values that an operation's result is computed from."""
    seen, stack = set(), list(value.maker.ins) if value.maker else []
    while stack:
        source = stack.pop()
        if (source.stored and not source.again) or source.home is not None:
            yield source
        elif source.maker is not None and source.maker.name not in LAYOUT and id(source) not in seen:
            seen.add(id(source))
            stack.extend(source.maker.ins)


def _share(program: Program) -> None:
    """Results that take the place of an operand, and carries that are written in place."""
    for op in program.ops:
        if not op.needed:
            continue
        if op.name == "carry out":
            new = op.ins[0]
            if op.inner is not None and new.stored and new.home is None and not new.argument and not new.loop:
                if new.region == op.region and op.inner.last <= new.born:
                    new.home = op.inner.home
        elif (op.fused and op.name not in LAYOUT | {"stack", "take"}) or op.name.startswith("scatter"):
            for value in (v for v in op.outs if v.stored and v.home is None):
                for source in _sources(value):
                    root = source.root()
                    fits = (source.size, source.shape, source.region) == (value.size, value.shape, value.region)
                    if fits and not root.argument and source.last == value.born and root is not value:
                        value.home = source
                        break


def _constant(value: Value) -> bool:
    return not value.argument and not value.loop and value.home is None and value.maker is not None and (
        value.maker.name in FUSED and all(map(_constant, value.maker.ins))
    )  # fmt: skip


def pack(buffers: Sequence[tuple[int, int, int]]) -> int:
    """Size of the heap for buffers (bytes, first time, last time): the largest first, each into the smallest gap."""
    placed: list[tuple[int, int, int, int]] = []
    top = 0
    for size, born, last in sorted(buffers, key=lambda b: (-b[0], b[1])):
        size = -(-size // ALIGN) * ALIGN
        taken = sorted((at, at + n) for at, n, start, end in placed if start <= last and born <= end)
        gaps, free = [], 0
        for start, end in taken:
            if start - free >= size:
                gaps.append((start - free, free))
            free = max(free, end)
        at = min(gaps)[1] if gaps else free
        placed.append((at, size, born, last))
        top = max(top, at + size)
    return top


def _of_weights(spans: list[tuple[Value, int, int]], weights: frozenset) -> float:
    """Share, when most is alive, of what has the shape of a weight, whatever the order of its dimensions."""
    change: dict[int, list[int]] = {}
    for value, born, last in spans:
        own = value.size if tuple(sorted(value.shape)) in weights else 0
        for time, sign in ((born, 1), (last + 1, -1)):
            at = change.setdefault(time, [0, 0])
            at[0], at[1] = at[0] + sign * value.size, at[1] + sign * own
    total, own, most = 0, 0, (0, 0)
    for time in sorted(change):
        total, own = total + change[time][0], own + change[time][1]
        most = max(most, (total, own))
    return most[1] / max(most[0], 1)


def usage(closed: Any, donated: int, *, platform: str = "tpu", weights: frozenset = frozenset()) -> Usage:
    """Peak bytes of a traced step: `closed` its jaxpr, whose first `donated` flat arguments are given up to it.

    weights: sorted shapes that count as weights (see `Usage`).

    platform: `tpu`, `gpu` or `cpu`. Of code for one platform, that of the others is left out. The CPU backend's
    schedule is breadth first: everything that starts as a constant, stacked outputs of loops among it, is made before
    anything else. Other backends make it when it is wanted.
    """
    program, cpu = Program(closed, platform), platform == "cpu"
    results = {id(v) for v in program.results}
    _mark_needed(program)
    for argument in program.arguments:
        argument.stored = True
    _mark_stored(program, results)
    if cpu:
        _breadth_first(program)
    _mark_last(program)
    end = len(program.ops)
    for value in program.results:
        value.last = end
    # a result of the size of a donated argument is written over it
    places = list(program.arguments[:donated])
    for value in program.results:
        place = next((a for a in places if a.size == value.size and value.maker is not None), None)
        if place is not None and value.home is None:
            value.home = place
            places.remove(place)
    _share(program)
    spans: dict[int, tuple[Value, int, int]] = {}
    first_times: dict[Region, int] = {(): 0}
    for op in program.ops:
        first_times.setdefault(op.region, op.time)
    for value in program.values:
        root = value.root()
        if not value.stored or root.argument or value.born < 0 or value.last < 0:
            continue
        born = value.born
        if cpu and (value.loop or _constant(value)):
            starts = [op.ins for op in program.ops if op.name == "carry in" and value in op.outs]
            born = first_times[value.region] if all(_constant(i) for ins in starts for i in ins) else born
        _, first, last = spans.get(id(root), (root, born, value.last))
        spans[id(root)] = root, min(first, born), max(last, value.last)
    read = [a for a in program.arguments if a.readers or id(a) in results]
    heap = pack([(root.size, born, last) for root, born, last in spans.values()])
    return Usage(sum(a.size for a in read), heap, round(heap * _of_weights(list(spans.values()), weights)))
