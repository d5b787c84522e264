"""What the alternating training program needs beside the steps: config, order of phases, what rules a run out."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import artifacts, distributed, hf, placement
from readme_jax.checkpoint import CheckpointConfig
from readme_jax.config import ExpertConfig, ModelConfig, RouterConfig, free, require, to_dict
from readme_jax.data import Records, open_records
from readme_jax.distributed import HostsConfig
from readme_jax.labels import LabelConfig
from readme_jax.loop import ProfileConfig
from readme_jax.metrics import extra
from readme_jax.models import router
from readme_jax.models.backbone import Params, Remat
from readme_jax.optim import OptimConfig, cast
from readme_jax.sharding import MeshConfig, batch_devices, model_devices
from readme_jax.steps import Phase, Tuned, Way, split_tuned


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
    """Whose activations are labelled: the model in `model` as it is (labels are computed once and cached), or the
    tuned weights run densely (reference)."""
    records: int = 0
    """Tune on this many records only, equally many of each domain, several times over if there are more steps: labels
    cost a dense forward pass each. 0: all."""
    label_batch: int = 1
    """Records of one labelling pass; a multiple of the mesh's batch devices. With teacher=current a microbatch is
    labelled at a time, and this must stay 1."""
    balance: float = 0.0
    """Weight of a load-balance term (`losses.balance_loss`) beside the labels' loss, in nats. 0: none (paper)."""

    def __post_init__(self):
        require(0 <= self.balance < math.inf, f"balance={self.balance} must be finite and at least 0")
        require(not self.balance or self.steps > 0, f"balance={self.balance} has no meaning with steps=0")
        cached = self.teacher == "original"
        require(self.label_batch >= 1, f"label_batch={self.label_batch} must be at least 1")
        require(cached or self.label_batch == 1, f"label_batch={self.label_batch} has no meaning with teacher=current")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertPhase:
    """Expert tuning: the router frozen (paper: 200 steps of 128 x 4096, lr 5e-5, next-token loss)."""

    steps: int
    """Optimizer steps in each round; 0 leaves the backbone as it is."""
    batch: int
    """Rows of one microbatch."""
    accum: int = 1
    """Microbatches of one optimizer step."""
    cut: int = 1
    """Rows that a record is cut into, equally long; a row sees nothing of the one before. Smaller steps, so that few
    tokens are many steps. 1: records are rows."""
    optim: OptimConfig = OptimConfig(lr=5e-5)
    """Optimizer."""
    kd_weight: float = 1.0
    """Weight of forward KL to the model in `model`, all its channels on, frozen (temperature 1)."""
    ce_weight: float = 0.0
    """Weight of the next-token loss (paper: kd_weight 0, ce_weight 1)."""
    refit: int = 0
    """Before the first step, w_down is solved in closed form (`refit.py`) on this many batches of calibration records
    (the first of the train text): of text that is trained on right after, little would be left to learn. 0: no."""
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
        require(self.cut >= 1, f"cut={self.cut} must be at least 1")
        require(self.refit >= 0, f"refit={self.refit} must not be negative")
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
    """Carved model folder (result of `carve`, or of an earlier `alternate`): where training starts, and, run densely,
    the teacher. To go on from tuned weights with the original teacher, give the first run more rounds."""
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
            self.router.steps + self.experts.steps + self.experts.refit > 0,
            "router.steps, experts.steps and experts.refit are all 0: nothing to train",
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

    def refits(self, tick: int) -> bool:
        """True in front of the global step that `experts.refit` comes before: the experts' first or, without any, at
        the end."""
        return self.experts.refit > 0 and tick == (self.router.steps if self.experts.steps else self.total)

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


def student_of(model: Params, teacher: Params, experts: ExpertPhase) -> tuple[Params, Params]:
    """(tuned, frozen) parts of a placed backbone in the dtype of the phase's parameters.

    The tuned part is donated to the first step: it is a copy where it would be the teacher's arrays, and `model` itself
    where there is no teacher ({}) any more, or one of another dtype; `model` is then gone.
    """
    student, frozen = split_tuned(cast(model, experts.optim.params), experts.tuned)
    shared = {id(leaf) for leaf in jax.tree.leaves(teacher)}
    return jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in shared else leaf, student), frozen


def first_records(records: dict[str, Records], count: int) -> dict[str, Records]:
    """The first records of every domain, `count` in all (rounded up to a whole number a domain); 0: all of them."""
    each = -(-count // len(records))
    return {name: Records(r.ids[:each], r.segments[:each]) if count else r for name, r in records.items()}


def check(config: AlternateConfig, experts: ExpertConfig | None, vocab: int) -> ExpertConfig:
    """What the current mesh and the carved model (vocab: its tokens) rule out, ConfigError before any work; the model's
    experts."""
    for name, phase in (("router", config.router), ("experts", config.experts)):
        fits = phase.batch % batch_devices() == 0 or not _reads(phase)
        require(fits, f"{name}.batch={phase.batch} must be a multiple of the mesh's {batch_devices()} batch devices")
    way, one_device = config.experts.way, batch_devices() * model_devices() == 1
    require(one_device or way != "grouped", "experts.way=grouped runs on one device: set mesh.data=1")
    require(experts is not None, f"model={config.model} is not carved; run `readme-jax carve` first")
    assert experts is not None
    alone, tied = experts.experts == 1, experts.storage == "tied"
    choice = not alone or config.router.steps == 0
    require(choice, "router.steps must be 0 for a model with one expert: there is no choice")
    require(tied or config.experts.kd_weight == 0, "kd_weight needs the dense teacher, which separate storage has not")
    require(tied or not config.experts.refit, "experts.refit needs the dense model, which separate storage has not")
    require(tied or config.router.steps == 0, "router.steps needs labels of a dense run; separate storage has none")
    require(not tied or way != "parallel", "experts.way=parallel needs separate experts: `readme-jax separate`")
    if config.labelled:
        size = config.router.label_batch
        require(size % batch_devices() == 0, f"router.label_batch={size} must be a multiple of {batch_devices()}")
    k = config.experts.teacher_topk
    require(k <= vocab, f"experts.teacher_topk={k}, the vocabulary has {vocab} tokens")
    return experts


def _reads(phase: RouterPhase | ExpertPhase) -> bool:
    """True when a phase takes batches."""
    return phase.steps > 0 or (isinstance(phase, ExpertPhase) and phase.refit > 0)


def records_of(config: AlternateConfig, vocab: int) -> dict[str, dict[str, Records]]:
    """The rows of each phase, by its name, and of `refit`. ConfigError where they cannot be cut or are too few,
    DataError where there are none."""
    records = open_records(config.data, "train", vocab)
    pools = {"router": first_records(records, config.router.records)}
    pools["experts"] = {name: own.cut(config.experts.cut) for name, own in records.items()}
    for name, phase in (("router", config.router), ("experts", config.experts)):
        there = sum(map(len, pools[name].values()))
        fits = not _reads(phase) or phase.batch * phase.accum <= there
        require(fits, f"{name}.batch={phase.batch}, {name}.accum={phase.accum}: the phase has only {there} rows")
    if (tuning := config.experts).refit:
        records = open_records(config.data, "calibration", vocab)
        pools["refit"] = {name: own.cut(tuning.cut) for name, own in records.items()}
        there, asked = sum(map(len, pools["refit"].values())), tuning.refit * tuning.batch * tuning.accum
        require(asked <= there, f"experts.refit={tuning.refit}: {asked} rows, calibration has only {there}")
    return pools


def check_extras(config: AlternateConfig) -> None:
    """ConfigError when a library that is to log is missing on process 0, which logs."""

    def installed() -> None:
        for name, asked in (("tensorboard", config.tensorboard), ("wandb", config.wandb)):
            if asked:
                extra(name)

    distributed.on_main(installed)


def check_processes(config: AlternateConfig) -> None:
    """ConfigError on every process of a run when one was started with another config or has other versions: each would
    train on its own terms. How it finds the others is its own affair."""
    if distributed.count() == 1:
        return
    fields = to_dict(config)
    fields["hosts"] = {key: value for key, value in fields["hosts"].items() if key.endswith("timeout")}
    told = distributed.everyone({**fields, "versions": artifacts.versions()})
    for process, other in enumerate(told):
        name, first, here = artifacts.innermost("", told[0], other)
        same = "every process needs the same config and versions"
        require(first == here, f"{name}={here!r} in process {process}, {first!r} in process 0: {same}")


def fresh_router(config: AlternateConfig, cfg: ModelConfig, experts: ExpertConfig) -> tuple[RouterConfig, Params]:
    """Size and parameters of an untrained router; ConfigError when no step would train it."""
    require(config.router.steps > 0, f"model={config.model} has no router and router.steps is 0")
    embedding_VD = hf.read_top(hf.Reader(config.model), cfg)["embedding"]  # mapped: its first columns are read
    params = router.init_params(config.router.shape, embedding_VD, experts.experts, config.seed)
    return config.router.shape, params


def write(
    config: AlternateConfig,
    work: artifacts.Work,
    params: Params,
    experts: ExpertConfig,
    table_LEC: np.ndarray,
    router_cfg: RouterConfig | None,
    phases: dict[str, Phase],
) -> None:
    """The tuned model folder in place of the training state."""
    router_params = phases["router"].params if "router" in phases else None
    cfg, _, _ = hf.read_config(config.model)
    placement.save_sharded(work.path, cfg, params, experts=table_LEC, router=router_params)
    if not distributed.is_main():
        return
    base = json.loads((config.model / "config.json").read_text())
    hf_config = hf.config_to_hf(cfg, base, experts=experts, router=router_cfg, dtype=config.experts.optim.params)
    artifacts.write_text(work.path / "config.json", json.dumps(hf_config, indent=2) + "\n")
    hf.copy_side_files(config.model, work.path)
    work.scratch.append("checkpoints")


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
