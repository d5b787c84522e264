"""readme-jax bench: a trace through the engine by pairs of policies, its files, and what broken input gets."""

import json
import re

import pytest
import served
from fake_runner import FakeRunner

from readme_jax import cli
from readme_jax.infer import bench
from readme_jax.serving import parts
from readme_jax.serving.options import RESIDENCIES, SCHEDULES
from readme_jax.serving.trace_files import read_routing

SMALL = ["--kv-memory", "256KiB", "--context", "120", "--kv-page", "4", "--expert-page", "4", "--batch-requests", "4"]
SMALL += ["--batch-tokens", "24", "--chunk", "10", "--expert-memory", "0.45x"]
DRAWN = ["--arrivals.requests", "10", "--arrivals.rate", "200", "--arrivals.prompt-mean", "20"]
DRAWN += ["--arrivals.output-mean", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.write(tmp_path_factory.mktemp("served"))


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(parts, "Runner", FakeRunner)


@pytest.fixture
def refused(capsys):
    """refused(words, *argv): the command fails with one line that holds the words, before any work."""

    def check(words, *argv):
        with pytest.raises(SystemExit) as stop:
            cli.run(cli.dispatch, ["bench", *map(str, argv)])
        out = capsys.readouterr()
        assert stop.value.code == 2 and not out.out, out
        assert re.fullmatch("error: [^\n]*\n", out.err), out.err
        for word in words:
            assert str(word) in out.err, out.err

    return check


def test_all_pairs(folder, stages, tmp_path, capsys):
    out = tmp_path / "bench"
    bench.main(
        [str(folder), "--policies", "all", "--data", str(stages.data), "--out", str(out), "--goal-e2el", "60000"]
        + SMALL + DRAWN
    )  # fmt: skip
    shown = capsys.readouterr().out
    pairs = [f"{schedule}+{residency}" for schedule in SCHEDULES for residency in RESIDENCIES]
    assert all(f"\n{pair} " in shown for pair in pairs) and "10 requests over" in shown
    found = json.loads((out / "bench.json").read_text())
    assert list(found["results"]) == pairs and found["config"]["expert_memory"] == "0.45x"
    outputs = {figures["total_output_tokens"] for figures in found["results"].values()}
    assert len(outputs) == 1, "every pair serves the same"
    for figures in found["results"].values():
        assert figures["completed"] == 10 and figures["request_goodput"] == figures["request_throughput"]
        assert {"mean_ttft_ms", "p99_tpot_ms", "p95_e2el_ms", "output_throughput"} <= figures.keys()
        assert figures["bytes_prefetch"] + figures["bytes_demand"] == figures["bytes_moved"]
        assert figures["loads_over_min"] >= 1 - 1e-9, "none is better than the optimum"
    assert {p.name for p in out.glob("*.png")} >= {"latency_cdf.png", "timeline.png", "hits_fcfs.png", "bytes_fcfs.png"}
    experts, routed = read_routing(out / "routing.jsonl")
    assert experts == served.EXPERTS and len(routed) == 10 and routed[0].arrival == 0
    assert sum(len(r.output_experts) for r in routed) == outputs.pop()
    for curves in found["memory_curves"].values():
        for curve in curves.values():
            loaded = [point["bytes_loaded"] for point in curve]
            assert len(curve) >= 5 and loaded[-1] <= loaded[0] and curve[-1]["token_hit_ratio"] > 0.5
    # with all pages resident, each is loaded once, whatever the policy
    for curves in found["memory_curves"].values():
        assert len({curve[-1]["bytes_loaded"] for curve in curves.values()}) == 1


def test_a_trace_file_at_a_rate(folder, stages, tmp_path, capsys):
    trace = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:{i:02d}:00.0,{10 + i},{3 + i}" for i in range(9)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    args = [str(folder), "--trace", str(trace), "--requests", "4", "--rate", "100", "--data", str(stages.data), *SMALL]
    bench.main(args)
    shown = capsys.readouterr().out
    assert "4 requests over 0.0 s, 46 prompt and 18 output tokens" in shown and "expert-aware+lookahead " in shown


def test_prompts_of_the_trace_itself(folder, tmp_path, capsys):
    trace = tmp_path / "own.jsonl"
    trace.write_text('{"arrival": 0, "prompt": "one two three", "output_tokens": 4}\n')
    bench.main([str(folder), "--trace", str(trace), *SMALL])
    assert "1 requests over 0.0 s" in capsys.readouterr().out


def test_held_out_text_of_the_model_is_found(stages, tmp_path, capsys):
    bench.main([str(stages.tuned), *SMALL, "--expert-memory", "1.0x", *DRAWN])
    assert "10 requests over" in capsys.readouterr().out


def test_bad_options(refused, folder, tmp_path):
    refused(["policies: 'fcfs+mru' is not `all` or one of fcfs+lookahead"], folder, "--policies", "fcfs+mru")
    refused(["schedule", "fifo"], folder, "--schedule", "fifo")
    refused(["expert_memory='5x': a share must be in (0, 1]x"], folder, "--expert-memory", "5x")
    refused(["goal_ttft=-1.0 must be 0 (none) or more"], folder, "--goal-ttft", "-1")
    refused(["rate=-2.0"], folder, "--trace", tmp_path / "x.csv", "--rate", "-2")
    refused(["model"], "--rate", "2")
    refused(["nowhere"], tmp_path / "nowhere")
    refused(["policies names the pairs"], folder, "--policies", "all", "--schedule", "fcfs")
    refused(["requests and rate are of a trace file"], folder, "--rate", "3")
    refused(["arrivals draws requests"], folder, "--trace", tmp_path / "x.csv", "--arrivals.rate", "3")


def test_a_result_that_cannot_be_written(refused, folder, stages, tmp_path):
    """Before the replay, not after it."""
    (tmp_path / "taken").write_text("mine")
    refused(["taken"], folder, "--out", tmp_path / "taken", "--data", stages.data)
    assert (tmp_path / "taken").read_text() == "mine"


def test_bad_models(refused, stages):
    data = ["--data", stages.data]
    refused(["dense: a dense model has no experts to serve by"], stages.dense, *data)
    refused(["carved: 3 experts but no router"], stages.carved, *data)


def test_budget_below_the_least(refused, folder, stages):
    least = ["expert_memory=5000 bytes must hold", "shared ones included: at least", "bytes ("]
    refused(least, folder, "--expert-memory", "5000", "--data", stages.data)


def test_bad_traces(refused, folder, stages, tmp_path):
    data = ["--data", stages.data]
    trace = tmp_path / "azure.csv"
    refused([f"{trace}: no such file"], folder, "--trace", trace, *data)
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    trace.write_text(head + "2023-11-16 18:00:00,10,5\n2023-11-16 18:00:01,ten,5\n")
    refused([f"{trace}:3: ContextTokens='ten' must be a whole number"], folder, "--trace", trace, *data)
    trace.write_text(head)
    refused([f"{trace}: no request in it"], folder, "--trace", trace, *data)
    trace.write_text(head + "2023-11-16 18:00:00,10,5\n")
    refused(["the trace has no prompts", "--data names held-out text"], folder, "--trace", trace)
    refused([tmp_path / "none"], folder, "--trace", trace, "--data", tmp_path / "none")
    own = tmp_path / "own.jsonl"
    own.write_text('{"arrival": 0, "prompt": [5, 6], "output_tokens": 4}\n')
    refused(["the trace has prompts of its own"], folder, "--trace", own, *data)
    wide = ["a request of 50 tokens needs 4 pages; kv_memory='20000' holds 2"]
    own.write_text('{"arrival": 0, "prompt": [5, 6], "output_tokens": 48}\n')
    refused(wide, folder, "--trace", own, "--kv-memory", "20000")
