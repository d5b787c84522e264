"""What the alternating training program needs beside the steps: config, order of phases, cache of the teacher."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import artifacts, distributed
from readme_jax.checkpoint import CheckpointConfig
from readme_jax.config import ExpertConfig, RouterConfig, Stopped, free, require
from readme_jax.data import Batches, Records
from readme_jax.distributed import HostsConfig
from readme_jax.labels import LabelConfig
from readme_jax.loop import ProfileConfig, whole
from readme_jax.losses import TopK
from readme_jax.metrics import Pace, progress
from readme_jax.models.backbone import Params, Remat
from readme_jax.optim import OptimConfig, cast
from readme_jax.sharding import MeshConfig, batch_devices, model_devices, put, spec
from readme_jax.steps import Tuned, Way, make_load, plan, split_tuned


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterPhase:
    """Router tuning: the backbone frozen, distillation from labels (paper: 100 steps of 64 x 4096, lr 5e-4)."""

    steps: int
    """Optimizer steps in each round; 0 leaves the router as it is (or, with one expert, there is none)."""
    batch: int
    """Records of one microbatch."""
    accum: int = 1
    """Microbatches of one optimizer step."""
    optim: OptimConfig = OptimConfig(lr=5e-4)
    """Optimizer."""
    shape: RouterConfig = RouterConfig()
    """Size of a fresh router; not used when the model folder already has one."""
    labels: LabelConfig = LabelConfig()
    """Labels the router is tuned on."""
    teacher: Literal["original", "current"] = "original"
    """Whose activations are labelled: the model as carved (labels are computed once and cached), or the tuned weights
    run densely (reference)."""
    records: int = 0
    """Tune on this many records only, equally many of each domain, several times over if there are more steps: labels
    cost a dense forward pass each. 0: all."""
    label_batch: int = 1
    """Records of one labelling pass; a multiple of the mesh's batch devices. With teacher=current a microbatch is
    labelled at a time, and this must stay 1."""

    def __post_init__(self):
        cached = self.teacher == "original"
        require(self.label_batch >= 1, f"label_batch={self.label_batch} must be at least 1")
        require(cached or self.label_batch == 1, f"label_batch={self.label_batch} has no meaning with teacher=current")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertPhase:
    """Expert tuning: the router frozen (paper: 200 steps of 128 x 4096, lr 5e-5, next-token loss)."""

    steps: int
    """Optimizer steps in each round; 0 leaves the backbone as it is."""
    batch: int
    """Records of one microbatch."""
    accum: int = 1
    """Microbatches of one optimizer step."""
    optim: OptimConfig = OptimConfig(lr=5e-5)
    """Optimizer."""
    kd_weight: float = 1.0
    """Weight of forward KL to the frozen dense model (temperature 1)."""
    ce_weight: float = 0.0
    """Weight of the next-token loss (paper: kd_weight 0, ce_weight 1)."""
    tuned: Tuned = "all"
    """`all`: the whole backbone (reference). `ffn`: gate, up and down projections only (paper's text)."""
    way: Way = "masked"
    """How experts run: `masked` all used channels times the token's mask, `grouped` one matmul an expert on one device,
    `parallel` separate experts on the mesh's `expert` axis, tokens sent to them."""
    remat: Remat = "none"
    """`full` recomputes activations in the backward pass: less memory, a third more time. `names` does too, but keeps
    the tokens that `parallel` experts were sent: they are not sent again (for the other ways it is `full`)."""
    head_chunk: int = 128
    """Positions whose logits exist at once."""
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen dense teacher on the devices: 4 or 2 bytes a parameter, while kd_weight or labels need it;
    0 bytes otherwise. With dtype=bfloat16 both say the same: the teacher computes in that anyway."""
    teacher_topk: int = 0
    """Distil from this many of the teacher's likeliest tokens and one class for all others (`losses.head_loss`),
    computed once before training and kept on disk: 6 bytes each (8 above a vocabulary of 65536) and 4 for the rest, a
    token. The teacher is then not on the devices in the expert phase: 0 bytes a parameter. 0: all tokens, no disk."""

    def __post_init__(self):
        weights = (self.kd_weight, self.ce_weight)
        require(min(weights) >= 0 and sum(weights) > 0, f"kd_weight={weights[0]}, ce_weight={weights[1]}: not both 0")
        require(self.head_chunk >= 1, f"head_chunk={self.head_chunk} must be at least 1")
        require(self.teacher_topk >= 0, f"teacher_topk={self.teacher_topk} must not be negative")
        distilled = self.kd_weight > 0 and self.steps > 0
        needs = f"teacher_topk={self.teacher_topk} needs kd_weight > 0 and steps > 0: nothing is distilled"
        require(distilled or not self.teacher_topk, needs)

    @property
    def teacher(self) -> bool:
        """True when the dense teacher is on the devices while experts are tuned."""
        return self.kd_weight > 0 and self.steps > 0 and not self.teacher_topk


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlternateConfig:
    """One run of alternating router and expert tuning."""

    model: Path
    """Carved model folder (result of `carve`, or of an earlier `alternate`)."""
    data: Path
    """Result of `data`; its train records are read."""
    out: Path
    """Folder to write the tuned model to."""
    rounds: int
    """Rounds of router steps followed by expert steps (paper: 8)."""
    router: RouterPhase
    """Router tuning."""
    experts: ExpertPhase
    """Expert tuning."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the backbone; that of parameters and optimizer state is `optim.params` and `optim.mu_dtype`."""
    mesh: MeshConfig = free(MeshConfig())
    """Devices on each mesh axis."""
    seed: int = 0
    """Seed of data order and router initialisation."""
    checkpoint: CheckpointConfig = free(CheckpointConfig())
    """When an unfinished run saves itself; a phase's end is always saved."""
    hosts: HostsConfig = free(HostsConfig())
    """Processes that train together, one a host; they share the file system that `out` lies on."""
    tensorboard: bool = free(False)
    """Also write TensorBoard events into the result folder."""
    wandb: str = free("")
    """Project of Weights & Biases to log to as well; empty: none."""
    profile: ProfileConfig = free(ProfileConfig())
    """Steps to trace with the JAX profiler, into `profile` of the result folder."""

    def __post_init__(self):
        require(self.rounds >= 1, f"rounds={self.rounds} must be at least 1")
        require(self.seed >= 0, f"seed={self.seed} must not be negative")
        require(self.router.records >= 0, f"router.records={self.router.records} must not be negative")
        for name, phase in (("router", self.router), ("experts", self.experts)):
            require(phase.steps >= 0, f"{name}.steps={phase.steps} must not be negative")
            require(phase.batch >= 1 and phase.accum >= 1, f"{name}: batch and accum must be at least 1")
        require(
            self.router.steps + self.experts.steps > 0, "router.steps and experts.steps are both 0: nothing to train"
        )
        kind = self.experts.teacher_dtype
        require(
            self.asks_teacher or kind == "float32",
            f"experts.teacher_dtype={kind} has no meaning: nothing asks the teacher",
        )

    @property
    def labelled(self) -> bool:
        """True when router labels of the carved model are computed once and cached."""
        return self.router.steps > 0 and self.router.teacher == "original"

    @property
    def asks_teacher(self) -> bool:
        """True when anything needs the dense teacher, before training or during it."""
        return self.labelled or self.experts.teacher or self.experts.teacher_topk > 0

    @property
    def loaded(self) -> Literal["float32", "bfloat16"]:
        """Dtype to load the model in: of the student and its teacher, the wider one."""
        experts = self.experts
        asked = self.asks_teacher
        return (
            "float32" if "float32" in (experts.optim.params, experts.teacher_dtype if asked else None) else "bfloat16"
        )

    @property
    def total(self) -> int:
        """Steps of all rounds and both phases."""
        return self.rounds * (self.router.steps + self.experts.steps)

    def at(self, tick: int) -> tuple[Literal["router", "experts"], int]:
        """(phase, step within that phase over all rounds) of the global step `tick`."""
        number, within = divmod(tick, self.router.steps + self.experts.steps)
        if within < self.router.steps:
            return "router", number * self.router.steps + within
        return "experts", number * self.experts.steps + within - self.router.steps

    def ends_phase(self, tick: int) -> bool:
        """True when the step after `tick` belongs to another phase, or there is none."""
        return tick + 1 == self.total or self.at(tick)[0] != self.at(tick + 1)[0]


def needed_records(batches: Batches, steps: int) -> np.ndarray:
    """Sorted ids of all records that the first `steps` batches hold."""
    seen = [batches.index(step).ravel() for step in range(steps)]
    return np.unique(np.concatenate(seen)) if seen else np.zeros(0, np.int32)


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
        self._ahead: tuple[int, dict, jax.Array, jax.Array] | None = None

    def take(self, tick: int, params: Any, last: bool) -> tuple[dict, jax.Array]:
        """The batch of step `tick`, and the share of its tokens that each expert gets, float32 [E].

        params: the router's; after the step that is `last` they may change.
        """
        batch, expert_ABT, load_E = self._ask(tick, params)
        if self._way == "masked":
            return batch | {"route": plan(expert_ABT, self._experts, "masked", put=lambda array: array)}, load_E
        self._ahead = None if last else (tick + 1, *self._ask(tick + 1, params))
        with self._pace.waiting("device"):
            expert_ABT = jax.device_get(expert_ABT)
        return batch | {"route": plan(expert_ABT, self._experts, self._way, put)}, load_E

    def _ask(self, tick: int, params: Any) -> tuple[dict, jax.Array, jax.Array]:
        if self._ahead is not None and self._ahead[0] == tick:
            return self._ahead[1:]
        batch = self._place(tick)
        ids_ABT, segments_ABT = batch["ids"], batch["segments"]
        with self._pace.calling():
            expert_ABT = self._first(ids_ABT) if self._route is None else self._route(params, ids_ABT, segments_ABT)
            load_E = self._load(expert_ABT, segments_ABT)
            return batch, expert_ABT if self._way == "masked" else whole(expert_ABT), load_E


def student_of(model: Params, teacher: Params, experts: ExpertPhase) -> tuple[Params, Params]:
    """(tuned, frozen) parts of a placed backbone in the dtype of the phase's parameters.

    The tuned part is donated to the first step: it is a copy where it would be the teacher's arrays, and `model` itself
    where there is no teacher ({}) any more, or one of another dtype; `model` is then gone.
    """
    student, frozen = split_tuned(cast(model, experts.optim.params), experts.tuned)
    shared = {id(leaf) for leaf in jax.tree.leaves(teacher)}
    return jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in shared else leaf, student), frozen


class RecordCache:
    """What a frozen model says of records, computed once in a fixed order and kept on disk: named arrays, a row of each
    for every record.

    The order and the batches of the pass do not depend on where a killed run stopped, so a resumed run sees bit-equal
    arrays. Process 0 writes, all read. fields: name -> (shape of a record's row, dtype); a field is
    `<folder>/<name>.<field>.npy`.
    """

    def __init__(self, folder: Path, name: str, ids_N: np.ndarray, fields: dict[str, tuple[tuple[int, ...], Any]]):
        self.ids_N, self.fields, self._mark = ids_N, fields, folder / f"{name}.json"
        self._paths = {field: folder / f"{name}.{field}.npy" for field in fields}
        self.files = [path.name for path in (self._mark, *self._paths.values())]
        self.done = distributed.on_main(self._begin)
        self._open("r+" if distributed.is_main() else "r")

    def _begin(self) -> int:
        if all(path.is_file() for path in (self._mark, *self._paths.values())):
            return json.loads(self._mark.read_text())["records"]
        for field, (shape, dtype) in self.fields.items():
            rows = (len(self.ids_N), *shape)
            np.lib.format.open_memmap(self._paths[field], mode="w+", dtype=dtype, shape=rows)
            _reserve(self._paths[field])
        return 0

    def _open(self, mode: Literal["r", "r+"]) -> None:
        self._arrays = {field: np.lib.format.open_memmap(path, mode=mode) for field, path in self._paths.items()}

    def fill(
        self,
        batch: int,
        compute: Callable[[np.ndarray], dict[str, np.ndarray]],
        saved_every: int = 32,
        *,
        stop: Callable[[], str] = lambda: "",
    ) -> None:
        """Compute what is missing: compute(ids_B) -> {field: [B, ...]} for `batch` record ids at a time, the last ones
        repeated.

        Stopped, with what is done kept, once `stop` of any process gives a reason.
        """
        for number, start in enumerate(range(self.done, len(self.ids_N), batch), 1):
            ids_B = self.ids_N[start : start + batch]
            values = compute(np.pad(ids_B, (0, batch - len(ids_B)), mode="edge"))
            self.done = start + len(ids_B)
            asked = [why for why in distributed.everyone(stop()) if why]
            if distributed.is_main():
                for field, array in self._arrays.items():
                    array[start : self.done] = values[field][: len(ids_B)]
                if number % saved_every == 0 or self.done == len(self.ids_N) or asked:
                    for array in self._arrays.values():
                        array.flush()
                    artifacts.write_text(self._mark, json.dumps({"records": self.done}))
            if asked:
                raise Stopped(f"stopped by {asked[0]}; {self.done} of {len(self.ids_N)} records are done")
        distributed.barrier()
        self._open("r")  # anew: with all that process 0 wrote

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of record ids of any shape: {field: [*index.shape, ...]}; no other row is read."""
        at = np.searchsorted(self.ids_N, index)
        return {field: array[at] for field, array in self._arrays.items()}


def ask_teacher(
    config: AlternateConfig,
    folder: Path,
    batches: dict[str, Batches],
    sizes: tuple[int, int],
    label: Callable[[jax.Array, jax.Array], jax.Array],
    top_k: Callable[[jax.Array, jax.Array], TopK],
    stop: Callable[[], str],
) -> dict[str, RecordCache]:
    """Caches of what the run needs the frozen model to say, complete. sizes: of the vocabulary, and experts.

    `labels`: target, float32 [T, E], by label(ids_BT, segments_BT). `top_k`: the fields of TopK, the ids in 2 bytes
    where the vocabulary fits. ConfigError when the vocabulary has not K tokens. stop: see `RecordCache.fill`.
    """
    (vocab, experts), caches = sizes, {}
    if config.labelled:
        size, own = config.router.label_batch, batches["router"]
        ids_N = needed_records(own, config.rounds * config.router.steps)
        caches["labels"] = RecordCache(folder, "labels", ids_N, {"target": ((own.seq, experts), np.float32)})
        _fill(caches["labels"], "label", own, size, lambda *rows: {"target": label(*rows)}, stop)
    if k := config.experts.teacher_topk:
        require(k <= vocab, f"experts.teacher_topk={k}, the vocabulary has {vocab} tokens")
        own, token = batches["experts"], np.uint16 if vocab <= 1 << 16 else np.int32
        ids_N, seq = needed_records(own, config.rounds * config.experts.steps), own.seq
        fields = {"logp": ((seq, k), np.float32), "token": ((seq, k), token), "rest": ((seq,), np.float32)}
        caches["top_k"] = RecordCache(folder, "top_k", ids_N, fields)
        _fill(caches["top_k"], "teacher", own, config.experts.batch, lambda *rows: vars(top_k(*rows)), stop)
    return caches


def _fill(
    cache: RecordCache,
    name: str,
    batches: Batches,
    size: int,
    run: Callable[..., dict[str, jax.Array]],
    stop: Callable[[], str],
) -> None:
    """Complete a cache under a bar: run(ids_BT, segments_BT) -> {field: [B, T, ...]} for `size` records at a time."""
    seq, silent = batches.seq, not distributed.is_main()
    with progress(len(cache.ids_N) * seq, name, initial=cache.done * seq, silent=silent) as bar:

        def rows_of(index_B: np.ndarray) -> dict[str, np.ndarray]:
            rows = batches.take(index_B)
            bar.update(rows["ids"].size)
            return jax.device_get(whole(run(*(put(rows[key], spec("batch", "seq")) for key in ("ids", "segments")))))

        cache.fill(size, rows_of, stop=stop)


def _reserve(path: Path) -> None:
    """Take the disk blocks of a sparse file now: on a full disk a later write to the map would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def first_records(records: dict[str, Records], count: int) -> dict[str, Records]:
    """The first records of every domain, `count` in all (rounded up to a whole number a domain); 0: all of them."""
    each = -(-count // len(records))
    return {name: Records(r.ids[:each], r.segments[:each]) if count else r for name, r in records.items()}


def check(config: AlternateConfig, experts: ExpertConfig | None) -> ExpertConfig:
    """What the current mesh and the carved model rule out, ConfigError before any work; the model's experts."""
    for name, phase in (("router", config.router), ("experts", config.experts)):
        fits = phase.batch % batch_devices() == 0 or not phase.steps
        require(fits, f"{name}.batch={phase.batch} must be a multiple of the mesh's {batch_devices()} batch devices")
    way, one_device = config.experts.way, batch_devices() * model_devices() == 1
    require(one_device or way != "grouped", "experts.way=grouped runs on one device: set mesh.data=1")
    require(experts is not None, f"model={config.model} is not carved; run `readme-jax carve` first")
    assert experts is not None
    alone, tied = experts.experts == 1, experts.storage == "tied"
    choice = not alone or config.router.steps == 0
    require(choice, "router.steps must be 0 for a model with one expert: there is no choice")
    require(tied or config.experts.kd_weight == 0, "kd_weight needs the dense teacher, which separate storage has not")
    require(tied or config.router.steps == 0, "router.steps needs labels of a dense run; separate storage has none")
    require(not tied or way != "parallel", "experts.way=parallel needs separate experts: `readme-jax separate`")
    if config.router.steps and config.router.teacher == "original":
        size = config.router.label_batch
        require(size % batch_devices() == 0, f"router.label_batch={size} must be a multiple of {batch_devices()}")
    return experts


@contextlib.contextmanager
def building(config: AlternateConfig, parents: dict[str, Path]) -> Iterator[artifacts.Work]:
    """`artifacts.building` for all processes of a run: process 0 makes the folder and finishes it, all work in it."""
    with contextlib.ExitStack() as stack:
        made: list[artifacts.Work] = []

        def begin() -> str:
            made.append(stack.enter_context(artifacts.building(config.out, "alternate", config, parents)))
            return str(made[0].path)

        path = distributed.on_main(begin)
        yield made[0] if made else artifacts.Work(Path(path), {})
