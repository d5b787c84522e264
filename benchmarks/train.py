"""Speed of the training program's loop beside the plainest loop over the same steps; where its time and memory go.

    python benchmarks/train.py --json train.json
    python benchmarks/train.py --model smollm2 --steps 4 --json train.json

One device. Turns in one process, A B C (D): each runs a few steps of a phase, the one before them untimed; a ratio is
the median over turns of tokens/s of `program` over those of another way:

- program: the loop of train/alternate.py, with what it is made of: `Ahead`, `RoutedBatches`, `Watch`, metrics on disk;
- plain: place the batch, call the step, fetch the loss of the step before. Nothing is made ahead;
- alone: batches placed before the clock starts, each step waited for: what the device itself needs;
- PyTorch (`--torch`): the same step of `torch_reference.py`, autocast where `--dtype` is bfloat16. Losses must agree.

Shares of the program's wall time: `host_share` and `data_wait_share` are those it writes to timing.jsonl itself;
`outside_share` is 1 - alone / program, measured independently of them and as noisy as the machine. Below zero it says
that the program hides work behind the device which `alone` does not.

Tokens and router labels are drawn: no step's time depends on them, but for `--way grouped`, whose groups do. On an
accelerator MFU is useful FLOPs over the bf16 peak, and memory the peak that the device reports; on a CPU, which reports
none, what XLA's analysis of the compiled step adds up to. `plan` is the estimate of `readme-jax plan` for it.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# JAX and PyTorch share an accelerator here: neither may take all of its memory at the start
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import carve, flops, hf, optim, planning, sources, steps
from readme_jax.abstract import Run
from readme_jax.alternate import AlternateConfig, ExpertPhase, RoutedBatches, RouterPhase, student_of
from readme_jax.config import ExpertConfig, ModelConfig, RouterConfig
from readme_jax.data import Batches, Records
from readme_jax.distributed import Agreement
from readme_jax.loop import MICRO, Ahead, PhaseFigures, Timer, Watch, place_batch
from readme_jax.losses import HeadLoss
from readme_jax.metrics import Metrics, Pace, peak_flops, read_metrics
from readme_jax.models import backbone, experts, router
from readme_jax.optim import OptimConfig
from readme_jax.sharding import MeshConfig, put, use_mesh
from readme_jax.teacher import RecordCache

LONG = 1_000_000  # steps of a phase of the run that the turns are cut from: its learning rate stays where it is
EXPERTS, RECORDS, LR, CE = 7, 64, 1e-4, 0.1
TOLERANCE = {"float32": 2e-3, "bfloat16": 3e-2}  # of a loss, relative
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


class Setup:
    """A run of alternating training on one device, as train/alternate.py holds it: data, model, phases, steps."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.folder, rng = folder, np.random.default_rng(0)
        self.model = sources.resolve_model(sources.FALLBACK_MODEL) if args.model == "smollm2" else None
        if self.model is None:
            self.cfg, self.host = RANDOM[args.model], hf.init_params(RANDOM[args.model])
        else:
            self.cfg, self.host = hf.read_config(self.model)[0], hf.load_params(self.model, dtype=np.float32)[0]
        cfg, channels, seq = self.cfg, self.cfg.mlp // 2, args.seq
        names = tuple(f"domain{i}" for i in range(EXPERTS))
        sizes = ExpertConfig(
            experts=EXPERTS, channels=channels, storage="tied", names=names, importance="energy", carving="domain"
        )
        every = range(cfg.layer * EXPERTS)
        table_LEC = np.stack([np.sort(rng.permutation(cfg.mlp)[:channels]) for _ in every]).astype(np.int32)
        self.table_LEC = table_LEC.reshape(cfg.layer, EXPERTS, channels)
        phases = {
            "router": RouterPhase(steps=LONG, batch=args.batch, optim=OptimConfig(lr=LR)),
            "experts": ExpertPhase(
                steps=LONG, batch=args.batch, optim=OptimConfig(lr=LR), ce_weight=CE, way=args.way, remat=args.remat
            ),
        }
        here = {"model": folder, "data": folder, "out": folder}
        self.config = AlternateConfig(**here, rounds=1, **phases, dtype=args.dtype, mesh=MeshConfig(data=1))
        self.router_cfg, self.tokens = RouterConfig(), args.batch * seq
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
        model = backbone.place(cfg, self.host)
        self.table, self.teacher = experts.make_table(self.table_LEC, cfg.mlp), model
        student, self.frozen = student_of(model, model, phases["experts"])
        self.router = router.init_params(self.router_cfg, self.host["embedding"], EXPERTS, seed=0)
        self.router["head"] = rng.normal(0, 0.02, self.router["head"].shape).astype(
            np.float32
        )  # all experts are chosen
        tx = {name: optim.make(phase.optim, LONG) for name, phase in phases.items()}
        start = {"router": router.place(self.router), "experts": student}
        self.phases = {name: steps.start(start.pop(name), tx[name]) for name in phases}
        # ---- steps
        head = HeadLoss(phases["experts"].kd_weight, CE, phases["experts"].head_chunk)
        self.router_step = steps.make_router_step(self.router_cfg, cfg.rope_theta, tx["router"])
        self.expert_step = steps.make_expert_step(
            cfg, head, tx["experts"], dtype=jnp.dtype(args.dtype), remat=args.remat
        )
        self.route = steps.make_route(self.router_cfg, cfg.rope_theta)
        # ---- what is known of them
        used = self.table.mask_LEU.shape[-1]
        self.run = Run(self.config, cfg, sizes, self.router_cfg, seq, used)
        self.device = jax.devices()[0]
        self.peak = args.peak * 1e12 if args.peak else peak_flops(self.device.device_kind)
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

    # ---- the loops: each runs 1 + count steps from `first` and gives the seconds of one of the last `count`

    def program(self, name: str, first: int, count: int) -> tuple[float, dict[str, float]]:
        """As train/alternate.py runs them; what the last step's line of timing.jsonl says beside the seconds."""
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
                    start = time.perf_counter()
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
            seconds = (time.perf_counter() - start) / count
            return seconds, read_metrics(Path(room) / "timing.jsonl")[-1]

    def placed(self, name: str, number: int) -> dict[str, jax.Array]:
        """The batch of a phase's step: ids, segments, and the router's target."""
        rows = self.batches[name][number]
        batch = {key: put(rows[key], MICRO) for key in ("ids", "segments")}
        if name == "router":
            batch["target"] = put(self.labels[rows["index"]]["target"], jax.P(*MICRO, None))
        return batch

    def plain_step(self, name: str, batch: dict[str, Any]) -> jax.Array:
        """Route, where there is one, and step; the loss."""
        if name == "experts":
            expert_ABT = self.route(self.phases["router"].params, batch["ids"], batch["segments"])
            batch = batch | {"route": steps.plan(expert_ABT, EXPERTS, self.config.experts.way, put=put_here)}
        return self.step(name, batch)["loss"]

    def plain(self, name: str, first: int, count: int) -> float:
        """Batch, step, loss of the step before."""
        before = np.asarray(self.plain_step(name, self.placed(name, first)))
        start = time.perf_counter()
        for number in range(first + 1, first + count + 1):
            loss = self.plain_step(name, self.placed(name, number))
            before, _ = loss, np.asarray(before)
        np.asarray(before)
        return (time.perf_counter() - start) / count

    def alone(self, name: str, first: int, count: int) -> float:
        """Steps on batches that are there, each waited for."""
        batches = [self.placed(name, number) for number in range(first, first + count + 1)]
        jax.block_until_ready(self.plain_step(name, batches[0]))
        start = time.perf_counter()
        for batch in batches[1:]:
            jax.block_until_ready(self.plain_step(name, batch))
        return (time.perf_counter() - start) / count

    def memory(self, name: str) -> tuple[float, float]:
        """GB of the device at a step's peak: (measured, planned)."""
        planned = planning.memory(self.run, self.device.platform)[name].total
        stats = self.device.memory_stats()
        if stats:
            return stats["peak_bytes_in_use"] / 1e9, planned / 1e9
        batch = self.placed(name, 0)
        if name == "router":
            compiled = self.router_step.lower(self.phases[name], batch).compile()
            beside = (self.teacher, self.frozen, self.table, self.phases["experts"])
        else:
            expert_ABT = self.route(self.phases["router"].params, batch["ids"], batch["segments"])
            batch |= {"route": steps.plan(expert_ABT, EXPERTS, self.config.experts.way, put=put_here)}
            arguments = (self.phases[name], self.frozen, self.teacher, self.table, batch)
            compiled, beside = self.expert_step.lower(*arguments).compile(), (self.phases["router"],)
        used = compiled.memory_analysis()
        own = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
        held = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(beside)}
        return (own - used.alias_size_in_bytes + sum(held.values())) / 1e9, planned / 1e9


def put_here(array: Any) -> jax.Array:
    """Ids of the device stay there (`masked`), a plan of the host is placed."""
    return array if isinstance(array, jax.Array) else put(array)


def pytorch(s: Setup, device: str, dtype: str) -> Callable[[str, int], float]:
    """run(phase, number of the step) -> loss of the same step in PyTorch, the same weights and batches."""
    import torch
    import torch_reference as reference

    folder = s.model
    if folder is None:
        folder = s.folder / "dense"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(hf.config_to_hf(s.cfg, {})))
        with hf.Writer(folder) as writer:
            hf.save_params(writer, s.cfg, s.host)
    kind = torch.device(device)
    with kind:
        model = reference.load(folder).to(kind)
        masks_LEF = torch.tensor(carve.membership(s.table_LEC, s.cfg.mlp).astype(np.float32))
        module = reference.Router(s.cfg.vocab, s.router_cfg.width, s.router_cfg.heads, EXPERTS, s.cfg.rope_theta)
        module.fill(s.router)
        tune_router = reference.make_distillation(module, LR)
        tune_experts = reference.make_expert_step(model, masks_LEF, CE, LR)

    def run(name: str, number: int) -> float:
        rows = s.batches[name][number]
        with kind, torch.autocast(kind.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            ids_BT = torch.tensor(rows["ids"][0], dtype=torch.int64)
            if name == "router":
                return tune_router(ids_BT, torch.tensor(s.labels[rows["index"]]["target"][0]).flatten(0, 1))
            with torch.no_grad():
                expert_BT = module(ids_BT).argmax(-1)
            return tune_experts(ids_BT, expert_BT)

    return run


def torch_gb(device: str) -> float | None:
    """Peak of PyTorch's own memory on an accelerator, GB."""
    import torch

    return torch.cuda.max_memory_allocated(device) / 1e9 if device.startswith("cuda") else None


# ---- measuring --------------------------------------------------------------------------------


def warm_up(s: Setup, other: Callable[[str, int], float] | None, tolerance: float) -> None:
    """Compile both phases' steps; PyTorch must see the same losses."""
    for name in s.seen:
        for number in range(2):
            ours = float(s.plain_step(name, s.placed(name, number)))
            theirs = other(name, number) if other else ours
            if not abs(ours - theirs) < tolerance * abs(theirs):
                sys.exit(f"{name}: loss {ours:.6f}, PyTorch {theirs:.6f} at step {number}")


def measure(s: Setup, name: str, args: argparse.Namespace, other: Callable[[str, int], float] | None) -> dict:
    """Figures of a phase: medians over turns."""
    turns: list[dict[str, float]] = []
    first = 2
    for _ in range(args.turns):
        turn = {}
        turn["program"], said = s.program(name, first, args.steps)
        turn |= {key: said[f"time/{key}"] for key in ("host_share", "data_wait_share")}
        turn["plain"] = s.plain(name, first, args.steps)
        turn["alone"] = s.alone(name, first, args.steps)
        if other:
            other(name, first)
            start = time.perf_counter()
            for number in range(first + 1, first + args.steps + 1):
                other(name, number)
            turn["torch"] = (time.perf_counter() - start) / args.steps
            turn["torch_ratio"] = turn["torch"] / turn["program"]
        turn["ratio"] = turn["plain"] / turn["program"]
        turn["outside_share"] = 1 - turn["alone"] / turn["program"]
        turns.append(turn)
        first += args.steps + 1
    found = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    for way in ("program", "plain", "alone", "torch"):
        if way in found:
            found[f"{way}_tokens_per_s"] = s.tokens / found.pop(way)
    found["spread"] = max(turn["ratio"] for turn in turns) - min(turn["ratio"] for turn in turns)
    if s.peak:
        found["mfu"] = found["program_tokens_per_s"] * s.seen[name].flops / s.peak
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "; ".join(f"{name} {seq} and {batch}" for name, (seq, batch) in SIZES.items())
    parser.add_argument(
        "--model",
        choices=list(SIZES),
        default="tiny",
        help="tiny: random, seconds on a CPU; smollm2: SmolLM2-135M as the quickstart gets it; llama-1b: random, "
        "1.1 B parameters, for accelerators",
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each way")
    parser.add_argument("--seq", type=int, default=0, help=f"tokens of a record; with --batch, 0 takes: {sizes}")
    parser.add_argument("--batch", type=int, default=0, help="records of a step")
    parser.add_argument(
        "--dtype", choices=list(TOLERANCE), help="compute dtype (default: float32 on a CPU, bfloat16 elsewhere)"
    )
    parser.add_argument("--way", choices=("masked", "grouped"), default="masked", help="how experts run")
    parser.add_argument("--remat", choices=("none", "full"), default="none", help="full: recompute activations")
    parser.add_argument(
        "--peak", type=float, default=0.0, help="bf16 peak of the device in TFLOP/s, for MFU; 0: that of a known one"
    )
    parser.add_argument(
        "--torch",
        default="auto",
        help="device of PyTorch's turns, such as cpu or cuda; none: no such turns; auto: cuda where JAX runs on a GPU "
        "and PyTorch sees one too",
    )
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    cpu = jax.default_backend() == "cpu"
    args.seq, args.batch = (given or usual for given, usual in zip((args.seq, args.batch), SIZES[args.model]))
    args.dtype = args.dtype or ("float32" if cpu else "bfloat16")
    device = torch_device(args.torch)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as room, use_mesh(MeshConfig(data=1)):
        s = Setup(args, Path(room))
        other = pytorch(s, device, args.dtype) if device else None
        print(f"{args.model}, {args.batch} records of {args.seq} tokens, {args.dtype}, {s.device.device_kind}")
        warm_up(s, other, TOLERANCE[args.dtype])
        ways = ("program", "plain", "alone", *(["torch"] if other else []))
        print(f"{'tokens/s':9}{''.join(f'{way:>9}' for way in ways)}{'ratio':>7}  host   data  outside")
        for name, short in (("router", "router_step"), ("experts", "expert_step")):
            got = measure(s, name, args, other)
            got["memory_gb"], got["plan_gb"] = s.memory(name)
            figures |= {f"{short}_{key}": value for key, value in got.items()}
            rates = "".join(f"{got[f'{way}_tokens_per_s']:9.0f}" for way in ways)
            shares = "".join(f"{got[key]:7.1%}" for key in ("host_share", "data_wait_share", "outside_share"))
            print(f"{name:9}{rates}{got['ratio']:7.3f}{shares}", flush=True)
            print(f"{'':9}memory {got['memory_gb']:.3f} GB, plan {got['plan_gb']:.3f}", end="")
            print(f", MFU {got['mfu']:.1%}" if s.peak else "", flush=True)
        for key in ("host_share", "data_wait_share"):  # the worse of both phases
            figures[key] = max(figures[f"{short}_{key}"] for short in ("router_step", "expert_step"))
        if s.peak:
            figures["mfu"] = figures["expert_step_mfu"]
        if device and (peak := torch_gb(device)):
            figures["torch_memory_gb"] = peak
            print(f"PyTorch's memory {peak:.3f} GB")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


def torch_device(asked: str) -> str:
    """Device of PyTorch's turns, empty for none."""
    if asked in ("none", "auto") and (asked == "none" or jax.default_backend() != "gpu"):
        return ""
    import torch

    return ("cuda" if torch.cuda.is_available() else "") if asked == "auto" else asked


if __name__ == "__main__":
    main()
