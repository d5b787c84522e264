"""The steps of a training run on shapes alone: what is measured ahead, and lowered for pods that are not here.

Everything is placed on the current mesh, which may be abstract (`jax.sharding.use_abstract_mesh`): no weights are read,
no array is made, and a 70 B model takes as long as a small one, since layers are stacked.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import optim, steps
from readme_jax.alternate import AlternateConfig, check
from readme_jax.config import ExpertConfig, ModelConfig, RouterConfig, require
from readme_jax.losses import HeadLoss, TopK
from readme_jax.models import backbone, parallel, router
from readme_jax.models.experts import ExpertTable, Grouped, Masked, Route
from readme_jax.routing import bucket, group_rows, ladder
from readme_jax.sharding import REPLICATED, batch_devices, expert_devices, model_devices, spec

MICRO = jax.P(None, *spec("batch", "seq"))


@dataclasses.dataclass(frozen=True)
class Run:
    """What decides the shapes of a run. seq: tokens of a record. used: U, the channels that any expert has (0: all F).

    router: the router's size, None for a model with one expert. skew: how many times its fair share of rows a device
    may send to one peer in the `parallel` step that is planned; the real ladder goes on to the worst case.
    """

    config: AlternateConfig
    model: ModelConfig
    experts: ExpertConfig
    router: RouterConfig | None
    seq: int
    used: int = 0
    skew: float = 1.5

    def __post_init__(self):
        parts = self.config.experts.cut
        require(self.seq % parts == 0, f"experts.cut={parts} does not divide records of {self.seq} tokens")

    @property
    def row(self) -> int:
        """Tokens of a row of the expert phase."""
        return self.seq // self.config.experts.cut


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted function and the shapes of its arguments, the first of which is given up to it if `donates`.

    held: how many of the arguments, from the first, are on the devices between steps too; the others are a batch.
    before: it runs before training, when the model as carved is there and nothing of the optimizers. settings: what
    else decides the program: two steps of equal `identity` are one program.
    """

    function: Any
    arguments: tuple
    donates: bool
    held: int
    settings: tuple
    before: bool = False

    @property
    def donated(self) -> int:
        """Arrays given up."""
        return len(jax.tree.leaves(self.arguments[0])) if self.donates else 0

    @property
    def identity(self) -> tuple:
        """Settings, and the arguments' shapes, dtypes and places; hashable."""
        leaves, tree = jax.tree.flatten(self.arguments)
        return (*self.settings, tree, *leaves)

    def trace(self) -> Any:
        """The step traced on the current mesh."""
        return self.function.trace(*self.arguments)


def current_mesh() -> Any:
    """The mesh in force: devices where there are some, else the abstract one."""
    mesh = jax.sharding.get_mesh()
    return jax.sharding.get_abstract_mesh() if mesh.empty else mesh


def shaped(shape: tuple[int, ...], dtype: Any, partition: jax.P = REPLICATED) -> Any:
    """A placed array that is not there. One entry a dimension, as `sharding.put` writes it."""
    whole = jax.P(*partition, *(None,) * (len(shape) - len(partition)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(current_mesh(), whole))


def parameters(run: Run, dtype: Any = jnp.float32) -> Any:
    """The backbone at rest in `dtype`."""
    specs, shapes = backbone.param_specs(run.model), backbone.abstract_params(run.model)
    if run.config.experts.way == "parallel":
        specs = parallel.separate_specs(specs)
        shapes = parallel.separate_layout(shapes, run.experts.experts)
    return jax.tree.map(lambda a, s: shaped(a.shape, dtype, s), shapes, specs)


def router_parameters(run: Run) -> Any:
    """The router at rest, in the dtype of its phase."""
    assert run.router is not None
    shapes = router.abstract_params(run.router, run.model.vocab, run.experts.experts)
    kind = run.config.router.optim.params
    return jax.tree.map(lambda a, s: shaped(a.shape, kind, s), shapes, router.param_specs(shapes))


def phase(params: Any, tx: Any) -> steps.Phase:
    """`steps.start` on shapes: the optimizer state lies as its parameter does."""
    state = jax.eval_shape(tx.init, params)
    state = jax.tree.map(lambda a: shaped(a.shape, a.dtype, a.sharding.spec if a.sharding else REPLICATED), state)
    return steps.Phase(shaped((), jnp.int32), params, state)


def table(run: Run) -> ExpertTable:
    """The expert table; with channels over `model`, U is F."""
    cfg, experts = run.model, run.experts
    used = cfg.mlp if model_devices() > 1 else run.used or cfg.mlp
    mask = shaped((cfg.layer, experts.experts, used), jnp.bool_, spec("layer", "expert", "mlp"))
    return ExpertTable(shaped((cfg.layer, experts.experts, experts.channels), jnp.int32), mask)


def tokens(accum: int, batch: int, seq: int) -> dict[str, Any]:
    """ids and segments of a batch."""
    return {name: shaped((accum, batch, seq), jnp.int32, MICRO) for name in ("ids", "segments")}


def route_of(run: Run) -> Route:
    """The route of an expert batch: of `grouped` for equal shares, of `parallel` on the rung for `skew`."""
    chosen, count = run.config.experts, run.experts.experts
    shape = (chosen.accum, chosen.batch, run.row)
    if chosen.way == "masked":
        return Masked(shaped(shape, jnp.int32, MICRO))
    if chosen.way == "parallel":
        peers = expert_devices()
        each = chosen.batch * run.row // batch_devices()
        sizes = ladder(each, peers)
        rung = int(np.searchsorted(sizes, min(run.skew * each / peers, each)))
        return parallel.abstract_routes(shape, count)[rung]
    rows, groups = _groups(chosen.batch * run.row, count)
    return Grouped(
        shaped((chosen.accum, groups, rows), jnp.int32),
        shaped((chosen.accum, groups), jnp.int32),
        shaped((chosen.accum, chosen.batch * run.row), jnp.int32),
    )


def _groups(count: int, experts: int) -> tuple[int, int]:
    """(rows, groups) that `steps.plan` makes of `count` tokens, were every expert to leave half a group empty."""
    rows = group_rows(count, experts)
    return rows, bucket(-(-count // rows) + experts // 2, 1)


def student(run: Run) -> tuple[Any, Any]:
    """(tuned, frozen) parts of the backbone while experts are tuned."""
    own = run.config.experts
    return steps.split_tuned(parameters(run, own.optim.params), own.tuned)


def top_k(run: Run) -> TopK:
    """What is kept of the teacher for an expert batch."""
    own, token = run.config.experts, jnp.uint16 if run.model.vocab <= 1 << 16 else jnp.int32
    shape = (own.accum, own.batch, run.row)
    logp, ids = (shaped((*shape, own.teacher_topk), kind, jax.P(*MICRO, None)) for kind in (jnp.float32, token))
    return TopK(logp, ids, shaped(shape, jnp.float32, MICRO))


def train_steps(run: Run) -> dict[str, Step]:
    """The jitted functions that a run calls, by name: teacher, label, router, route, experts; those it does not call
    are left out. Same functions, same order of arguments as in train/alternate.py."""
    backbone.param_specs(run.model)  # what the mesh cannot split is refused first, as there
    check(run.config, run.experts, run.model.vocab)
    config, cfg, dtype = run.config, run.model, jnp.dtype(run.config.dtype)
    tuning, chosen = config.router, config.experts
    experts, (tuned, frozen) = table(run), student(run)
    teacher = parameters(run, chosen.teacher_dtype)
    found: dict[str, Step] = {}
    asked = "label", cfg, tuning.labels, dtype
    if chosen.teacher_topk:
        step = steps.make_top_k(cfg, chosen.teacher_topk, chosen.head_chunk, dtype)
        found["teacher"] = Step(
            step,
            (teacher, *rows(chosen.batch, run.row)),
            False,
            1,
            ("teacher", cfg, chosen.head_chunk, dtype),
            before=True,
        )
    if run.router is not None:
        tx = optim.make(tuning.optim, tuning.steps)
        choosing = phase(router_parameters(run), tx)
        if tuning.steps:
            label, batch = steps.make_label(cfg, tuning.labels, dtype), tokens(tuning.accum, tuning.batch, run.seq)
            if config.labelled:
                arguments = (teacher, experts, *rows(tuning.label_batch, run.seq))
                found["label"] = Step(label, arguments, False, 2, asked, before=True)
            else:
                label_all = jax.jit(lambda params, table, *pair: jax.lax.map(lambda m: label(params, table, *m), pair))
                arguments = (steps.join(tuned, frozen), experts, *batch.values())
                found["label"] = Step(label_all, arguments, False, 2, asked)
            shape = (tuning.accum, tuning.batch, run.seq, run.experts.experts)
            batch["target"] = shaped(shape, jnp.float32, jax.P(*MICRO, None))
            step = steps.make_router_step(run.router, cfg.rope_theta, tx, tuning.balance)
            found["router"] = Step(
                step, (choosing, batch), True, 1, ("router", cfg, run.router, tuning.optim, tuning.balance)
            )
        if chosen.steps:
            batch = tokens(chosen.accum, chosen.batch, run.row)
            route = steps.make_route(run.router, cfg.rope_theta)
            arguments = (choosing.params, batch["ids"], batch["segments"])
            found["route"] = Step(route, arguments, False, 1, ("route", cfg, run.router))
    if chosen.steps:
        tx = optim.make(chosen.optim, chosen.steps)
        head = HeadLoss(chosen.kd_weight, chosen.ce_weight, chosen.head_chunk)
        step = steps.make_expert_step(cfg, head, tx, dtype=dtype, remat=chosen.remat)
        batch = tokens(chosen.accum, chosen.batch, run.row) | {"route": route_of(run)}
        batch |= {"teacher": top_k(run)} if chosen.teacher_topk else {}
        arguments = (phase(tuned, tx), frozen, teacher if chosen.teacher else None, experts, batch)
        settings = ("experts", cfg, head, chosen.optim, dtype, chosen.remat)
        found["experts"] = Step(step, arguments, True, 4, settings)
    return found


def rows(count: int, seq: int) -> list[Any]:
    """ids and segments of `count` rows."""
    return [shaped((count, seq), jnp.int32, spec("batch", "seq")) for _ in range(2)]
