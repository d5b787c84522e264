"""The simulator: clocks by hand, what must hold for every way of serving, the study around it, and its program."""

import collections
import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from readme_jax.config import ConfigError, ReadMeError, RouterConfig
from readme_jax.infer import simulate as program
from readme_jax.serving import machines, paper, report, study, trace_files, traces
from readme_jax.serving.bank import Bank
from readme_jax.serving.machines import Assumed, Costs, Rows
from readme_jax.serving.policies import POLICIES, Limits
from readme_jax.serving.residency import POLICIES as RESIDENCIES
from readme_jax.serving.simulate import TRANSFERS, Serving, Simulation
from readme_jax.serving.traces import ArrivalsConfig, RoutedRequest

CFG = dataclasses.replace(machines.MODELS["smollm2-135m"], layer=4)
C = CFG.mlp // 2
LIMITS = Limits(batch_requests=4, batch_tokens=32, chunk=16, max_live=16)


def case(memory="0.5x", storage="separate", page=C // 4, assumed=None, kv_memory="64MiB"):
    row = 3 * CFG.embed * 2
    bank = Bank.synthetic(layers=4, experts=4, channels=C, row_bytes=row, storage=storage, page=page, mlp=CFG.mlp)
    shape = study.Shape(cfg=CFG, channels=C, router=RouterConfig(), bank=bank)
    return study.make_case(shape, machines.find("v5e", assumed), memory, kv_memory=kv_memory)


def drawn(count=30, rate=1e9, seed=0, prompt=12.0, output=8.0):
    arrivals = ArrivalsConfig(requests=count, rate=rate, prompt_mean=prompt, output_mean=output, seed=seed)
    lengths = traces.clip(traces.generate(arrivals), 64)
    return list(traces.route(lengths, traces.RouterConfig(experts=4, zipf=0.0, seed=seed)))


def job(prompt, output, arrival=0.0):
    return RoutedRequest(arrival, np.array(prompt, np.int16), np.array(output, np.int16))


# ---- clocks ---------------------------------------------------------------------------------------


def test_one_request_takes_the_sum_of_its_parts():
    where = case("1.0x")
    figures, simulation = study.run(where, Serving(limits=LIMITS, transfers="on-demand"), [job([0] * 5, [0, 1, 0])])
    costs, bank, pages = where.costs, where.bank, where.bank.pages // 4
    layers = bank.layers

    def seconds(rows, pages_P):
        overhead = costs.machine.assumed.layer_overhead
        ffn = costs.ffn(rows, np.full(layers, pages_P), bank.pages) + overhead + costs.attention(rows)
        return ffn.sum() + costs.head(rows) + costs.route(1, rows.context)

    # prompt of five, then experts 0 and 1 of the first two output tokens; the third is only sampled
    prefill = Rows(decode=0, prefill=5, sampled=1, context=5, square=15)
    decodes = [Rows(decode=1, prefill=0, sampled=1, context=n, square=n) for n in (6, 7)]
    compute = costs.route(5, 5) + sum(seconds(rows, pages) for rows in (prefill, *decodes))
    transfer = simulation.link.seconds(pages * bank.page_bytes) * layers * 2  # each expert once
    assert simulation.clock == pytest.approx(compute + transfer, rel=1e-12)
    assert figures["stall_s"] == pytest.approx(transfer, rel=1e-9)
    assert [len(served.tokens) for served in simulation.requests] == [3]
    assert figures["bytes_moved"] == 2 * layers * pages * bank.page_bytes
    assert figures["hit_ratio"] == pytest.approx(1 / 3)


def test_modes_of_transfer_differ_only_in_when():
    jobs, results = drawn(), {}
    for transfers in TRANSFERS:
        way = Serving(schedule="fcfs", transfers=transfers, limits=LIMITS, ahead=1e9)
        results[transfers] = study.run(case("0.9x", "tied", 16), way, jobs)[0]
    demand, layer, prefetch = (results[t] for t in TRANSFERS)
    assert demand["bytes_moved"] == layer["bytes_moved"] == prefetch["bytes_moved"]
    assert prefetch["stall_s"] < layer["stall_s"] < demand["stall_s"]
    assert demand["hidden_share"] == pytest.approx(0, abs=1e-9)
    assert prefetch["hidden_share"] > max(0.95, layer["hidden_share"])


def test_the_next_batch_is_chosen_ahead_when_there_is_enough_to_choose_from():
    jobs = drawn(40)

    def run(residency, ahead):
        serving = Serving(schedule="fcfs", residency=residency, limits=LIMITS, ahead=ahead)
        return study.run(case("0.75x"), serving, jobs)[1]

    # with lru: a lookahead that is asked late knows every next token, and evicts better for it
    late, early = run("lru", 1e9), run("lru", 1.0)
    gaps = [b.start - a.end for a, b in itertools.pairwise(early.steps)]
    assert min(gaps) >= 0 and len(early.requests) == len(late.requests) == 40
    # a request is never in two batches at once, so a batch chosen early has others in it
    assert early.optimum.stall < late.optimum.stall
    assert run("lookahead", 1.0).optimum.stall < 0.6 * early.optimum.stall


def test_requests_that_come_while_a_step_runs_wait_no_longer_than_it():
    where = case("1.0x")
    warm = [job([0, 1, 2, 3], [0, 1, 2, 3] * 8)]
    alone = study.run(where, Serving(limits=LIMITS), warm)[1]
    middle = (alone.steps[9].start + alone.steps[9].end) / 2
    both = study.run(where, Serving(limits=LIMITS), [*warm, job([0] * 4, [0, 0], arrival=middle)])[1]
    late = next(served for served in both.requests if served.arrival == middle)
    assert late.tokens[0] - middle < 3 * (alone.steps[9].end - alone.steps[9].start)


# ---- what always holds ----------------------------------------------------------------------------

WAYS = [
    (schedule, residency, TRANSFERS[i % 3], ("layer", "column")[i % 2])
    for i, (schedule, residency) in enumerate(itertools.product(POLICIES, RESIDENCIES))
]


@pytest.mark.parametrize("schedule, residency, transfers, mode", WAYS)
def test_every_way_of_serving(schedule, residency, transfers, mode):
    way = Serving(
        schedule=schedule, residency=residency, transfers=transfers, residency_mode=mode, limits=LIMITS, ahead=1.0
    )
    jobs = drawn(25, rate=400.0, seed=1)
    where = case(storage="tied", page=16) if residency == "lfu" else case()
    figures, simulation = study.run(where, way, jobs, least=True, keep=True)
    served = sorted(simulation.requests, key=lambda r: r.arrival)
    assert [len(r.tokens) for r in served] == [len(j.output_experts) for j in jobs]
    assert all(r.tokens[0] > r.arrival and np.all(np.diff(r.tokens) > 0) for r in served)
    steps = simulation.steps
    assert all(a.end <= b.start for a, b in itertools.pairwise(steps))
    assert sum(s.prefill + s.decode for s in steps) == sum(
        len(j.prompt_experts) + len(j.output_experts) - 1 for j in jobs
    )
    assert figures["bytes_wasted"] == 0
    assert simulation.link.moved == simulation.residency.counters.bytes_loaded == figures["bytes_moved"]
    assert figures["least_stall_s"] <= figures["stall_s"] + 1e-12
    assert simulation.optimum.end <= simulation.clock + 1e-12
    assert 0 <= figures["hidden_share"] <= 1 and figures["loads_over_min"] >= 1
    assert figures["stall_s"] <= simulation.link.busy + 1e-12
    assert simulation.pool.available == simulation.pool.pages and simulation.pending == 0
    if figures["wait_bound"]:
        assert figures["p99_wait"] <= figures["wait_bound"]
    compute = [end - begin for begin, end in simulation.passes]
    assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(simulation.passes)) and min(compute) > 0


def test_the_same_twice():
    runs = [study.run(case(), Serving(limits=LIMITS, residency="random"), drawn(), seed=3)[0] for _ in range(2)]
    assert runs[0] == runs[1]


def test_waves_where_a_batch_exceeds_the_memory():
    where = case(6 * case().bank.page_bytes)  # a layer of one expert has four pages
    figures, simulation = study.run(where, Serving(schedule="fcfs", limits=LIMITS), drawn(10))
    assert figures["max_waves"] > 1 and figures["completed"] == 10
    assert all(np.isfinite(served.tokens).all() for served in simulation.requests)


def test_tied_pages_in_the_memory_of_two_experts():
    two = case().bank.total_bytes // 2
    tied = study.run(case(two, "tied", 16), Serving(limits=LIMITS), drawn(40))[1]
    separate = study.run(case(two), Serving(limits=LIMITS), drawn(40))[1]
    later = [report.step_figures(run.steps[len(run.steps) // 2 :]) for run in (tied, separate)]
    assert later[0]["byte_hit_ratio"] == 1.0 and later[0]["bytes_moved"] == 0
    assert later[1]["byte_hit_ratio"] < 0.95


def test_ours_moves_fewer_bytes_than_the_baseline_and_is_faster():
    where, jobs = case("0.25x"), drawn(60)
    serving = Serving(limits=dataclasses.replace(LIMITS, max_live=24))
    base, ours = (study.run(where, way, jobs)[0] for way in (study.baseline(serving), serving))
    assert base["bytes_moved"] > 2 * ours["bytes_moved"]
    assert ours["mean_e2el_ms"] < 0.7 * base["mean_e2el_ms"] and ours["p95_e2el_ms"] < 0.6 * base["p95_e2el_ms"]


def test_short_soak():
    """Five thousand requests: nothing is left, nothing grows."""
    where = case(page=C)
    served, steps = collections.deque(maxlen=100), collections.deque(maxlen=100)
    simulation = Simulation(
        where.costs, where.bank, Serving(limits=Limits(batch_requests=32, max_live=64)), kv_pages=64,
        expert_memory=where.expert_memory, requests=served, steps=steps,
    )  # fmt: skip
    simulation.run(iter(drawn(5000, rate=20_000.0, prompt=4.0, output=3.0)))
    assert simulation.pending == 0 and simulation.scheduler.unfinished == 0
    assert simulation.pool.available == simulation.pool.pages == 64
    link, slots = simulation.link, simulation.residency.slot_of
    assert not link._held and not link._coming and not link._released and not link._open and not link._left
    assert len(link._arrival) <= where.bank.layers
    held = np.flatnonzero(slots >= 0)
    assert (simulation.residency.item_of[slots[held]] == held).all()
    assert len(simulation.optimum._gaps) < 2000 and len(simulation.optimum._ends) <= 5000


# ---- machines -------------------------------------------------------------------------------------


def test_roofline():
    machine = machines.find("a100-80", Assumed(flops_share=1.0, memory_share=1.0))
    assert machine.seconds(312e12, 0) == 1.0 and machine.seconds(312e12, 2 * 2039e9) == 2.0
    costs = Costs(machine, machines.MODELS["llama2-7b"], 5504, RouterConfig(), 7, 5504)
    assert costs.kv_bytes == 524288  # 2 x 4096 x 2 bytes x 32 layers
    dense = costs.fixed_bytes + 32 * 11008 * costs.row_bytes
    assert dense - costs.cfg.vocab * 512 * 2 == pytest.approx(2 * 6.74e9, rel=0.01)  # the model's 6.74 B parameters
    one = Rows(decode=1, prefill=0, sampled=1, context=1, square=1)
    assert costs.ffn(one, np.array([1, 2]), 7).tolist() == [5504 * n * costs.row_bytes / 2039e9 for n in (1, 2)]
    every = dataclasses.replace(costs, read="all")
    assert every.ffn(one, np.array([1, 2]), 7).tolist() == [5504 * 7 * costs.row_bytes / 2039e9] * 2


def test_machines_have_their_links():
    assert {"a100-80", "h100", "gh200", "v5e", "v5p"} <= set(machines.MACHINES)
    assert machines.find("gh200").link > 7 * machines.find("h100").link > 7 * machines.find("a100-80").link
    with pytest.raises(ConfigError, match="machine='tpu9' is not known"):
        machines.find("tpu9")
    with pytest.raises(ConfigError, match="link_share=2"):
        Assumed(link_share=2)


# ---- the study ------------------------------------------------------------------------------------


def test_capacity_and_rate():
    where, serving, jobs = case(), Serving(limits=LIMITS), drawn(30, rate=10.0)
    carried = study.capacity(where, serving, jobs)
    slow = study.at_rate(jobs, 0.2 * carried)
    assert (len(slow) - 1) / (slow[-1].arrival - slow[0].arrival) == pytest.approx(0.2 * carried)
    assert study.run(where, serving, slow)[0]["mean_live"] < 4
    with pytest.raises(ConfigError, match="arrivals"):
        study.at_rate(drawn(5)[:1], 1.0)


def test_what_does_not_fit():
    shape = study.named_shape("llama2-70b")
    with pytest.raises(ConfigError, match="no room for keys and values: a100-80 has 80.0 GB"):
        study.make_case(shape, machines.find("a100-80"), "0.25x")
    with pytest.raises(ConfigError, match="at least"):
        study.run(case("0.01x"), Serving(limits=LIMITS), drawn(3))
    with pytest.raises(ConfigError, match="kv_memory=20GiB must be"):
        study.make_case(study.named_shape("llama2-7b"), machines.find("v5e"), 10**9, kv_memory="20GiB")
    with pytest.raises(ConfigError, match="is neither a carved model's folder nor one of llama2-7b"):
        study.named_shape("llama9")


def test_shape_of_a_carved_folder(stages):
    shape = study.named_shape(str(stages.carved), page=4)
    assert shape.bank.layers == shape.cfg.layer and shape.bank.storage == "tied"
    assert shape.bank.page_bytes == 4 * 3 * shape.cfg.embed * 2
    with pytest.raises(ConfigError, match="is dense"):
        study.named_shape(str(stages.dense))


def test_paper_beside_ours():
    assert paper.column_hits([frozenset({0}), frozenset({1})] * 10, 2, "lru", 8) == 90.0
    assert paper.column_hits([frozenset({i % 3}) for i in range(30)], 2, "lru", 8) == 0.0
    assert paper.column_hits([frozenset({i % 3}) for i in range(30)], 2, "lookahead", 8) > 40
    where = study.make_case(study.named_shape("llama2-7b"), machines.find("a100-80"), "1.0x")
    lengths = traces.generate(ArrivalsConfig(requests=12, rate=2.0, prompt_mean=8, output_mean=8))
    jobs = list(traces.route(lengths, traces.RouterConfig()))
    ours = paper.figures(where, Serving(schedule="longest-queue", limits=LIMITS), jobs)
    text = paper.table(ours)
    assert "34.2" in text and "5.21" in text and "-6.1" in text
    assert len(ours["hit_percent"]["lru"]) == 4 and set(ours["unique_experts"]) == set(paper.UNIQUE)


# ---- the program ----------------------------------------------------------------------------------

SMALL = [
    "--model", "smollm2-135m", "--machine", "v5e", "--kv-memory", "64MiB", "--limit", "12", "--arrivals.prompt-mean",
    "8", "--arrivals.output-mean", "6", "--serving.limits.batch-requests", "4",
]  # fmt: skip


def test_program(tmp_path, capsys):
    memory = ["--expert-memory", "0.3x", "0.6x"]
    file, folder = tmp_path / "out.json", tmp_path / "pictures"
    options = ["--policies", "ablation", "--json", str(file), "--plots", str(folder), "--optimum"]
    program.main([*SMALL, *memory, *options])
    shown = capsys.readouterr().out
    assert "+ tied pages" in shown and "last over first: mean latency" in shown
    results = json.loads(file.read_text())["results"]
    assert set(results) == {"0.3x", "0.6x"} and len(results["0.3x"]) == 6
    assert results["0.3x"]["fcfs + lru + on-demand"]["completed"] == 12
    assert {p.name for p in folder.iterdir()} == {"latency.png", "hits.png", "bytes.png", "timeline.png"}


def test_program_reads_traces(tmp_path, capsys):
    path = tmp_path / "azure.csv"
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2023-11-16 18:15:{46 + i}.6805900,{20 + i},{4 + i}" for i in range(5)]
    path.write_text("\n".join(rows) + "\n")
    program.main([*SMALL, "--trace", str(path), "--load", "0", "--policies", "one"])
    assert "5 requests, 1.25 a second, 22 + 6 tokens" in capsys.readouterr().out


def test_program_reads_routing_traces(tmp_path, capsys):
    path = tmp_path / "routed.jsonl"
    with trace_files.RoutingRecorder(path, 7) as recorder:
        for i in range(4):
            recorder.write(job([i, i, 6 - i], [i, 0], arrival=0.5 * i))
    file = tmp_path / "out.json"
    program.main([*SMALL, "--routed", str(path), "--load", "0", "--policies", "one", "--json", str(file)])
    assert "4 requests, 2.67 a second, 3 + 2 tokens" in capsys.readouterr().out
    (results,) = json.loads(file.read_text())["results"].values()
    assert next(iter(results.values()))["total_output_tokens"] == 8
    with trace_files.RoutingRecorder(path, 7) as recorder:
        recorder.write(job([1, 2], [0], arrival=3.0))
    program.main([*SMALL, "--routed", str(path), "--load", "0", "--policies", "one"])
    assert "1 requests, all at once, 2 + 1 tokens" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="has 7 experts, the model 4"):
        program.main([*SMALL, "--routed", str(path), "--routing.experts", "4"])


def test_program_refuses_what_it_could_not_write(tmp_path, monkeypatch):
    monkeypatch.setattr(program.study, "run", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OSError, match="taken"):
        program.main([*SMALL, "--plots", str(tmp_path / "taken")])
    with pytest.raises(ReadMeError, match="json=.*: is a folder"):
        program.main([*SMALL, "--json", str(tmp_path)])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--machine", "abacus"], "machine='abacus' is not known"),
        (["--expert-memory", "lots"], "expert_memory='lots'"),
        (["--expert-memory", "0.001x"], "at least"),
        (["--limit", "1"], "limit=1 must be at least 2"),
        (["--load", "-1"], "load=-1"),
        (["--goodput", "itl", "5"], "goodput: itl"),
        (["--trace", "nowhere.csv"], "nowhere.csv"),
        (["--paper", "--routing.experts", "5"], "paper: has 7 experts"),
    ],
)
def test_program_refuses(options, message):
    with pytest.raises(ReadMeError, match=message):
        program.main([*SMALL, *options])


def test_benchmark_of_policies_runs(capsys, monkeypatch, tmp_path):
    path = Path(__file__).parents[1] / "benchmarks" / "policies.py"
    spec = importlib.util.spec_from_file_location("benchmark_policies", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = tmp_path / "soak.json"
    monkeypatch.setattr(sys, "argv", ["policies.py", "--soak", "--soak-requests", "500", "--json", str(file)])
    module.main()
    assert json.loads(file.read_text())["soak"]["requests left"] == 0
