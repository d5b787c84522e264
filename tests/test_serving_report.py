"""Figures of hand-made requests and steps, computed by hand; the names are those of `vllm bench serve`."""

import dataclasses

import numpy as np
import pytest

from readme_jax.config import ConfigError
from readme_jax.serving import report
from readme_jax.serving.report import Served, Step

REQUESTS = [
    Served(arrival=0.0, tokens=(1.0, 1.5, 3.0), prompt=4, passed_over=2),
    Served(arrival=0.5, tokens=(0.75,), prompt=2, preempted=1),
    Served(arrival=1.0, tokens=(2.0, 2.5), prompt=6),
    Served(arrival=1.0, tokens=(1.25,), prompt=6, cancelled=True),
]
STEP = Step(
    start=0.0, end=1.0, stall=0.25, requests=2, prefill=6, decode=0, live=3, experts=2, pages=10, missing=4,
    hit_tokens=9.0, layers=2, page_bytes=100, moved=400, route=0.1,
)  # fmt: skip
STEPS = [
    STEP,
    dataclasses.replace(STEP, start=1.5, end=3.5, stall=0.0, prefill=0, decode=2, pages=6, missing=0, hit_tokens=4.0,
                        moved=0, waves=2, route=0.0),
]  # fmt: skip


def test_latencies_of_requests():
    figures = report.request_figures(REQUESTS, 4.0, {"ttft": 900.0, "e2el": 2000.0})
    assert figures["completed"] == 3 and figures["cancelled"] == 1
    assert figures["total_input_tokens"] == 12 and figures["total_output_tokens"] == 6
    assert figures["request_throughput"] == 0.75 and figures["output_throughput"] == 1.5
    assert figures["total_token_throughput"] == 4.5
    assert figures["mean_ttft_ms"] == 750.0 and figures["median_ttft_ms"] == 1000.0
    assert figures["mean_tpot_ms"] == 750.0  # (3 - 1) / 2 and (2.5 - 2) / 1; one token has none
    assert figures["mean_itl_ms"] == pytest.approx(1e3 * (0.5 + 1.5 + 0.5) / 3)
    assert figures["mean_e2el_ms"] == pytest.approx(1e3 * (3 + 0.25 + 1.5) / 3)
    assert figures["p95_e2el_ms"] == pytest.approx(np.percentile([3000, 250, 1500], 95))
    assert figures["request_goodput"] == 0.25  # only the second keeps both limits
    assert figures["mean_reorder_ms"] == pytest.approx(250 / 3) and figures["mean_reorder"] == pytest.approx(1 / 3)
    assert figures["max_passed_over"] == 2 and figures["preemptions"] == 1


def test_names_of_vllm():
    figures = report.request_figures(REQUESTS, 4.0)
    for kind in ("ttft", "tpot", "itl", "e2el"):
        assert {f"mean_{kind}_ms", f"median_{kind}_ms", f"std_{kind}_ms", f"p99_{kind}_ms"} <= set(figures)
    assert "request_goodput" not in figures


def test_overtakings():
    counts, delays = report.overtakings(REQUESTS[:3])
    assert counts.tolist() == [1, 0, 0] and delays.tolist() == [0.25, 0.0, 0.0]
    rng = np.random.default_rng(0)
    many = [Served(arrival=float(i), tokens=(float(t),), prompt=1) for i, t in enumerate(rng.permutation(60))]
    first = [r.tokens[0] for r in many]
    assert report.overtakings(many)[0].tolist() == [sum(b < first[i] for b in first[i + 1 :]) for i in range(60)]
    assert [values.tolist() for values in report.overtakings([])] == [[], []]


def test_figures_of_steps():
    figures = report.step_figures(STEPS)
    assert figures["hit_ratio"] == figures["byte_hit_ratio"] == 0.75
    assert figures["token_hit_ratio"] == 13 / 16
    assert figures["bytes_moved"] == 400 and figures["pages_loaded"] == 4 and figures["bytes_wasted"] == 0
    assert figures["stall_share"] == 0.25 / 3 and figures["busy_share"] == 3 / 3.5
    assert figures["router_share"] == pytest.approx(0.1 / 3)
    assert figures["pages_per_layer"] == 4.0 and figures["max_waves"] == 2
    assert report.step_figures([]) == {"steps": 0}


def test_all_figures():
    figures = report.figures(REQUESTS, STEPS, 4.0, least_loads=2)
    assert figures["bytes_per_generated_token"] == 400 / 6
    assert figures["loads_over_min"] == 2.0
    text = report.table({"ours": figures, "theirs": report.figures(REQUESTS, [], 4.0)})
    lines = text.splitlines()
    assert len(lines) == 3 and lines[0].split()[:2] == ["TTFT", "ms"] and "/MIN" in lines[0]
    assert len(set(map(len, lines))) == 1


def test_bad_input():
    with pytest.raises(ConfigError, match="goodput: itl"):
        report.request_figures(REQUESTS, 4.0, {"itl": 3.0})
    with pytest.raises(ConfigError, match="duration=0"):
        report.request_figures(REQUESTS, 0)
