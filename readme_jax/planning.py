"""What a training run will need, from its config and a model's sizes alone: parameters, memory, arithmetic, levers.

Nothing is compiled and no weight is read: the steps are traced on shapes for the run's mesh, which need not be here.
Memory of a step is what stays on a device all through the run (`resident`) and, beside it, what the step's traced
program needs (`liveness`).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from readme_jax import abstract, flops, jaxprs, liveness, optim
from readme_jax.abstract import Run
from readme_jax.accelerators import Accelerator
from readme_jax.alternate import AlternateConfig
from readme_jax.config import ConfigError, ReadMeError, require
from readme_jax.models import backbone, router
from readme_jax.sharding import AXES, MeshConfig, batch_devices

GB = 1e9
MOST = 1 << 20  # devices; JAX gives up on meshes of a thousand times as many
TOP_K = 64  # of the teacher's tokens, where a lever keeps some


class PlanError(ReadMeError):
    """A run that does not fit the devices it is planned for."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs.

    weights: parameters at rest, of student, teacher and router, and the expert table. optimizer: their AdamW moments.
    activations: what the step computes of tokens. buffers: batches, gathered weights, gradients, updates.
    """

    weights: int
    optimizer: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.optimizer + self.activations + self.buffers


@dataclasses.dataclass(frozen=True)
class Work:
    """Tokens and FLOPs of a whole run, by phase: router, experts, refit, before them labels and the teacher's top-k."""

    tokens: dict[str, int]
    flops: dict[str, float]

    def hours(self, accelerator: Accelerator, devices: int, mfu: float) -> dict[str, float]:
        """Hours of each phase on `devices` that do the share `mfu` of their peak in useful FLOPs."""
        rate = accelerator.flops * mfu * devices
        return {name: each / rate / 3600 for name, each in self.flops.items()}


def abstract_mesh(config: MeshConfig, devices: int = 0) -> AbstractMesh:
    """The mesh of a run on `devices` that need not be here (0: as many as the axes say); ConfigError as `make_mesh`."""
    fixed = config.expert * config.model
    data = config.data or devices // fixed
    require(config.data > 0 or devices > 0, "mesh.data=0 takes all devices: say devices, or mesh.data")
    need = max(data, 1) * fixed
    said = f"mesh data={data} expert={config.expert} model={config.model} needs {need} devices"
    require(not devices or need == devices, f"{said}, devices={devices}")
    require(need <= MOST, f"{said}: more than {MOST} cannot be planned for")
    return AbstractMesh((data, config.expert, config.model), AXES, axis_types=(AxisType.Explicit,) * 3)


def parameters(run: Run) -> dict[str, int]:
    """Number of parameters: backbone, active (of it, for one token), router."""
    cfg = run.model
    count = _elements(backbone.abstract_params(cfg))
    idle = cfg.layer * (3 * cfg.embed + 2 * cfg.mlp_bias) * (cfg.mlp - run.experts.channels)
    alone = run.router is None
    chooser = {} if alone else router.abstract_params(run.router, cfg.vocab, run.experts.experts)
    return {"backbone": count, "active": count - idle, "router": _elements(chooser)}


def _elements(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(map(jaxprs.device_bytes, jax.tree.leaves(tree)))


def resident(run: Run, before: bool = False) -> tuple[int, int]:
    """Bytes of (weights, optimizer) that lie on a device of the current mesh all through training, or `before` it,
    while the model as carved is asked what the run will need.

    As train/alternate.py holds them. Before: the model as it was loaded, and the teacher where it has another dtype. In
    training: tuned and frozen part, router, both phases' optimizer state, and the teacher if distillation asks it; of
    the same dtype as the student, it shares the frozen part.
    """
    config, experts = run.config, run.config.experts
    teacher, fixed = _bytes(abstract.parameters(run, experts.teacher_dtype)), _bytes(abstract.table(run))
    if before:
        loaded = _bytes(abstract.parameters(run, config.loaded))
        return fixed + loaded + (teacher if experts.teacher_dtype != config.loaded else 0), 0
    student, frozen = abstract.student(run)
    tuned = abstract.phase(student, optim.make(experts.optim, experts.steps))
    weights, optimizer = fixed + _bytes(student) + _bytes(frozen), _bytes(tuned.opt_state)
    if experts.teacher:
        weights += teacher - (_bytes(frozen) if experts.teacher_dtype == experts.optim.params else 0)
    if run.router is not None:
        choosing = abstract.phase(abstract.router_parameters(run), optim.make(config.router.optim, config.router.steps))
        weights, optimizer = weights + _bytes(choosing.params), optimizer + _bytes(choosing.opt_state)
    return weights, optimizer


def checkpoint_bytes(run: Run) -> int:
    """Bytes of one checkpoint, of all hosts together: what is tuned, and its AdamW moments (`steps.Phase`)."""
    config, held = run.config, []
    held.append(abstract.phase(abstract.student(run)[0], optim.make(config.experts.optim, config.experts.steps)))
    if run.router is not None:
        tx = optim.make(config.router.optim, config.router.steps)
        held.append(abstract.phase(abstract.router_parameters(run), tx))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))


def checkpoint_seconds(config: AlternateConfig, hours: dict[str, float]) -> float:
    """Seconds between two checkpoints: the shorter of what `minutes` and `steps` ask for; with neither, the shorter
    phase, whose end is saved. hours: of each phase, all rounds together."""
    pace, plan = config.checkpoint, {"router": config.router.steps, "experts": config.experts.steps}
    lasts = {name: 3600 * hours[name] / config.rounds for name, steps in plan.items() if steps}
    asked = [60 * pace.minutes] if pace.minutes else []
    asked += [pace.steps * lasts[name] / plan[name] for name in lasts] if pace.steps else []
    return min(asked or lasts.values())


def _weight_shapes(run: Run) -> frozenset:
    """Sorted shapes of all parameters, and of one layer's."""
    leaves = jax.tree.leaves(abstract.parameters(run))
    leaves += [] if run.router is None else jax.tree.leaves(abstract.router_parameters(run))
    shapes = {leaf.shape for leaf in leaves}
    return frozenset(tuple(sorted(s)) for shape in shapes for s in (shape, shape[1:]) if len(s) > 1)


_known: dict[tuple, liveness.Usage] = {}


def memory(run: Run, platform: str) -> dict[str, Memory]:
    """Memory of every step of a run on one device of the current mesh, by the step's name in `abstract.train_steps`.

    platform: `tpu`, `gpu` or `cpu`, whose schedule differs (see `liveness.usage`).
    """
    shapes, found = _weight_shapes(run), {}
    held = {before: resident(run, before) for before in (False, True)}
    for name, step in abstract.train_steps(run).items():
        key = (platform, shapes, step.identity)
        if key not in _known:  # levers change one step and leave others as they are
            _known[key] = liveness.usage(step.trace().jaxpr, step.donated, platform=platform, weights=shapes)
        needs = _known[key]
        batch = _bytes(step.arguments[step.held :])
        found[name] = Memory(*held[step.before], needs.heap - needs.weights, batch + needs.weights)
    if run.config.experts.refit:
        found["refit"] = _refit_memory(run, *held[False])
    return found


def _refit_memory(run: Run, weights: int, optimizer: int) -> Memory:
    """Of `refit`, what lasts over its layers: two residual streams of all records, sums and factor, w_down twice."""
    cfg, phase = run.model, run.config.experts
    tokens = phase.refit * phase.batch * phase.accum * run.row // batch_devices()
    down = _bytes(abstract.parameters(run, phase.optim.params)["layers"]["w_down"])
    used = run.used or cfg.mlp
    return Memory(weights + 2 * down, optimizer, 8 * tokens * cfg.embed, 8 * used * (used + cfg.embed))


def peak(found: dict[str, Memory]) -> tuple[str, Memory]:
    """The step that needs most, and what it needs."""
    name = max(found, key=lambda n: found[n].total)
    return name, found[name]


def work(run: Run, records: int = 0) -> Work:
    """Tokens and FLOPs of the run (`flops`: what runs, recomputation left out).

    records: train records there are, which bounds what is labelled before the loop; 0: unknown.
    """
    config, cfg, experts = run.config, run.model, run.experts
    tokens, needed = {}, {}
    for name, phase, seq in (("router", config.router, run.seq), ("experts", config.experts, run.row)):
        tokens[name] = config.rounds * phase.steps * phase.batch * phase.accum * seq
        each = flops.train_flops_per_token(cfg, experts, phase, seq, router=run.router, used=run.used or None)
        needed[name] = tokens[name] * each
    if config.experts.refit:
        tokens["refit"] = config.experts.refit * config.experts.batch * config.experts.accum * run.row
        needed["refit"] = tokens["refit"] * flops.refit_flops(cfg, run.row, run.used or cfg.mlp)
    asked = {}  # before the loop, each record once
    if config.labelled:
        asked["labels"] = ("router", config.router.records, flops.label_flops(cfg, experts.experts, run.seq))
    if config.experts.teacher_topk:
        dense = flops.layers(cfg, run.row, cfg.mlp).total + flops.head_flops(cfg)
        asked["teacher"] = ("experts", 0, dense)
    for name, (phase, most, each) in asked.items():
        tokens[name] = run.seq * min([tokens[phase] // run.seq, *(n for n in (records, most) if n)])
        needed[name] = tokens[name] * each
    return Work(tokens, needed)


# ---- levers -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lever:
    """A change that makes a run smaller. setting: how it is written in the config; total: bytes a device behind it."""

    setting: str
    run: Run
    total: int


def _changes(run: Run, more: bool) -> Iterator[tuple[str, AlternateConfig]]:
    """Settings that may save memory and leave what is learnt as it is, but for rounding and for what a teacher's TOP_K
    likeliest tokens leave out. more: more devices too."""
    config, replace = run.config, dataclasses.replace
    tuning, chosen, mesh = config.router, config.experts, config.mesh
    if chosen.remat == "none":
        yield "experts.remat=full", replace(config, experts=replace(chosen, remat="full"))
    for setting in ("params", "mu_dtype"):
        if getattr(chosen.optim, setting) == "float32":
            own = replace(chosen.optim, **{setting: "bfloat16"})
            yield f"experts.optim.{setting}=bfloat16", replace(config, experts=replace(chosen, optim=own))
    if config.asks_teacher and chosen.teacher_dtype == "float32":
        yield "experts.teacher_dtype=bfloat16", replace(config, experts=replace(chosen, teacher_dtype="bfloat16"))
    if chosen.teacher and run.model.vocab > TOP_K:
        yield f"experts.teacher_topk={TOP_K}", replace(config, experts=replace(chosen, teacher_topk=TOP_K))
    if config.dtype == "float32":
        yield "dtype=bfloat16", replace(config, dtype="bfloat16")
    if chosen.steps and chosen.batch % 2 == 0:
        half = replace(chosen, batch=chosen.batch // 2, accum=chosen.accum * 2)
        yield f"experts.batch={half.batch} experts.accum={half.accum}", replace(config, experts=half)
    if tuning.steps and tuning.batch % 2 == 0:
        half = replace(tuning, batch=tuning.batch // 2, accum=tuning.accum * 2)
        yield f"router.batch={half.batch} router.accum={half.accum}", replace(config, router=half)
    if tuning.steps and tuning.label_batch % 2 == 0:
        half = replace(tuning, label_batch=tuning.label_batch // 2)
        yield f"router.label_batch={half.label_batch}", replace(config, router=half)
    if chosen.head_chunk > 32:
        half = replace(chosen, head_chunk=chosen.head_chunk // 2)
        yield f"experts.head_chunk={half.head_chunk}", replace(config, experts=half)
    # Separate experts are split over `expert` and `model` alone: there `data` saves little.
    axes = ("expert", "model") if chosen.way == "parallel" else ("model",)
    if more:
        for axis in ("data", *axes):
            other = replace(mesh, **{axis: 2 * getattr(mesh, axis)})
            yield f"mesh.{axis}={getattr(other, axis)}", replace(config, mesh=other)
    elif mesh.data % 2 == 0:
        for axis in axes:
            other = replace(mesh, data=mesh.data // 2, **{axis: 2 * getattr(mesh, axis)})
            yield f"mesh.data={other.data} mesh.{axis}={getattr(other, axis)}", replace(config, mesh=other)


def levers(run: Run, platform: str, now: int, more: bool) -> list[Lever]:
    """What saves memory, the biggest first. now: bytes a device without; more: by more devices too.

    run.config.mesh.data must be said.
    """
    found = []
    for setting, config in _changes(run, more):
        changed = dataclasses.replace(run, config=config)
        try:
            with jax.sharding.use_abstract_mesh(abstract_mesh(config.mesh)):
                found.append(Lever(setting, changed, peak(memory(changed, platform))[1].total))
        except ConfigError:  # the batch or the channels do not divide
            continue
    return sorted((lever for lever in found if lever.total < now), key=lambda lever: lever.total)


def way_to_fit(run: Run, platform: str, now: int, room: float, more: bool, most: int = 4) -> list[Lever]:
    """The biggest lever, then the biggest beside it, until a device needs at most `room` bytes: up to `most` of them.

    now: bytes a device without; more: levers may ask for more devices.
    """
    path: list[Lever] = []
    while len(path) < most and (not path or path[-1].total > room):
        run, now = (path[-1].run, path[-1].total) if path else (run, now)
        found = levers(run, platform, now, more)
        if not found:
            break
        path.append(found[0])
    return path
