"""Speed of the training program's loop beside the plainest loop over the same steps; where its time and memory go.

    python benchmarks/train.py --json train.json
    python benchmarks/train.py --model smollm2 --steps 4 --json train.json
    python benchmarks/train.py --against a619836 --json train.json

One device. Turns in one process, A B C, B C A, ...: each runs some steps of a phase, the one before them untimed; a
`plain_ratio` is the median over turns of tokens/s of `program` over those of another way, with its lowest and highest:

- program: a loop of what that of train/alternate.py is made of (`Ahead`, `RoutedBatches`, `Watch`, metrics on disk),
  without its checkpoints and ahead-of-time compilation;
- plain: place the batch, call the step, fetch the loss of the step before. Nothing is made ahead. It calls the same
  steps as `program`, those of this tree: what an earlier commit did is measured by `--against`;
- alone: batches placed before the clock starts, each step waited for: what the device itself needs;
- PyTorch (`--torch`): the same step of `torch_reference.py`, autocast where `--dtype` is bfloat16. Losses must agree.

Shares of the program's wall time: `host` and `data` are the `host_share` and `data_wait_share` that it writes to
timing.jsonl itself. Beside them, measured independently: `thread`, the CPU time of the loop's thread, which bounds its
work from above (a CPU device runs small programs in it too); and `outside`, 1 - alone / program, as noisy as the
machine: below zero the program hides work behind the device which `alone` does not. `plain_cpu_ratio` is the
ratio to `plain` of the CPU time of all threads: on a CPU device what other programs on the machine leave as it is.

`--against COMMIT` runs train/alternate.py itself, of this tree and of COMMIT, in processes of their own in turns over
the same folders (train_against.py): `router_step_ratio` and `expert_step_ratio` are medians over turns of tokens/s of
this tree over COMMIT's, `..._cpu_ratio` the same of CPU time; take several turns, one on a busy CPU has been 40 % off.
a619836 is the last commit before meshes: the single-device path that must not have become slower.

Tokens and router labels are drawn: no step's time depends on them, but for `--way grouped`, whose groups do. On an
accelerator MFU is useful FLOPs over the bf16 peak, and memory the peak that the device reports; on a CPU, which reports
none, what XLA's analysis of the compiled step adds up to. `plan` is the estimate of `readme-jax plan` for it.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# JAX and PyTorch share an accelerator here: neither may take all of its memory at the start
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from train_against import compare
from train_loops import CE, EXPERTS, LR, SIZES, Clock, Setup

from readme_jax import carve, hf
from readme_jax.sharding import MeshConfig, use_mesh

WARM = 2  # steps of a phase before its turns
TOLERANCE = {"float32": 2e-3, "bfloat16": 3e-2}  # of a loss, relative


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
        model = reference.load(folder)
        torch.nn.Module.to(model, kind)
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
        for number in range(WARM):
            ours = float(s.plain_step(name, s.placed(name, number)))
            theirs = other(name, number) if other else ours
            if not abs(ours - theirs) < tolerance * abs(theirs):
                sys.exit(f"{name}: loss {ours:.6f}, PyTorch {theirs:.6f} at step {number}")


def measure(s: Setup, name: str, args: argparse.Namespace, other: Callable[[str, int], float] | None) -> dict:
    """Figures of a phase: medians over turns."""

    def torch(first: int) -> dict[str, float]:
        assert other is not None
        other(name, first)
        clock = Clock()
        for number in range(first + 1, first + args.steps + 1):
            other(name, number)
        return clock.each(args.steps)

    ways: dict[str, Callable[..., dict[str, float]]] = {
        way: functools.partial(getattr(s, way), name, count=args.steps) for way in ("program", "plain", "alone")
    }
    ways |= {"torch": torch} if other else {}
    turns: list[dict[str, float]] = []
    for number in range(args.turns):
        first = WARM + number * (args.steps + 1)
        shift = number % len(ways)  # every way comes first and last as often as the others
        got = {way: ways[way](first=first) for way in [*ways, *ways][shift : shift + len(ways)]}
        program, plain = got["program"], got["plain"]
        turn = {f"{way}_tokens_per_s": s.tokens / each["seconds"] for way, each in got.items()}
        turn |= {key: program[key] for key in program if key.endswith("share")}
        turn["plain_ratio"] = plain["seconds"] / program["seconds"]
        turn["plain_cpu_ratio"] = plain["cpu"] / program["cpu"]
        turn["outside_share"] = 1 - got["alone"]["seconds"] / program["seconds"]
        if other:
            turn["torch_ratio"] = got["torch"]["seconds"] / program["seconds"]
        turns.append(turn)
    found = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    ratios = sorted(turn["plain_ratio"] for turn in turns)
    found["plain_ratio_low"], found["plain_ratio_high"] = ratios[0], ratios[-1]
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
    parser.add_argument("--against", help="commit of this repository whose training program takes turns with this one")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    if min(args.steps, args.turns) < 1 or min(args.seq, args.batch) < 0:
        parser.error("--steps and --turns must be at least 1, --seq and --batch not negative")
    cpu = jax.default_backend() == "cpu"
    args.seq, args.batch = (given or usual for given, usual in zip((args.seq, args.batch), SIZES[args.model]))
    args.dtype = args.dtype or ("float32" if cpu else "bfloat16")
    device = torch_device(args.torch)
    figures: dict[str, Any] = against(args) if args.against else {}
    with tempfile.TemporaryDirectory() as room, use_mesh(MeshConfig(data=1)):
        s = Setup(
            Path(room),
            args.model,
            seq=args.seq,
            batch=args.batch,
            dtype=args.dtype,
            way=args.way,
            remat=args.remat,
            peak=1e12 * args.peak or None,
        )
        other = pytorch(s, device, args.dtype) if device else None
        print(f"{args.model}, {args.batch} records of {args.seq} tokens, {args.dtype}, {s.device.device_kind}")
        warm_up(s, other, TOLERANCE[args.dtype])
        ways = ("program", "plain", "alone", *(["torch"] if other else []))
        heads = "".join(f"{way:>9}" for way in ways)
        print(f"{'tokens/s':9}{heads}{'ratio':>8}{'host':>8}{'data':>8}{'thread':>8}{'outside':>8}")
        for name, short in (("router", "router_step"), ("experts", "expert_step")):
            got = measure(s, name, args, other)
            figures |= {f"{short}_{key}": value for key, value in got.items()}
            rates = "".join(f"{got[f'{way}_tokens_per_s']:9.0f}" for way in ways)
            shares = "".join(
                f"{got[key]:8.1%}" for key in ("host_share", "data_wait_share", "thread_share", "outside_share")
            )
            print(f"{name:9}{rates}{got['plain_ratio']:8.3f}{shares}", flush=True)
            print(f"{'':9}ratio to plain {got['plain_ratio_low']:.3f} to {got['plain_ratio_high']:.3f}", end="")
            print(f", of CPU time {got['plain_cpu_ratio']:.3f}", end="")
            print(f", MFU {got['mfu']:.1%}" if s.peak else "", flush=True)
        figures["memory_gb"], figures["plan_gb"] = s.memory()
        print(f"memory {figures['memory_gb']:.3f} GB, plan {figures['plan_gb']:.3f}", flush=True)
        for key in ("host_share", "data_wait_share"):  # the worse of both phases
            figures[key] = max(figures[f"{short}_{key}"] for short in ("router_step", "expert_step"))
        if s.peak:
            figures["mfu"] = figures["expert_step_mfu"]
        if device and (peak := torch_gb(device)):
            figures["torch_memory_gb"] = peak
            print(f"PyTorch's memory {peak:.3f} GB")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


def against(args: argparse.Namespace) -> dict[str, float]:
    """Figures of this tree's training program beside that of another commit. Before anything lies on the device."""
    options = {key: getattr(args, key) for key in ("model", "seq", "dtype", "batch", "way", "remat")}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as room:
        found = compare(Path(room), args.against, args.turns, steps=args.steps * args.turns, **options)
    for name, short in (("router", "router_step"), ("experts", "expert_step")):
        ours, theirs = found[name].swapaxes(0, 1)  # [turns, 2]: by the clock, by CPU time
        ratios, cpu = (ours / theirs).T
        figures |= {f"{short}_ratio": float(np.median(ratios)), f"{short}_cpu_ratio": float(np.median(cpu))}
        figures |= {f"{short}_ratio_low": float(ratios.min()), f"{short}_ratio_high": float(ratios.max())}
        rates = [float(np.median(each[:, 0])) for each in (ours, theirs)]
        print(
            f"{name:9}{rates[0]:9.0f} tokens/s, {args.against} {rates[1]:9.0f}, ratio {np.median(ratios):.3f}", end=""
        )
        print(f" ({ratios.min():.3f} to {ratios.max():.3f}), of CPU time {np.median(cpu):.3f}", flush=True)
    return figures


def torch_device(asked: str) -> str:
    """Device of PyTorch's turns, empty for none."""
    if asked != "auto":
        return "" if asked == "none" else asked
    if jax.default_backend() != "gpu" or importlib.util.find_spec("torch") is None:
        return ""
    import torch

    return "cuda" if torch.cuda.is_available() else ""


if __name__ == "__main__":
    main()
