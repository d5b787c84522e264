"""What `parallel` experts send, how long they take and what they compile, on 8 devices of the `expert` axis.

    python benchmarks/expert_parallel.py --json expert_parallel.json

On a CPU eight devices are forced: they share its cores, so times compare work, not links; rows, plans and programs are
what they are anywhere. Padding is rows sent over rows useful, the mean over random batches, where a buffer for the
worst case sends 8. `limit` is what a bucket of exactly the largest pair would give: no size that is the same for all
pairs can be below it. `padding_zipf08` is that of 16 experts, two a device: with 8 the limit itself lies above the aim
of 2.6, since the most popular expert alone gets 2.47 times the mean.

Times are those of forward and backward of one FFN, medians over turns (A B C A B C), beside

- gather: all-gather of all tokens, every device runs its expert on all of them (it knows no sizes), reduce-scatter;
- gather, planned: the same, but the host's plan names the rows each device runs. What this costs more is the sending.

`rows` is the ratio of rows that gather and ours run: about what arithmetic alone allows.

All must agree with each other, values and gradients, before they are timed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import routing
from readme_jax.models import parallel
from readme_jax.sharding import MeshConfig, put, spec, use_mesh

PEERS = 8
EMBED, CHANNELS = 128, 256  # of the timed FFN
SMALL = 16  # width of the FFN that counts programs
TOLERANCE = 1e-4
NAMES = ("w_gate", "w_up", "w_down")


def shares(experts: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Zipf's law over the experts, the popular ones anywhere."""
    share = (1.0 + np.arange(experts)) ** -exponent
    return rng.permutation(share / share.sum())


def draw(tokens: int, share: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int32 [1, 8, T]: experts of `tokens` tokens a device."""
    return rng.choice(len(share), (1, PEERS, tokens), p=share).astype(np.int32)


# ---- padding and plan ---------------------------------------------------------------------------


def padding(tokens: int, experts: int, exponent: float, batches: int) -> tuple[float, float]:
    """(rows sent, rows of an exact bucket) over useful rows: means over batches."""
    rng, sent, exact = np.random.default_rng(0), [], []
    for _ in range(batches):
        expert_ABT = draw(tokens, shares(experts, exponent, rng), rng)
        plan = routing.exchange(expert_ABT, experts, peers=PEERS)
        used_GX = (plan.send_AGXS[0] < tokens).sum(-1)
        sent.append(plan.send_AGXS.size / expert_ABT.size)
        exact.append(used_GX.max() * PEERS * PEERS / expert_ABT.size)
    return statistics.mean(sent), statistics.mean(exact)


def plan_ms(tokens: int, experts: int, turns: int = 300) -> float:
    """Median milliseconds of one plan for `tokens` tokens in all."""
    rng = np.random.default_rng(0)
    expert_ABT = draw(tokens // PEERS, shares(experts, 0.0, rng), rng)
    seconds = []
    for _ in range(turns):
        began = time.perf_counter()
        routing.exchange(expert_ABT, experts, peers=PEERS)
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


# ---- time ---------------------------------------------------------------------------------------


def planned_ffn(x_BTD, w, route):
    """The library's."""
    return parallel.ffn(x_BTD, SimpleNamespace(**w), route)


def run_expert(x_ND, w):
    h_NC = jax.nn.silu(x_ND @ w["w_gate"][0].T) * (x_ND @ w["w_up"][0].T)
    return h_NC @ w["w_down"][0]


def gathered(run):
    """run(all tokens [N, D], weights of the device's expert, route) -> [N, D] between all-gather and reduce-scatter."""

    def local(w, x_BTD, route):
        x_ND = jax.lax.all_gather(x_BTD.reshape(-1, x_BTD.shape[-1]), "expert", tiled=True)
        y_MD = jax.lax.psum_scatter(run(x_ND, w, route), "expert", tiled=True)
        return jax.lax.psum(y_MD, "model").reshape(x_BTD.shape)

    def ffn(x_BTD, w, route):
        specs = ({name: parallel.WEIGHT for name in w}, parallel.TOKENS, spec("batch", None))
        return jax.shard_map(local, in_specs=specs, out_specs=parallel.TOKENS)(w, x_BTD, route)

    return ffn


def run_all(x_ND, w, expert_BT):
    expert_N = jax.lax.all_gather(expert_BT.reshape(-1), "expert", tiled=True)
    return jnp.where((expert_N == jax.lax.axis_index("expert"))[:, None], run_expert(x_ND, w), 0)


def run_planned(x_ND, w, row_GQ):
    """row_GQ: int32 rows of all tokens that the device runs, N for none."""
    x_QD = x_ND.at[row_GQ[0]].get(mode="fill", fill_value=0)
    return jnp.zeros_like(x_ND).at[row_GQ[0]].add(run_expert(x_QD, w), mode="drop")


def value_and_grad(ffn):
    @jax.jit
    def both(x, w, route, cotangent):
        y, back = jax.vjp(lambda x, w: ffn(x, w, route), x, w)
        return y, back(cotangent)

    return both


def compare(rows: int, turns: int) -> dict[str, float]:
    """Median seconds of each way at `rows` rows a pair in the mean, one expert a device."""
    rng, tokens = np.random.default_rng(1), rows * PEERS
    expert_ABT = draw(tokens, shares(PEERS, 0.0, rng), rng)
    plan = routing.exchange(expert_ABT, PEERS, peers=PEERS)
    first_G1 = tokens * np.arange(PEERS)[:, None]
    send_GXS = plan.send_AGXS[0]
    all_GXS = np.where(send_GXS < tokens, send_GXS + first_G1[:, :, None], PEERS * tokens)
    routes = {
        "parallel": jax.tree.map(lambda a: a[0], parallel.place(plan, put)),
        "gather": put(expert_ABT[0], spec("batch", None)),
        "gather, planned": put(all_GXS.swapaxes(0, 1).reshape(PEERS, -1).astype(np.int32), spec("batch", None)),
    }
    ffns = {"parallel": planned_ffn, "gather": gathered(run_all), "gather, planned": gathered(run_planned)}
    x, cotangent = (put(rng.normal(size=(PEERS, tokens, EMBED)).astype(np.float32), parallel.TOKENS) for _ in range(2))
    w = {n: rng.normal(size=(PEERS, CHANNELS, EMBED)).astype(np.float32) / EMBED**0.5 for n in NAMES}
    w = {name: put(value, parallel.WEIGHT) for name, value in w.items()}
    steps = {name: value_and_grad(ffn) for name, ffn in ffns.items()}
    results = {name: jax.tree.leaves(step(x, w, routes[name], cotangent)) for name, step in steps.items()}
    for name, leaves in results.items():
        for got, want in zip(leaves, results["gather"], strict=True):
            error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
            if not error < TOLERANCE:
                sys.exit(f"{name} differs from gather by {error:.1e} of the largest value at {rows} rows a pair")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            # once untimed: memory that the way before gave back to the system is fetched again
            for timed in (False, True):
                began = time.perf_counter()
                jax.block_until_ready(step(x, w, routes[name], cotangent))
                if timed:
                    seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(s) for name, s in seconds.items()} | {"sent": send_GXS.size / expert_ABT.size}


# ---- programs -----------------------------------------------------------------------------------


class Compiles:
    """Counts programs that XLA compiles or takes from its cache on disk."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def random_steps(count: int, tokens: int = 512) -> tuple[int, int, int]:
    """(programs of the FFN, compiles in `count` steps of any skew after warm-up, tokens that got no expert)."""
    rng, compiles = np.random.default_rng(2), Compiles()
    x = put(rng.normal(size=(PEERS, tokens, SMALL)).astype(np.float32), parallel.TOKENS)
    w = {n: put(rng.normal(size=(PEERS, SMALL, SMALL)).astype(np.float32), parallel.WEIGHT) for n in NAMES}

    @jax.jit
    def step(x, w, routes):
        route = jax.tree.map(lambda a: a[0], routes)
        y, back = jax.vjp(lambda x, w: planned_ffn(x, w, route), x, w)
        # a token that no expert ran is zero: random weights make no zeros
        return back(y), jnp.sum(jnp.all(y == 0, -1))

    def run(expert_ABT, rows=None):
        plan = routing.exchange(expert_ABT, PEERS, peers=PEERS, rows=rows)
        return int(step(x, w, parallel.place(plan, put))[1])

    balanced_ABT = np.broadcast_to(np.arange(tokens, dtype=np.int32) % PEERS, (1, PEERS, tokens))
    dropped = sum(run(balanced_ABT, rows) for rows in routing.ladder(tokens, PEERS))
    programs, before = step._cache_size(), compiles.count
    for _ in range(count):
        exponent = rng.choice([0.0, rng.uniform(0, 4)])
        dropped += run(draw(tokens, shares(PEERS, exponent, rng), rng))
    return programs, compiles.count - before, dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1000, help="random batches of each padding figure")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each way")
    parser.add_argument(
        "--steps", type=int, default=1000, help="random steps after warm-up in which nothing may compile"
    )
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    figures: dict[str, float] = {}

    print(f"{PEERS} devices, {jax.devices()[0].device_kind}; {args.batches} batches")
    print(f"{'rows sent / useful':34}{'experts':>8}{'sent':>8}{'limit':>8}{'aim':>6}")
    for tokens in (512, 4096):
        for name, exponent, aim in (("uniform", 0.0, 1.3), ("zipf08", 0.8, 2.6)):
            for experts in (8, 16):
                sent, exact = padding(tokens, experts, exponent, args.batches)
                figures[f"padding_{name}_{tokens}_{experts}_experts"] = sent
                label = f"{name}, {tokens} tokens a device"
                print(f"{label:34}{experts:8}{sent:8.2f}{exact:8.2f}{aim:6.1f}", flush=True)
    figures["padding_uniform_512"] = figures["padding_uniform_512_8_experts"]
    figures["padding_zipf08"] = figures["padding_zipf08_512_16_experts"]

    figures["plan_ms_4096"] = max(plan_ms(4096, experts) for experts in (8, 16))
    print(f"plan of 4096 tokens: {figures['plan_ms_4096']:.2f} ms (aim 0.5)")

    with use_mesh(MeshConfig(data=1, expert=PEERS)):
        print(
            f"\n{'rows a pair':>12}{'parallel':>10}{'gather':>10}{'planned':>10}{'speed-up':>10}{'rows':>7}{'aim':>5}"
        )
        for rows, aim in ((64, 2), (512, 6)):
            got = compare(rows, args.turns)
            ours, gather, planned = (1e3 * got[name] for name in ("parallel", "gather", "gather, planned"))
            figures[f"speedup_allgather_{rows}"] = gather / ours
            figures[f"speedup_planned_gather_{rows}"] = planned / ours
            ratio = PEERS / got["sent"]
            print(
                f"{rows:12}{ours:7.0f} ms{gather:7.0f} ms{planned:7.0f} ms{gather / ours:10.1f}{ratio:7.1f}{aim:5}",
                flush=True,
            )
        programs, recompiles, dropped = random_steps(args.steps)
    figures |= {"programs": programs, "recompiles_1000": recompiles, "dropped": dropped}
    print(f"\n{programs} programs (aim 24), {recompiles} compiles in {args.steps} steps more, {dropped} tokens dropped")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
