"""A run of alternating training on one device, and the loops over its steps that `train.py` times.

In: sizes and options. Out: seconds of a step, by way. The parts are the training program's own, put together as
train/alternate.py does, but for checkpoints; only the data and, but for SmolLM2, the weights are drawn.
"""

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import flops, hf, optim, planning, sources, steps
from readme_jax.abstract import Run
from readme_jax.accelerators import peak_flops
from readme_jax.alternate import AlternateConfig, ExpertPhase, RouterPhase, student_of
from readme_jax.config import ExpertConfig, ModelConfig, RouterConfig
from readme_jax.data import Batches, Records
from readme_jax.distributed import Agreement
from readme_jax.loop import MICRO, Ahead, PhaseFigures, Timer, Watch, place_batch
from readme_jax.losses import HeadLoss
from readme_jax.metrics import Metrics, Pace, read_metrics
from readme_jax.models import backbone, experts, router
from readme_jax.optim import OptimConfig
from readme_jax.routed import RoutedBatches
from readme_jax.sharding import MeshConfig, put
from readme_jax.teacher import RecordCache

LONG = 1_000_000  # steps of a phase of the run that the turns are cut from: its learning rate stays where it is
EXPERTS, RECORDS, LR, CE = 7, 64, 1e-4, 0.1
SIZES = {  # model: tokens of a record, records of a step
    "tiny": (64, 4),
    "smollm2": (512, 1),
    "llama-1b": (2048, 4),
}
RANDOM = {
    "tiny": ModelConfig(
        family="llama", vocab=384, embed=64, mlp=96, layer=2, head=4, kv_head=2, head_dim=16, norm_eps=1e-5,
        rope_theta=10000.0, max_position=512, tied=True,
    ),
    "llama-1b": ModelConfig(  # the sizes of TinyLlama: 1.1 B parameters
        family="llama", vocab=32000, embed=2048, mlp=5632, layer=22, head=32, kv_head=4, head_dim=64, norm_eps=1e-5,
        rope_theta=10000.0, max_position=2048, tied=False,
    ),
}  # fmt: skip


class Clock:
    """Starts when made. `each` gives wall and CPU seconds of one of `count` steps; CPU is of all threads together."""

    def __init__(self):
        self._wall, self._cpu, self._thread = time.perf_counter(), time.process_time(), time.thread_time()

    def each(self, count: int) -> dict[str, float]:
        """`seconds` and `cpu` of a step, and `thread_share`, of the wall time: when the calling thread was at work."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        thread = time.thread_time() - self._thread
        return {"seconds": wall / count, "cpu": cpu / count, "thread_share": thread / wall}


def draw_model(name: str) -> tuple[Path | None, ModelConfig, backbone.Params]:
    """(folder where there is one, sizes, float32 parameters of the host) of a model of SIZES."""
    if name != "smollm2":
        return None, RANDOM[name], hf.init_params(RANDOM[name])
    folder = sources.resolve_model(sources.FALLBACK_MODEL)
    return folder, hf.read_config(folder)[0], hf.load_params(folder, dtype=np.float32)[0]


def expert_sizes(cfg: ModelConfig, rng: np.random.Generator) -> tuple[ExpertConfig, np.ndarray]:
    """Tied experts of half the channels each, drawn; their table [L, E, C]."""
    channels, names = cfg.mlp // 2, tuple(f"domain{i}" for i in range(EXPERTS))
    sizes = ExpertConfig(
        experts=EXPERTS, channels=channels, storage="tied", names=names, importance="energy", carving="domain"
    )
    drawn = [np.sort(rng.permutation(cfg.mlp)[:channels]) for _ in range(cfg.layer * EXPERTS)]
    return sizes, np.stack(drawn).astype(np.int32).reshape(cfg.layer, EXPERTS, channels)


class Setup:
    """A run of alternating training on one device, as train/alternate.py holds it: data, model, phases, steps."""

    def __init__(
        self,
        folder: Path,
        model: str,
        *,
        seq: int,
        batch: int,
        dtype: Literal["float32", "bfloat16"],
        way: steps.Way,
        remat: backbone.Remat,
        peak: float | None,
    ):
        """folder: for the labels, and what the loop writes. peak: FLOP/s, None for what is known of the device."""
        self.folder, rng = folder, np.random.default_rng(0)
        self.model, self.cfg, self.host = draw_model(model)
        cfg = self.cfg
        sizes, self.table_LEC = expert_sizes(cfg, rng)
        phases = {
            "router": RouterPhase(steps=LONG, batch=batch, optim=OptimConfig(lr=LR)),
            "experts": ExpertPhase(
                steps=LONG, batch=batch, optim=OptimConfig(lr=LR), ce_weight=CE, way=way, remat=remat
            ),
        }
        here = {"model": folder, "data": folder, "out": folder}
        self.config = AlternateConfig(**here, rounds=1, **phases, dtype=dtype, mesh=MeshConfig(data=1))
        self.router_cfg, self.tokens = RouterConfig(), batch * seq
        # ---- data
        ids_NT = rng.integers(1, cfg.vocab, (RECORDS, seq), np.int32)
        records = {"text": Records(ids_NT, np.ones_like(ids_NT))}
        self.batches = {
            n: Batches(records, {"text": 1.0}, batch=p.batch, seed=i) for i, (n, p) in enumerate(phases.items())
        }
        said = {"target": ((seq, EXPERTS), np.float32)}
        self.labels = RecordCache(folder, "labels", np.arange(RECORDS, dtype=np.int32), said)
        self.labels.fill(1, lambda ids_B: {"target": rng.dirichlet(np.ones(EXPERTS), (1, seq)).astype(np.float32)})
        # ---- model
        params = backbone.place(cfg, self.host)
        self.table, self.teacher = experts.make_table(self.table_LEC, cfg.mlp), params
        student, self.frozen = student_of(params, params, phases["experts"])
        self.router = router.init_params(self.router_cfg, self.host["embedding"], EXPERTS, seed=0)
        head = rng.normal(0, 0.02, self.router["head"].shape)
        self.router["head"] = head.astype(np.float32)  # not zero, so that all experts are chosen
        tx = {name: optim.make(phase.optim, LONG) for name, phase in phases.items()}
        start = {"router": router.place(self.router), "experts": student}
        self.phases = {name: steps.start(start.pop(name), tx[name]) for name in phases}
        # ---- steps
        head = HeadLoss(phases["experts"].kd_weight, CE, phases["experts"].head_chunk)
        self.router_step = steps.make_router_step(self.router_cfg, cfg.rope_theta, tx["router"])
        self.expert_step = steps.make_expert_step(cfg, head, tx["experts"], dtype=jnp.dtype(dtype), remat=remat)
        self.route = steps.make_route(self.router_cfg, cfg.rope_theta)
        # ---- what is known of them
        used = self.table.mask_LEU.shape[-1]
        self.run = Run(self.config, cfg, sizes, self.router_cfg, seq, used)
        self.device = jax.devices()[0]
        self.peak = peak or peak_flops(self.device.device_kind)
        self.seen = {
            name: PhaseFigures(
                LONG,
                self.tokens,
                flops.train_flops_per_token(cfg, sizes, phase, seq, router=self.router_cfg, used=used),
                np.full(LONG, LR),
                self.batches[name].index,
            )
            for name, phase in phases.items()
        }

    def tick(self, name: str, number: int) -> int:
        """Step of the run that is the phase's own `number`."""
        return number if name == "router" else LONG + number

    def step(self, name: str, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """One step of a phase on a batch with its target or route."""
        if name == "router":
            self.phases[name], values = self.router_step(self.phases[name], batch)
        else:
            arguments = (self.phases[name], self.frozen, self.teacher, self.table, batch)
            self.phases[name], values = self.expert_step(*arguments)
        return values

    # ---- the loops: each runs 1 + count steps from `first` and gives what the clock says of the last `count`

    def program(self, name: str, first: int, count: int) -> dict[str, float]:
        """As train/alternate.py runs them; with the shares of the last line of timing.jsonl."""
        pace = Pace(inline=self.device.platform == "cpu")

        def batch_of(tick: int) -> dict[str, jax.Array]:
            phase, number = self.config.at(tick)
            return place_batch(self.batches[phase], number, {"router": self.labels}.get(phase))

        with tempfile.TemporaryDirectory(dir=self.folder) as room, contextlib.ExitStack() as stack:
            metrics = Metrics(Path(room) / "metrics.jsonl")
            watch = Watch(metrics, pace, self.seen, self.config.at, 1, peak=self.peak, window=100, silent=True)
            stack.callback(watch.close)
            begin = self.tick(name, first)
            ahead = stack.enter_context(contextlib.closing(Ahead(batch_of, begin + count + 1, pace)))
            routed = RoutedBatches(ahead, self.route, EXPERTS, self.config.experts.way, pace)
            timer, agreement = Timer(self.config.checkpoint.minutes), Agreement()
            stack.enter_context(jax.transfer_guard_host_to_device("disallow"))
            for tick in range(begin, begin + count + 1):
                if tick == begin + 1:
                    watch.flush()
                    clock = Clock()
                if self.config.at(tick)[0] == "router":
                    batch = ahead(tick)
                    with pace.calling():
                        values = self.step(name, batch)
                else:
                    batch, load_E = routed.take(tick, self.phases["router"].params, last=tick == begin + count)
                    with pace.calling():
                        values = self.step(name, batch)
                    values["load"] = load_E
                watch.step(tick, values)
                agreement.step(int(timer.due()))
            watch.flush()
            measured = clock.each(count)
            said = read_metrics(Path(room) / "timing.jsonl")[-1]
            return measured | {key: said[f"time/{key}"] for key in ("host_share", "data_wait_share")}

    def placed(self, name: str, number: int) -> dict[str, jax.Array]:
        """The batch of a phase's step: ids, segments, and the router's target."""
        rows = self.batches[name][number]
        batch = {key: put(rows[key], MICRO) for key in ("ids", "segments")}
        if name == "router":
            batch["target"] = put(self.labels[rows["index"]]["target"], jax.P(*MICRO, None))
        return batch

    def routed(self, batch: dict[str, jax.Array]) -> dict[str, Any]:
        """A batch of the experts with its route."""
        expert_ABT = self.route(self.phases["router"].params, batch["ids"], batch["segments"])
        return batch | {"route": steps.plan(expert_ABT, EXPERTS, self.config.experts.way, put=put_here)}

    def plain_step(self, name: str, batch: dict[str, jax.Array]) -> jax.Array:
        """Route, where there is one, and step; the loss."""
        return self.step(name, self.routed(batch) if name == "experts" else batch)["loss"]

    def plain(self, name: str, first: int, count: int) -> dict[str, float]:
        """Batch, step, loss of the step before."""
        before = np.asarray(self.plain_step(name, self.placed(name, first)))
        clock = Clock()
        for number in range(first + 1, first + count + 1):
            loss = self.plain_step(name, self.placed(name, number))
            before, _ = loss, np.asarray(before)
        np.asarray(before)
        return clock.each(count)

    def alone(self, name: str, first: int, count: int) -> dict[str, float]:
        """Steps on batches that are there, each waited for."""
        batches = [self.placed(name, number) for number in range(first, first + count + 1)]
        jax.block_until_ready(self.plain_step(name, batches[0]))
        clock = Clock()
        for batch in batches[1:]:
            jax.block_until_ready(self.plain_step(name, batch))
        return clock.each(count)

    def memory(self) -> tuple[float, float]:
        """GB of the device at the run's peak: (measured, planned)."""
        needs = planning.memory(self.run, self.device.platform)
        planned = max(needs[name].total for name in self.phases)
        stats = self.device.memory_stats()
        if stats:
            return stats["peak_bytes_in_use"] / 1e9, planned / 1e9
        batch = self.routed(self.placed("experts", 0))
        held = {
            "router": (self.router_step, (self.phases["router"], self.placed("router", 0))),
            "experts": (self.expert_step, (self.phases["experts"], self.frozen, self.teacher, self.table, batch)),
        }
        return max(self._analysed(*each) for each in held.values()) / 1e9, planned / 1e9

    def _analysed(self, step: Any, arguments: tuple) -> int:
        """Bytes that XLA says a step needs, with what lies beside it."""
        used = step.lower(*arguments).compile().memory_analysis()
        assert used is not None
        own = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
        taken = {id(leaf) for leaf in jax.tree.leaves(arguments)}
        held = jax.tree.leaves((self.phases, self.frozen, self.teacher, self.table))
        return own - used.alias_size_in_bytes + sum(leaf.nbytes for leaf in held if id(leaf) not in taken)


def put_here(array: Any) -> jax.Array:
    """Ids of the device stay there (`masked`), a plan of the host is placed."""
    return array if isinstance(array, jax.Array) else put(array)
