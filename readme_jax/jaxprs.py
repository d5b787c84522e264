"""A jaxpr as one list of operations with the bytes of every array on one device: what `liveness` works on.

In: the jaxpr of a jitted function, traced on shapes under any mesh, abstract or real. An array on a device has the
bytes of its type over its sharding; a sum over a sharded dimension makes a second array.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core
from jax.sharding import AxisType

LAYOUT = frozenset("broadcast_in_dim iota pad slice dynamic_slice concatenate split transpose rev".split())
CHEAP = frozenset(
    "add add_any sub mul neg max min abs sign select_n convert_element_type ge gt le lt eq ne and or not xor square "
    "clamp floor ceil round is_finite shift_left shift_right_logical shift_right_arithmetic reduce_precision "
    "bitcast_convert_type rem integer_pow one_minus_square".split()
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
    zero: bool = False
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


def opened(jaxpr: Any) -> Any:
    """The jaxpr inside a closed one."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def scanned(params: dict[str, Any]) -> tuple[int, int]:
    """Number of (constants, carries) of a scan. From jax 0.12 on they are counted by trees."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carries, _ = params["ft_in"].unpack()
    return len(consts), len(carries)


class Program:
    """A jaxpr as one list of operations in order, with calls and one turn of every loop in place, as it is lowered for
    `platform` (`tpu`, `gpu` or `cpu`)."""

    def __init__(self, closed: Any, platform: str = "tpu"):
        self.platform, self.cpu = platform, platform == "cpu"
        self.ops: list[Op] = []
        self.values: list[Value] = []
        self.ends: dict[Region, int] = {}
        self.region: Region = ()
        self.computed: dict[tuple, list[Value]] = {}
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
        if placed_by_xla(aval):
            # as such, or a loop's stack of it
            for shape, turns in ((aval.shape, 1), (aval.shape[1:], math.prod(aval.shape[:1]))):
                if shape in self.inferred:
                    return turns * self.inferred[shape] * aval.dtype.itemsize
        return device_bytes(aval)

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
            return self.run(opened(params[CALLS[name]]), ins)
        if name == "scan":
            first, carries, body = *scanned(params), opened(params["jaxpr"])
            if params["length"] == 1:  # XLA takes the loop away
                return self.run(body, ins)
            return self.loop(body, ins[:first], ins[first:], carries, made)
        if name == "while":
            first = params["cond_nconsts"] + params["body_nconsts"]
            body = opened(params["body_jaxpr"])
            return self.loop(body, ins[params["cond_nconsts"] : first], ins[first:], len(made), made)
        if name == "cond" and params.get("branches_platforms"):  # one of `platform_dependent`, chosen when lowered
            pairs = zip(params["branches"], params["branches_platforms"], strict=True)
            own = next(branch for branch, names in pairs if names is None or self.platform in names)
            return self.run(opened(own), ins[1:])
        if name == "cond":
            outs = [self.of(aval) for aval in made]
            for branch in params["branches"]:
                self.op("join", self.run(opened(branch), ins[1:]), outs)
            return list(outs)
        if name in RENAMED and ins[0] is not None and list(map(self.size, made)) == [ins[0].size]:
            return [ins[0]]
        if name == "div" and ins[0] is not None and ins[0].maker is not None and ins[0].maker.name == "div":
            ins = [*ins[0].maker.ins, ins[1]]  # XLA computes (a / b) / c as a / (b * c)
        if name in ("add", "add_any") and (merged := self.scattered(ins, made[0])):
            return [merged]
        if name == "dot_general":
            ins = [self.turned(value, eqn, side) for side, value in enumerate(ins)]
        # What was computed before from the same operands is not computed again: XLA merges the two. (Recomputation for
        # the backward pass is in another loop, another region.)
        literals = tuple(str(v) for v in eqn.invars if isinstance(v, core.Literal))
        key = (name, self.region, tuple(map(id, ins)), literals, str(params), tuple(map(str, made)))
        if key in self.computed and not eqn.effects:
            return list(self.computed[key])
        source = eqn.invars[0] if eqn.invars else None
        zero = name == "broadcast_in_dim" and isinstance(source, core.Literal) and not source.val
        outs = [self.of(aval, zero=zero) for aval in made]
        self.op(name, ins, outs)
        if summed(eqn):
            parts, outs = outs, [self.of(aval) for aval in made]
            self.op("sum over devices", parts, outs)
        self.computed[key] = list(outs)
        return list(outs)

    def scattered(self, ins: list[Value | None], made: Any) -> Value | None:
        """x + (rows added to zeros) as XLA computes it: the rows added to x. None if that is not what is summed."""
        for one, other in (ins, ins[::-1]):
            scatter = None if other is None else other.maker
            if one is not None and scatter is not None and scatter.name == "scatter-add":
                if scatter.ins[0].zero and scatter.outs[0] is other and one.size == scatter.outs[0].size:
                    out = self.of(made)
                    self.op("scatter-add", [one, *scatter.ins[1:]], [out])
                    return out
        return None

    def turned(self, value: Value | None, eqn: Any, side: int) -> Value | None:
        """A matmul's operand in the order that the matmul wants, a copy if it is another: batch dimensions first, what
        is contracted last on the left (0) and next on the right (1). Without a batch either end will do, but for the
        left on the CPU."""
        contracted, batch = (dims[side] for dims in eqn.params["dimension_numbers"])
        first, ndim = len(batch), eqn.invars[side].aval.ndim
        ends = [tuple(range(ndim - len(contracted), ndim)), tuple(range(first, first + len(contracted)))]
        wanted = [ends[side]] if batch or (self.cpu and side == 0) else ends
        if value is None or (tuple(batch) == tuple(range(first)) and tuple(contracted) in wanted):
            return value
        key = ("turned", id(value), self.region, side, contracted, batch)
        if key not in self.computed:
            self.computed[key] = [self.value(value.size, shape=value.shape)]
            self.op("transpose", [value], self.computed[key])
        return self.computed[key][0]

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
