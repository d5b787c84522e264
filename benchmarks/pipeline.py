"""Speed of the pipeline beside the same computation in PyTorch, and the memory of import and carve.

    python benchmarks/pipeline.py --json pipeline.json

Both sides run SmolLM2-135M in float32 on the same tokens and shapes, in turns in one process (A B A B), warm-up left
out; a ratio is the median over the turns of ours / PyTorch in tokens/s. Before timing, both sides must give the same
numbers. `limit` is what the machine's matrix multiply allows: measured GFLOP/s over the FLOPs a token needs. The
memory figures are those of `stream_memory.py`.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import stream_memory
import torch
import torch_reference as reference

from readme_jax import calibrate, carve, hf, labels, losses, optim, sources, steps
from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.corpus import DomainConfig, documents
from readme_jax.data import load_tokenizer, pack
from readme_jax.models import backbone, experts, router
from readme_jax.quickstart import DOMAINS
from readme_jax.sharding import MeshConfig, put, spec, use_mesh

SEQ, ROUTER_BATCH, RECORDS = 512, 4, 2  # tokens of a record, records of a router step, records a domain
LR, CE, CHUNK = 1e-4, 0.1, 128
LABELS = {"overlap": labels.PAPER_LABELS, "energy": labels.LabelConfig()}
TOLERANCE = 2e-3  # relative: float32 on both sides, sums in another order through 30 layers


@dataclasses.dataclass(frozen=True)
class Pair:
    """One computation on both sides. Each side is called with a turn's number and gives an array to compare.

    flops: of one token, multiply-adds counted as two, only what cannot be left out.
    """

    name: str
    ours: Callable[[int], np.ndarray]
    torch: Callable[[int], np.ndarray]
    tokens: int
    flops: float


class Setup:
    """Model, text, experts and router: arrays of ours, and the same values in PyTorch modules."""

    def __init__(self, model: str):
        folder = sources.resolve_model(model)
        self.cfg = hf.read_config(folder)[0]
        self.torch_model = reference.load(folder)
        self.host = hf.load_params(folder, dtype=np.float32)[0]
        tokenizer, text = load_tokenizer(folder), DomainConfig(source="fallback")
        names = sorted(DOMAINS)
        packed = [pack(documents(name, text, "train"), tokenizer, SEQ, RECORDS * SEQ)[0] for name in names]
        self.ids_NT = np.concatenate(packed)
        self.experts = len(names)
        self._carve()
        self.params = backbone.place(self.cfg, self.host)
        self.router_cfg = RouterConfig()
        self.router = router.init_params(self.router_cfg, self.host["embedding"], self.experts, seed=0)
        head = np.random.default_rng(1).normal(0, 0.02, self.router["head"].shape)
        self.router["head"] = head.astype(np.float32)  # not zero, so that every gradient is there to be compared

    def _carve(self) -> None:
        """Domain experts by mean |h| (the paper's), channels permuted on both sides."""
        run, params = calibrate.make_statistics(self.cfg), backbone.place(self.cfg, self.host)
        sums = [run(params, *self.batch(RECORDS * i, RECORDS)) for i in range(self.experts)]
        old_LEC = carve.choose(np.stack([np.asarray(s["abs"]) for s in sums]), carve.channels_of(0.5, self.cfg.mlp))
        order_LF = np.stack([carve.permutation(old_EC, self.cfg.mlp) for old_EC in old_LEC])
        self.table_LEC = np.stack([carve.relabel(*pair) for pair in zip(old_LEC, order_LF, strict=True)])
        self.masks_LEF = torch.from_numpy(carve.membership(self.table_LEC, self.cfg.mlp).astype(np.float32))
        layers = self.host["layers"]
        for name in ("w_gate", "w_up", "w_down"):
            layers[name] = np.take_along_axis(layers[name], order_LF[..., None], 1)
        reference.permute(self.torch_model, torch.from_numpy(order_LF.astype(np.int64)))

    def batch(self, first: int, count: int) -> tuple[jax.Array, jax.Array]:
        """ids, segments int32 [count, T]. One document a record: Hugging Face then needs its causal mask only."""
        ids_BT = self.ids_NT[first : first + count]
        return put(ids_BT, spec("batch", "seq")), put(np.ones_like(ids_BT), spec("batch", "seq"))

    def micro(self, first: int, count: int) -> dict[str, jax.Array]:
        """ids, segments int32 [1, count, T]: a step of one microbatch."""
        return dict(zip(("ids", "segments"), (a[None] for a in self.batch(first, count)), strict=True))

    def torch_ids(self, first: int, count: int) -> torch.Tensor:
        """int64 [count, T]."""
        return torch.from_numpy(self.ids_NT[first : first + count].astype(np.int64))

    def first(self, turn: int, count: int) -> int:
        """First record of a turn: the text goes round."""
        return turn * count % (len(self.ids_NT) - count + 1)


# ---- FLOPs ------------------------------------------------------------------------------------


def attention_flops(heads: int, width: int) -> float:
    """Scores and weighted sum of one token of a causal record, half of the square."""
    return 2 * SEQ * heads * width


def backbone_flops(cfg: ModelConfig, channels: int, head: bool) -> float:
    """Forward of one token with `channels` FFN channels."""
    projections = cfg.embed * cfg.head_dim * (2 * cfg.head + 2 * cfg.kv_head)
    layer = 2 * (projections + 3 * cfg.embed * channels) + attention_flops(cfg.head, cfg.head_dim)
    return cfg.layer * layer + (2 * cfg.vocab * cfg.embed if head else 0)


def router_flops(cfg: RouterConfig) -> float:
    """Forward of one token."""
    return cfg.layers * (2 * 6 * cfg.width**2 + attention_flops(cfg.heads, cfg.width // cfg.heads))


def matmul_gflops() -> float:
    """The better of both sides at [1024, 1024] x [1024, 1024], best of 10."""
    a = np.ones((1024, 1024), np.float32)
    ours, theirs, multiply = jnp.asarray(a), torch.from_numpy(a), jax.jit(jnp.matmul)

    def best(call) -> float:
        call()
        return min(timed(call)[0] for _ in range(10))

    return (
        2 * 1024**3 / 1e9 / min(best(lambda: multiply(ours, ours).block_until_ready()), best(lambda: theirs @ theirs))
    )


# ---- the computations -------------------------------------------------------------------------


def forward(s: Setup) -> Pair:
    """Logits of a record."""
    run = jax.jit(lambda p, i, seg: backbone.unembed(p, backbone.forward(s.cfg, p, i, seg)[0]))
    return Pair(
        "forward",
        lambda turn: run(s.params, *s.batch(s.first(turn, 1), 1)).block_until_ready(),
        lambda turn: reference.logits(s.torch_model, s.torch_ids(s.first(turn, 1), 1)),
        SEQ,
        backbone_flops(s.cfg, s.cfg.mlp, True),
    )


def calibration(s: Setup) -> Pair:
    """Sums of |h|, h^2, h and share of energy, [4, L, F], over a record."""
    run = calibrate.make_statistics(s.cfg)

    def ours(turn: int):
        sums = run(s.params, *s.batch(s.first(turn, 1), 1))
        return np.stack([np.asarray(sums[name]) for name in calibrate.SUMS])

    def theirs(turn: int):
        sums = reference.statistics(s.torch_model, s.torch_ids(s.first(turn, 1), 1))
        return torch.stack([sums[name] for name in calibrate.SUMS])

    return Pair("calibrate", ours, theirs, SEQ, backbone_flops(s.cfg, s.cfg.mlp, False))


def router_step(s: Setup, kind: str) -> Pair:
    """Labels of a batch by a dense run, then one step of the router; gives the mean loss a layer."""
    labels = LABELS[kind]
    label = steps.make_label(s.cfg, labels)
    tx = optim.make(optim.OptimConfig(lr=LR), 1_000_000)
    step = steps.make_router_step(s.router_cfg, s.cfg.rope_theta, tx)
    phase = steps.start(jax.tree.map(put, s.router), tx)
    table = experts.make_table(s.table_LEC, s.cfg.mlp)
    module = reference.Router(s.cfg.vocab, s.router_cfg.width, s.router_cfg.heads, s.experts, s.cfg.rope_theta)
    module.fill(s.router)
    torch_step = reference.make_router_step(s.torch_model, module, s.masks_LEF, kind, labels.temperature, LR)

    def ours(turn: int):
        nonlocal phase
        batch = s.micro(s.first(turn, ROUTER_BATCH), ROUTER_BATCH)
        batch["target"] = label(s.params, table, batch["ids"][0], batch["segments"][0])[None]
        phase, means = step(phase, batch)
        return np.asarray(means["loss"])

    def theirs(turn: int):
        return torch.tensor(torch_step(s.torch_ids(s.first(turn, ROUTER_BATCH), ROUTER_BATCH)))

    flops = backbone_flops(s.cfg, s.cfg.mlp, False) + 3 * router_flops(s.router_cfg)
    name = "router_step" if kind == "overlap" else f"router_step_{kind}"
    return Pair(name, ours, theirs, ROUTER_BATCH * SEQ, flops)


def expert_step(s: Setup, way: steps.Way) -> Pair:
    """Frozen dense teacher, routed student, KL + CE, AdamW on all parameters; gives the loss."""
    table = experts.make_table(s.table_LEC, s.cfg.mlp)
    label = steps.make_label(s.cfg, LABELS["energy"])
    expert_NT = np.concatenate(
        [np.asarray(label(s.params, table, *s.batch(i, 1)).argmax(-1)) for i in range(len(s.ids_NT))]
    ).astype(np.int32)
    tx = optim.make(optim.OptimConfig(lr=LR), 1_000_000)
    step = steps.make_expert_step(s.cfg, losses.HeadLoss(1.0, CE, CHUNK), tx)
    phase = steps.start(backbone.place(s.cfg, s.host), tx)
    torch_step = reference.make_expert_step(s.torch_model, s.masks_LEF, CE, LR)

    def ours(turn: int):
        nonlocal phase
        i = s.first(turn, 1)
        batch = s.micro(i, 1) | {"route": steps.plan(expert_NT[None, i : i + 1], s.experts, way)}
        phase, means = step(phase, {}, s.params, table, batch)
        return np.asarray(means["loss"])

    def theirs(turn: int):
        i = s.first(turn, 1)
        return torch.tensor(torch_step(s.torch_ids(i, 1), torch.from_numpy(expert_NT[i : i + 1].astype(np.int64))))

    student = backbone_flops(s.cfg, s.table_LEC.shape[-1], True)
    name = "expert_step" if way == "masked" else f"expert_step_{way}"
    return Pair(name, ours, theirs, SEQ, backbone_flops(s.cfg, s.cfg.mlp, True) + 3 * student)


# ---- measuring --------------------------------------------------------------------------------


def timed(call: Callable, *args) -> tuple[float, np.ndarray]:
    """Seconds of a call and what it gave."""
    start = time.perf_counter()
    result = call(*args)
    return time.perf_counter() - start, result


def measure(pair: Pair, repeats: int) -> dict[str, float]:
    """tokens/s of both sides and their ratio: medians over `repeats` turns, after two of warm-up that must agree."""
    for turn in range(2):
        ours, theirs = (np.asarray(side(turn)) for side in (pair.ours, pair.torch))
        error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if not error < TOLERANCE:
            sys.exit(f"{pair.name}: ours and PyTorch differ by {error:.1e} of the largest value, turn {turn}")
    seconds = [(timed(pair.ours, turn)[0], timed(pair.torch, turn)[0]) for turn in range(2, 2 + repeats)]
    ours, theirs = (pair.tokens / statistics.median(side) for side in zip(*seconds, strict=True))
    return {"ours": ours, "torch": theirs, "ratio": statistics.median(b / a for a, b in seconds), "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=sources.FALLBACK_MODEL, help="folder or hub name of a Llama")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns of each computation")
    parser.add_argument("--only", default="", help="names of computations, by comma; empty: all")
    parser.add_argument("--quick", action="store_true", help="3 turns, no memory figures")
    parser.add_argument("--skip-import", action="store_true", help="leave out the memory of import and carve")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    repeats = 3 if args.quick else args.repeats
    torch.set_num_threads(args.threads)
    makers = {
        "forward": forward,
        "calibrate": calibration,
        "router_step": lambda s: router_step(s, "overlap"),
        "router_step_energy": lambda s: router_step(s, "energy"),
        "expert_step": lambda s: expert_step(s, "masked"),  # what a run takes when nothing is said
        "expert_step_grouped": lambda s: expert_step(s, "grouped"),
    }
    chosen = args.only.split(",") if args.only else list(makers)
    figures: dict[str, float] = {}
    with use_mesh(MeshConfig(data=1)):
        setup = Setup(args.model)
        figures["matmul_gflops"] = gflops = matmul_gflops()
        print(f"{args.model}, {SEQ} tokens a record, {args.threads} threads, matmul {gflops:.0f} GFLOP/s")
        print(f"{'tokens/s':20}{'ours':>9}{'PyTorch':>9}{'ratio':>7}{'limit':>9}{'difference':>12}")
        for name in chosen:
            pair = makers[name](setup)
            got = measure(pair, repeats)
            limit = gflops * 1e9 / pair.flops
            figures[f"{name}_ratio"] = got["ratio"]
            figures[f"{name}_tokens_per_s"] = got["ours"]
            figures[f"{name}_torch_tokens_per_s"] = got["torch"]
            figures[f"{name}_limit_tokens_per_s"] = limit
            print(
                f"{name:20}{got['ours']:9.0f}{got['torch']:9.0f}{got['ratio']:7.2f}{limit:9.0f}{got['error']:12.1e}",
                flush=True,
            )
    if not (args.quick or args.skip_import):
        # From a small process: on Linux a child's peak starts with what its parent held when it was started.
        with tempfile.TemporaryDirectory() as room:
            path = Path(room) / "memory.json"
            program = Path(stream_memory.__file__)
            subprocess.run([sys.executable, str(program), "--json", str(path)], check=True, stderr=subprocess.DEVNULL)
            figures |= json.loads(path.read_text())
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
