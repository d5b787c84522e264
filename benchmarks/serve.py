"""Tokens per second of the engine beside Hugging Face `generate` in PyTorch, on the same machine in the same run.

    python benchmarks/serve.py --model runs/tuned --dense runs/dense --data runs/data --json serve.json

1, 8 and 32 requests at once, all there from the beginning, greedy, each with a prompt of held-out text and an output of
`--tokens` tokens; rates are output tokens over the time until the last one, prefill included. Hugging Face gets them in
two ways: one after the other, and as one batch padded on the left; `ratio_*` is ours over the better of the two on our
exported folder, which computes the same function. The dense model is printed beside it. Router share: routing of
prompts, and the router's step on every sampled token, of the time in steps. Host share: time in steps with no batch on
the device; both the largest of the three. Then 1,000 steps of random requests, of which some are cancelled, count what
is compiled.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from readme_jax import api
from readme_jax.data import open_records
from readme_jax.export import export
from readme_jax.serving.engine import Engine
from readme_jax.serving.request import SamplingParams
from readme_jax.serving.traces import TraceRequest, with_prompts

LIVE = (1, 8, 32)
ONE_BY_ONE = 8  # requests run one after the other at most: their rate does not depend on how many follow
SHORTEST, LONGEST = 32, 96  # tokens of a prompt
RANDOM_STEPS = 1000
SPENT = ("steps", "step_s", "route_s", "busy_s")


def prompts(data: str, vocab: int, count: int, seed: int) -> list[list[int]]:
    """Token ids of held-out text, of mixed lengths and domains."""
    rng = np.random.default_rng(seed)
    trace = [TraceRequest(0.0, int(n), 1) for n in rng.integers(SHORTEST, LONGEST + 1, count)]
    return [one.prompt or [] for one in with_prompts(trace, open_records(data, "test", vocab), seed)]


# ---- Hugging Face -----------------------------------------------------------------------------


def padded(asked: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and attention mask [B, T], padded on the left."""
    width = max(map(len, asked))
    ids = torch.zeros(len(asked), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(asked):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@torch.inference_mode()
def hf_batch(model, asked: list[list[int]], tokens: int) -> list[list[int]]:
    """New tokens of the prompts as one batch."""
    ids, mask = padded(asked)
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return made[:, ids.shape[1] :].tolist()


def hf_each(model, asked: list[list[int]], tokens: int) -> list[list[int]]:
    """The same one after the other, of the first few."""
    return [hf_batch(model, [prompt], tokens)[0] for prompt in asked[:ONE_BY_ONE]]


# ---- ours -------------------------------------------------------------------------------------


def ours(engine: Engine, asked: list[list[int]], tokens: int) -> list[list[int]]:
    """New tokens of the prompts, all asked for at once."""
    return [out.tokens for out in engine.generate(asked, SamplingParams(max_new_tokens=tokens, ignore_eos=True))]


def random_steps(engine: Engine, asked: list[list[int]], steps: int) -> int:
    """Requests of every kind come and are cancelled at random; programs compiled meanwhile."""
    rng, before, live = np.random.default_rng(0), engine.stats()["compiles_after_start"], []
    for _ in range(steps):
        if engine.unfinished < 2 or engine.unfinished < 40 and rng.random() < 0.3:
            prompt = asked[rng.integers(len(asked))][: rng.integers(1, LONGEST)]
            sampling = SamplingParams(
                max_new_tokens=int(rng.integers(1, 48)), temperature=float(rng.choice([0.0, 0.7])),
                top_k=int(rng.choice([0, 20])), top_p=float(rng.choice([1.0, 0.9])), seed=int(rng.integers(1000)),
                repetition_penalty=float(rng.choice([1.0, 1.2])), n=int(rng.choice([1, 2])),
                logprobs=None if rng.random() < 0.8 else 5,
            )  # fmt: skip
            live.append(engine.add_request(prompt, sampling))
        if live and rng.random() < 0.03:
            engine.cancel(live[rng.integers(len(live))])
        engine.step()
    while engine.unfinished:
        engine.step()
    return engine.stats()["compiles_after_start"] - before


# ---- the comparison ---------------------------------------------------------------------------


def rate(run, *args) -> tuple[float, list[list[int]]]:
    """Tokens per second of a call, and its tokens."""
    start = time.perf_counter()
    made = run(*args)
    return sum(map(len, made)) / (time.perf_counter() - start), made


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of the rows that are equal, of those in both."""
    return float(np.mean([x == y for x, y in zip(a, b)]))


def compare(engine: Engine, exported, dense, asked: list[list[int]], tokens: int, repeats: int) -> dict[str, float]:
    """Median rates of every way for these requests, taken in turns; and how many rows came out the same."""
    ways = {
        "ours": (ours, engine),
        "hf_batch": (hf_batch, exported),
        "hf_each": (hf_each, exported),
        "dense_batch": (hf_batch, dense),
        "dense_each": (hf_each, dense),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    rows = {}
    for run, model in ways.values():  # once for what is only done once
        run(model, asked[:1], 4)
    for turn in range(repeats):
        for name, (run, model) in ways.items():
            for pool in (*engine.parts.pools, *engine.parts.router_pools):
                pool.forget_cached()  # no prefix of an earlier turn
            speed, rows[name] = rate(run, model, asked, tokens)
            rates[name].append(speed)
            print(f"  turn {turn}: {name} {speed:.1f} tokens/s", file=sys.stderr)
    found = {name: statistics.median(values) for name, values in rates.items()}
    return found | {"rows_equal": agreement(rows["ours"], rows["hf_batch"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="tuned model folder")
    parser.add_argument("--dense", required=True, help="the dense model it was made of")
    parser.add_argument("--data", required=True, help="folder of `readme-jax data`")
    parser.add_argument("--exported", help="folder of `readme-jax export`; made when not given")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each output")
    parser.add_argument("--repeats", type=int, default=3, help="turns; the median counts")
    parser.add_argument("--live", type=int, nargs="+", default=LIVE, help="requests at once")
    parser.add_argument("--steps", type=int, default=RANDOM_STEPS, help="random steps at the end")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    vocab = api.load(args.model, weights=False).config.vocab
    asked = prompts(args.data, vocab, max(args.live), seed=0)
    figures: dict[str, float] = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(args.exported or Path(folder) / "exported")
        if not exported.is_dir():
            export(Path(args.model), exported)
        hf = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, dtype=torch.float32).eval()
        dense = AutoModelForCausalLM.from_pretrained(args.dense, dtype=torch.float32).eval()
        options = dict(batch_requests=max(args.live), context=512, kv_memory="1GiB")
        with Engine(args.model, progress=True, **options) as engine:
            head = "requests     ours  HF batch  HF one by one  dense batch  dense one by one   ours/HF  rows equal"
            print(head)
            spent = {live: dict.fromkeys(SPENT, 0.0) for live in args.live}
            for live in args.live:
                before = engine.stats()
                found = compare(engine, hf, dense, asked[:live], args.tokens, args.repeats)
                spent[live] = {name: engine.stats()[name] - before[name] for name in SPENT}
                best = max(found["hf_batch"], found["hf_each"])
                figures |= {f"{name}_{live}": value for name, value in found.items()}
                figures[f"ratio_{live}"] = found["ours"] / best
                figures[f"dense_ratio_{live}"] = found["ours"] / max(found["dense_batch"], found["dense_each"])
                print(
                    f"{live:8d} {found['ours']:8.1f} {found['hf_batch']:9.1f} {found['hf_each']:14.1f}"
                    f" {found['dense_batch']:12.1f} {found['dense_each']:17.1f} {figures[f'ratio_{live}']:9.2f}"
                    f" {found['rows_equal']:11.2f}"
                )
            figures["recompiles_1000"] = random_steps(engine, asked, args.steps)
            figures["programs"] = engine.stats()["programs"]
            for live, parts in spent.items():  # last: timing the router alone compiles a program
                router_s = parts["route_s"] + parts["steps"] * engine.parts.runner.router_s(live)
                figures[f"router_share_{live}"] = router_s / parts["step_s"]
                figures[f"host_share_{live}"] = 1 - parts["busy_s"] / parts["step_s"]
            figures["router_share"] = max(figures[f"router_share_{live}"] for live in args.live)
            figures["host_share"] = max(figures[f"host_share_{live}"] for live in args.live)
    for live in args.live:
        router, host = figures[f"router_share_{live}"], figures[f"host_share_{live}"]
        print(f"{live:8d} requests: router {router:.2%} of the time in steps, host {host:.2%}")
    for name in ("router_share", "host_share", "recompiles_1000", "programs"):
        print(f"{name}: {figures[name]:.4g}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
