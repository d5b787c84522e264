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
- buffers are packed as XLA packs them: the largest first, each into the smallest gap that fits.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core
from jax.sharding import AxisType

LAYOUT = frozenset("broadcast_in_dim iota pad slice dynamic_slice concatenate split transpose rev".split())
CHEAP = frozenset(
    "add add_any sub mul neg max min abs sign select_n convert_element_type ge gt le lt eq ne and or not xor square "
    "clamp floor ceil round is_finite shift_left shift_right_logical shift_right_arithmetic reduce_precision "
    "bitcast_convert_type rem integer_pow".split()
)
COSTLY = frozenset("exp exp2 expm1 log log1p logistic tanh div sqrt rsqrt cbrt pow sin cos erf".split())
FUSED = LAYOUT | CHEAP | COSTLY | {"carry in", "carry out", "stack", "take"}
REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_and reduce_or argmax argmin".split())
# Another name for the same bytes, unless a device's share of them changes.
RENAMED = frozenset("reshape squeeze expand_dims reshard pcast pvary optimization_barrier stop_gradient copy".split())
# Where the jaxpr of a call is; its body is run in place.
CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "checkpoint": "jaxpr",
    "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "shard_map": "jaxpr",
}  # fmt: skip
ORDER = eval(__import__("os").environ.get("ORD","lambda b: (-b[0], b[1])"))
ALIGN = 64
Region = tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Value:
    """One array on one device. `home`: the value whose buffer holds it; `stored`: it needs a buffer at all; `again`:
    it has one and is cheap, so what is elementwise computes it again rather than read the buffer.

    region: the loops around it, outermost first. born, last: times in its own region, last over all readers.
    """

    size: int
    region: Region
    maker: "Op | None" = None
    readers: list["Op"] = dataclasses.field(default_factory=list)
    stored: bool = False
    again: bool = False
    costly: bool = False
    shape: tuple[int, ...] = ()
    argument: bool = False
    loop: bool = False
    turns: Region = ()
    home: "Value | None" = None
    born: int = -1
    last: int = -1

    def root(self) -> "Value":
        """The value that owns the buffer."""
        return self if self.home is None else self.home.root()


@dataclasses.dataclass(eq=False)
class Op:
    """One operation. `fused`: it needs no buffer for what it reads; `inner`: the carry a loop's last write replaces."""

    name: str
    time: int
    region: Region
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    fused: bool
    inner: Value | None = None
    needed: bool = False


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


def local_bytes(shape: Sequence[int], itemsize: int, spec: Any, mesh: Any) -> int:
    """Bytes of one device's part: every dimension over the mesh axes that split it, rounded up."""
    parts = [-(-n // ways(spec[i : i + 1], mesh)) for i, n in enumerate(shape)]
    return math.prod(parts) * itemsize


def ways(entries: Any, mesh: Any) -> int:
    """In how many parts the dimensions of some PartitionSpec entries are split; mesh: axis name -> length."""
    names = [e if isinstance(e, tuple) else (e,) for e in entries if e is not None]
    return math.prod(mesh[axis] for group in names for axis in group)


def device_bytes(aval: Any) -> int:
    """Bytes of one device's part of an abstract value; 0 for tokens, random keys and the like."""
    if not hasattr(aval, "shape") or not hasattr(getattr(aval, "dtype", None), "itemsize"):
        return 0
    mesh = aval.sharding.mesh
    return local_bytes(aval.shape, aval.dtype.itemsize, () if mesh.empty else aval.sharding.spec, mesh.shape)


def placed_by_xla(aval: Any) -> bool:
    """True for an array whose place on the mesh is not part of its type."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return mesh is not None and not mesh.empty and AxisType.Auto in mesh.axis_types


def summed(eqn: Any) -> bool:
    """True for an operation that adds up a dimension split over devices: its result exists before and after the sum."""

    def split(aval, dims):
        mesh = aval.sharding.mesh
        return 1 if mesh.empty else ways([aval.sharding.spec[d] for d in dims], mesh.shape)

    name, ins = eqn.primitive.name, [v.aval for v in eqn.invars]
    if name == "dot_general":
        return split(ins[0], eqn.params["dimension_numbers"][0][0]) > 1
    if name in REDUCTIONS:
        return split(ins[0], eqn.params["axes"]) > 1
    if name == "scatter-add":
        out = eqn.outvars[0].aval
        return split(ins[2], range(ins[2].ndim)) > split(out, range(out.ndim))
    return False


class Program:
    """A jaxpr as one list of operations in order, with calls and one turn of every loop in place."""

    def __init__(self, closed: Any):
        self.ops: list[Op] = []
        self.values: list[Value] = []
        self.ends: dict[Region, int] = {}
        self.region: Region = ()
        self.inferred: dict[tuple[int, ...], int] = {}
        self.infer(closed.jaxpr)
        self.arguments = [self.of(v.aval, argument=True) for v in closed.jaxpr.invars]
        self.results = [r for r in self.run(closed.jaxpr, self.arguments) if r is not None]

    def value(self, size: int, **fields) -> Value:
        """A new value in the present region."""
        self.values.append(Value(size, self.region, **fields))
        return self.values[-1]

    def infer(self, jaxpr: Any) -> None:
        """Note how arrays are split that XLA places itself (indexing with an `out_sharding`): as where they come from
        or go to."""
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "reshard":
                sides = [eqn.invars[0].aval, eqn.outvars[0].aval]
                if sum(map(placed_by_xla, sides)) == 1:
                    known = sides[0] if placed_by_xla(sides[1]) else sides[1]
                    count = device_bytes(known) // known.dtype.itemsize
                    self.inferred[known.shape] = min(count, self.inferred.get(known.shape, count))
            for inner in core.jaxprs_in_params(eqn.params):
                self.infer(inner)

    def size(self, aval: Any) -> int:
        """Bytes of an abstract value on one device."""
        count = self.inferred.get(aval.shape) if placed_by_xla(aval) else None
        return device_bytes(aval) if count is None else count * aval.dtype.itemsize

    def of(self, aval: Any, **fields) -> Value:
        """A new value of an abstract one's size and shape."""
        return self.value(self.size(aval), shape=tuple(getattr(aval, "shape", ())), **fields)

    def op(self, name: str, ins, outs, inner: Value | None = None) -> None:
        """A new operation at the present time."""
        ins = tuple(i for i in ins if i is not None)
        op = Op(name, len(self.ops), self.region, ins, tuple(outs), name in FUSED, inner)
        self.ops.append(op)
        for out in op.outs:
            out.maker = out.maker or op
            out.born = out.born if out.born >= 0 else op.time

    def run(self, jaxpr: Any, arguments: Sequence[Value | None]) -> list[Value | None]:
        """Append a jaxpr's operations; the values of its results, None for a literal."""
        known: dict[Any, Value | None] = dict.fromkeys(jaxpr.constvars) | dict(zip(jaxpr.invars, arguments))

        def read(v):
            return None if isinstance(v, core.Literal) else known[v]

        for eqn in jaxpr.eqns:
            known |= zip(eqn.outvars, self.equation(eqn, [read(v) for v in eqn.invars]))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, ins: list[Value | None]) -> list[Value | None]:
        """Append one equation; the values of its results."""
        name, params, made = eqn.primitive.name, eqn.params, [v.aval for v in eqn.outvars]
        if name in CALLS and CALLS[name] in params:
            inner = params[CALLS[name]]
            return self.run(getattr(inner, "jaxpr", inner), ins)
        if name == "scan":
            first, carries = params["num_consts"], params["num_carry"]
            if params["length"] == 1:  # XLA takes the loop away
                return self.run(params["jaxpr"].jaxpr, ins)
            return self.loop(params["jaxpr"].jaxpr, ins[:first], ins[first:], carries, made)
        if name == "while":
            first = params["cond_nconsts"] + params["body_nconsts"]
            body = params["body_jaxpr"].jaxpr
            return self.loop(body, ins[params["cond_nconsts"] : first], ins[first:], len(made), made)
        if name == "cond":
            outs = [self.of(aval) for aval in made]
            for branch in params["branches"]:
                self.op("join", self.run(branch.jaxpr, ins[1:]), outs)
            return list(outs)
        if name in RENAMED and ins[0] is not None and list(map(self.size, made)) == [ins[0].size]:
            return [ins[0]]
        if name == "div" and ins[0] is not None and ins[0].maker is not None and ins[0].maker.name == "div":
            ins = [*ins[0].maker.ins, ins[1]]  # XLA computes (a / b) / c as a / (b * c)
        if name == "dot_general":
            ins = [self.turned(value, eqn, side) for side, value in enumerate(ins)]
        outs = [self.of(aval) for aval in made]
        self.op(name, ins, outs)
        if summed(eqn):
            parts, outs = outs, [self.of(aval) for aval in made]
            self.op("sum over devices", parts, outs)
        return list(outs)

    def turned(self, value: Value | None, eqn: Any, side: int) -> Value | None:
        """A matmul's operand in the order that the matmul wants, a copy if it is another: batch dimensions first, what
        is contracted last on the left (0) and next on the right (1); without a batch either end will do."""
        contracted, batch = (dims[side] for dims in eqn.params["dimension_numbers"])
        first, ndim = len(batch), eqn.invars[side].aval.ndim
        ends = [tuple(range(ndim - len(contracted), ndim)), tuple(range(first, first + len(contracted)))]
        wanted = [ends[side]] if batch or side == 0 else ends
        if value is None or (tuple(batch) == tuple(range(first)) and tuple(contracted) in wanted):
            return value
        copy = self.value(value.size, shape=value.shape)
        self.op("transpose", [value], [copy])
        return copy

    def loop(self, body: Any, consts, inputs, carries: int, made: list[Any]) -> list[Value | None]:
        """One turn of a loop: `inputs` are the initial carries, then what is sliced; `made`: types of the results."""
        outs = [self.of(aval, loop=True) for aval in made]
        for i in range(carries):
            self.op("carry in", [inputs[i]], [outs[i]])
        self.op("begin", outs[:carries], outs[carries:])
        outer, self.region = self.region, (*self.region, len(self.ops))
        for out in outs:
            out.turns = self.region
        held = [self.value(out.size, shape=out.shape, home=out, born=len(self.ops)) for out in outs[:carries]]
        taken = [self.of(v.aval) for v in body.invars[len(consts) + carries :]]
        for source, piece in zip(inputs[carries:], taken):
            self.op("take", [source], [piece])
        for i, result in enumerate(self.run(body, [*consts, *held, *taken])):
            if result is not None and i < carries:
                self.op("carry out", [result], [outs[i]], held[i])
            elif result is not None:
                self.op("stack", [result], [outs[i]])
        self.op("end", [], [])
        self.ends[self.region], self.region = len(self.ops) - 1, outer
        return list(outs)

    def lift(self, time: int, region: Region, to: Region) -> int:
        """A time inside `region` as seen from the enclosing region `to`: a loop holds what it reads to its end."""
        return time if len(region) <= len(to) else self.ends[region[: len(to) + 1]]


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
    """`ops` of one region, loops in it as a whole and arranged inside, breadth first. What is computed inside a reader
    comes right before the first of them."""
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
    for kind, key in queue:
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
                    fits = source.size == value.size and source.region == value.region and not root.argument
                    if fits and source.last == value.born and root is not value:
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
    for size, born, last in sorted(buffers, key=ORDER):
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


def usage(closed: Any, donated: int, *, early: bool = False, weights: frozenset = frozenset()) -> Usage:
    """Peak bytes of a traced step: `closed` its jaxpr, whose first `donated` flat arguments are given up to it.

    weights: sorted shapes that count as weights (see `Usage`).

    early: the CPU backend's schedule, which makes everything that starts as a constant, stacked outputs of loops
    among it, before anything else; other backends make it when it is wanted.
    """
    program = Program(closed)
    results = {id(v) for v in program.results}
    _mark_needed(program)
    for argument in program.arguments:
        argument.stored = True
    _mark_stored(program, results)
    if early:
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
    for value in program.values:
        root = value.root()
        if not value.stored or root.argument or value.born < 0 or value.last < 0:
            continue
        born = value.born
        if early and value.region == () and (value.loop or _constant(value)):
            starts = [op.ins for op in program.ops if op.name == "carry in" and value in op.outs]
            born = 0 if all(_constant(i) for ins in starts for i in ins) else born
        _, first, last = spans.get(id(root), (root, born, value.last))
        spans[id(root)] = root, min(first, born), max(last, value.last)
    read = [a for a in program.arguments if a.readers or id(a) in results]
    heap = pack([(root.size, born, last) for root, born, last in spans.values()])
    return Usage(sum(a.size for a in read), heap, round(heap * _of_weights(list(spans.values()), weights)))
