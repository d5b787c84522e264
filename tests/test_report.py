"""The report: the shape is checked, the table fits a terminal, the page is self-contained, escaped and well-formed."""

import copy
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from readme_jax import report as rp
from readme_jax.config import ArtifactError
from readme_jax.report_page import HUES, gain, html_page, perplexity, relative
from readme_jax.report_parts import line_chart, ticks

NASTY = "<script>alert('x')</script> & \"quoted\" \x00\x1b[31m \u65e5\u672c\u8a9e \ud800"


def fake(experts: int = 7) -> dict:
    """A realistic report; figures close to METHOD's tables."""
    rng = np.random.default_rng(0)
    names = ["wikipedia", "python code", "stack answers", "papers", "news", "licenses", "manuals", "legal", "chat"]
    names = [names[i] if i < len(names) else f"expert {i}" for i in range(experts)]
    log_r = {
        "dense": 0,
        "static": 1.707,
        "own_domain": 1.515,
        "routed": 1.418,
        "static_tuned": 0.99,
        "routed_tuned": 0.875,
    }
    domains = {}
    for name in names:
        base, scale = rng.uniform(2.4, 3.4), rng.uniform(0.8, 1.2)
        domains[name] = {arm: base + x * scale + rng.normal() * 0.02 * (x > 0) for arm, x in log_r.items()}
    ladder = {arm: float(np.mean([d[arm] for d in domains.values()])) for arm in log_r}
    by_domain = 0.25 * rng.dirichlet(np.ones(experts), experts) + 0.75 * np.eye(experts)
    overlap = np.clip(0.69 + 0.07 * rng.normal(size=(experts, experts)), 0, 1)
    overlap = (overlap + overlap.T) / 2
    np.fill_diagonal(overlap, 1.0)

    def curve(start, end, steps):
        return [[s, end + (start - end) * math.exp(-4 * s / steps) + 0.05 * rng.normal()] for s in range(0, steps, 5)]

    text = "def mean(values):\n    return sum(values) / len(values)\n\nThe mean of a list is its sum over its length. "
    pieces = re.findall(r"\s?\w+|[^\w\s]|\s", text * 4)
    strip, expert = [], 0
    for piece in pieces:
        expert = int(rng.integers(experts)) if rng.random() < 0.2 else expert
        strip.append([piece, expert])
    stage = {"seconds": 61.3, "tokens": 28672, "tokens_per_s": 467.7, "peak_memory_gb": 1.83}
    return {
        "model": {"name": "SmolLM2-135M-Instruct", "source": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        "ladder": ladder,
        "domains": domains,
        "errors": {arm: 0.06 if arm == "dense" else 0.08 for arm in log_r} | {"gain": 0.021},
        "router": {
            "agreement": 0.823,
            "entropy": 0.61,
            "keeps_previous": 0.794,
            "steps": 400,
            "loss_curve": curve(2.4, 0.9, 400),
        },
        "experts": {
            "names": names,
            "channels": 768,
            "mlp": 1536,
            "load": by_domain.mean(0),
            "load_by_domain": by_domain,
            "overlap": overlap,
            "shared_share": 0.371,
            "union_share": 0.862,
            "load_max_over_mean": np.float32(1.12),
        },
        "curves": {
            "static_tuned": curve(1.8, 0.55, 120),
            "routed_tuned": curve(1.4, 0.45, 120),
            "router": curve(2.4, 0.9, 400),
        },
        "strip": strip,
        "samples": [
            {
                "prompt": "Explain what a mixture of experts is.",
                "dense": "A mixture of experts is a model that has several small networks and picks one of them.",
                "static_tuned": "A mixture of experts is a group of people who are experts in the field of a mixture.",
                "routed_tuned": "A mixture of experts is a model that uses several models, each good at a part.",
            },
            {
                "prompt": "def fibonacci(n):",
                "dense": "\n    if n < 2:\n        return n",
                "routed_tuned": "\n    return n",
            },
        ],
        "stages": {
            "import": {"seconds": 4.2, "tokens": None, "tokens_per_s": None, "peak_memory_gb": 0.91},
            **{
                name: dict(stage) for name in ("calibrate", "carve", "labels", "router", "static", "routed", "evaluate")
            },
        },
        "export": {
            "folder": "out/export",
            "checks": {
                "same experts on 1,000 tokens": True,
                "logits": {"ok": True, "value": 3.1e-5, "rule": "at most 1e-3"},
                "greedy tokens": {"ok": False, "value": "63 of 64", "rule": "all equal"},
                "torch": None,
                "bytes": 269_000_000,
            },
        },
        "versions": {"python": "3.11.9", "jax": "0.10.2", "transformers": "5.23.0"},
        "config": {"minutes": 15, "seed": 0, "alternate": {"rounds": 2, "lr": 2e-4}},
    }


class Page(HTMLParser):
    """Tags balanced, every attribute and all text collected."""

    VOID = {"meta"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def put(report: dict, path: str, value) -> dict:
    """A copy with `value` at `a.b.0`; the path's last key is removed when the value is `...`."""
    report = copy.deepcopy(report)
    *keys, last = path.split(".")
    part = report
    for key in keys:
        part = part[int(key)] if isinstance(part, (list, np.ndarray)) else part[key]
    last = int(last) if isinstance(part, (list, np.ndarray)) else last
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return report


def test_validate_gives_plain_values_that_survive_json():
    report = rp.validate(fake())
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert isinstance(report["experts"]["overlap"][0][0], float)
    assert report["experts"]["load_max_over_mean"] == pytest.approx(1.12)


@pytest.mark.parametrize(
    "path",
    [key for key in rp.REQUIRED]
    + [f"{key}.{name}" for key, names in rp.REQUIRED.items() for name in names or ()]
    + ["domains.news.routed", "stages.carve.seconds", "samples.0.routed_tuned"],
)
def test_a_missing_key_is_named(path):
    named = re.sub(r"\.(\d+)", r"[\1]", path)
    with pytest.raises(ArtifactError, match=re.escape(f"report: {named} is missing")) as caught:
        rp.validate(put(fake(), path, ...))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ladder.static", math.nan, "ladder.static is nan, a finite number is needed"),
        ("curves.router.3.1", math.inf, r"curves.router\[3\]\[1\] is inf"),
        ("ladder.dense", "3.1", "ladder.dense='3.1' is not a number"),
        ("ladder.extra", 1.0, "is missing|no such arm"),
        ("domains.news.oracle", 1.0, "domains.news.oracle: no such arm"),
        ("domains", {}, "domains is empty"),
        ("errors.elsewhere", 0.1, "errors.elsewhere is not in the ladder"),
        ("router.agreement", 82.3, "router.agreement=82.3 must lie in 0 to 1"),
        ("router.loss_curve", [[1, 2, 3]], r"router.loss_curve\[0\] must be \[step, loss\]"),
        ("experts.names", [], "at least one name"),
        ("experts.channels", 2000, "experts.channels=2000 must lie in 1 to 1536"),
        ("experts.load", [0.5, 0.5], "experts.load must be a list of 7 numbers"),
        ("experts.load", [0.1] * 7, "experts.load sums to 0.7"),
        ("experts.load_by_domain", [[1.0] + [0.0] * 6], "experts.load_by_domain must have 7 rows"),
        ("experts.overlap.2.3", 1.5, r"experts.overlap\[2\]\[3\]=1.5"),
        ("strip.4", ["x", 7], r"strip\[4\]=\['x', 7\] must be \[piece, expert\], expert in 0 to 6"),
        ("stages.carve.seconds", -1.0, "stages.carve.seconds=-1.0"),
        ("config.thing", object(), "config.thing is a object"),
        ("samples", {}, "samples must be a list"),
        ("export.checks", [], "export.checks must be a table"),
    ],
)
def test_a_wrong_value_is_named(path, value, message):
    with pytest.raises(ArtifactError, match=message):
        rp.validate(put(fake(), path, value))


def test_relative_figures():
    ladder = {"dense": 3.0, "static": 5.0, "routed": 4.0}
    assert relative(ladder, "routed") == pytest.approx((math.e, 0.5))
    assert relative(ladder, "dense") == (1.0, 0.0)
    assert relative(ladder, "static")[1] == 1.0
    assert relative({"dense": 3.0, "static": 3.0, "routed": 4.0}, "routed")[1] is None


def test_the_verdict_follows_the_figures():
    report = fake()
    verdict, text = gain(report)
    nats = report["ladder"]["static_tuned"] - report["ladder"]["routed_tuned"]
    assert (
        verdict == "wins"
        and f"{nats:.3f} +- 0.021" in text
        and "nats lower" in text
        and f"{math.expm1(-nats):+.1%}" in text
    )
    lost = put(put(report, "ladder.routed_tuned", report["ladder"]["static_tuned"] + 0.2), "errors", None)
    verdict, text = gain(lost)
    assert verdict == "loses" and "0.200 nats higher" in text and "+-" not in text and "(perplexity +22.1%)" in text
    assert "Routing does not win here." in html_page(rp.validate(lost))
    assert "Routing wins." in html_page(rp.validate(report))
    unclear = put(report, "errors.gain", 0.6 * nats)
    assert gain(unclear)[0] == "noise" and "No clear winner." in html_page(rp.validate(unclear))


def test_perplexity_text():
    assert [perplexity(x) for x in (0.0, math.log(141.0), math.log(4321.0))] == ["1.00", "141.00", "4,321"]
    assert all(len(perplexity(x)) <= 8 for x in (6.90, 13.8, 14.0, 100.0, 1e9))


@pytest.mark.parametrize("experts", [1, 7, 20])
def test_terminal_table_fits_and_tells(experts):
    report = fake(experts)
    table = rp.terminal_table(report)
    assert max(len(line) for line in table.splitlines()) <= 100
    assert table.endswith("\n") and "\x1b" not in table
    assert f"{math.exp(report['ladder']['routed_tuned'] - report['ladder']['dense']):.3f}" in table
    assert "82.3%" in table and "FAIL greedy tokens: 63 of 64 (all equal)" in table and "pass logits" in table
    for name, losses in report["domains"].items():
        row = next(line for line in table.splitlines() if line.startswith(name) and "*" in line)
        assert row.count("*") == 1
        assert f"{perplexity(min(v for a, v in losses.items() if a != 'dense'))}*" in row


def test_terminal_table_survives_odd_names():
    report = put(put(fake(), "model.name", NASTY * 5), "experts.names.0", "\u65e5" * 80)
    report["domains"] = {"\x1b[2J" + "\u65e5" * 40 if k == "news" else k: v for k, v in report["domains"].items()}
    table = rp.terminal_table(report)
    assert "\x1b" not in table and "\x00" not in table
    assert max(rp._columns(line) for line in table.splitlines()) <= 100


@pytest.mark.parametrize("experts", [1, 7, 20])
def test_page_is_well_formed_and_loads_nothing(experts):
    text = html_page(rp.validate(fake(experts)))
    page = Page(text)
    assert page.open == []
    assert text.isascii()
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in ("src", "href", "action") or a[1].startswith("on")]
    assert not re.search(r"https?:|url\(|@import", text)
    assert page.tags.count("svg") == 2 and page.tags.count("h2") == 12
    assert page.tags.count("circle") >= 2
    # every number of the two matrices is on the page
    cells = [v for tag, key, v in page.attributes if tag == "td" and key == "class" and v.startswith("heat")]
    assert len(cells) == 2 * experts * experts
    assert sum(v == "best" for tag, key, v in page.attributes if tag == "td" and key == "class") == experts


def test_every_text_is_escaped():
    report = fake()
    expected = NASTY.translate({0: "\ufffd", 27: "\ufffd", 0xD800: "\ufffd"})
    report["model"] = {"name": NASTY, "source": NASTY}
    report["experts"]["names"] = [NASTY] * 7
    report["domains"] = {NASTY + str(i): v for i, v in enumerate(report["domains"].values())}
    report["strip"] = [[NASTY, 0], ["</span><b>", 1]]
    report["samples"] = [{"prompt": NASTY, "dense": NASTY, "routed_tuned": NASTY}]
    report["stages"] = {NASTY: report["stages"]["carve"]}
    report["export"] = {"folder": NASTY, "checks": {NASTY: {"ok": True, "value": NASTY, "rule": NASTY}}}
    report["versions"] = {NASTY: NASTY}
    report["config"] = {NASTY: ["</pre><script>"]}
    text = html_page(rp.validate(report))
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "<b></b>" not in text
    assert "\x00" not in text and "\x1b" not in text
    shown = "".join(page.text)
    assert shown.replace("\ud800", "\ufffd").count(expected) >= 15
    assert "</span><b>" in shown and "</pre><script>" in shown


def test_strip_shows_each_token_and_marks_changes():
    report = put(fake(12), "strip", [["one", 0], [" two", 0], ["\n three", 10], [" four", 0]])
    text = html_page(rp.validate(report))
    tokens = re.findall(r'<span class="t ([^"]*)" title="([^"]*)">(<sup[^>]*>(\d+)</sup>)?([^<]*)</span>', text)
    assert [t[4] for t in tokens] == ["one", " two", "\n three", " four"]
    assert [t[3] for t in tokens] == ["1", "", "11", "1"]
    assert tokens[0][0] == "e0" and tokens[2][0] == f"e{10 % HUES} again1"
    assert [t[1] for t in tokens] == [report["experts"]["names"][e] for e in (0, 0, 10, 0)]


def test_optional_parts_may_be_left_out():
    report = put(put(fake(), "errors", ...), "ladder.own_domain", ...)
    report["domains"] = {k: {a: x for a, x in v.items() if a != "own_domain"} for k, v in report["domains"].items()}
    report |= {"strip": [], "samples": [], "stages": {}, "versions": {}, "config": {}}
    report["curves"] = {"static_tuned": [], "routed_tuned": [], "router": []}
    report["router"]["loss_curve"] = []
    report["export"]["checks"] = {}
    text = html_page(rp.validate(report))
    assert Page(text).open == [] and text.count("No steps were recorded.") == 2
    assert "Own-domain" not in text and "A text by expert" not in text and 'class="err"' not in text
    assert "Own-domain" not in rp.terminal_table(report)


def test_charts_take_degenerate_values():
    for points in ([[3, 1.5]], [[0, 2.0], [1, 2.0]], [[0, 0.0], [0, 0.0]], [[s, 1 / (s + 1)] for s in range(5000)]):
        svg = line_chart("x", {"a": ("arm-routed", points)})
        assert Page(svg).open == [] and "nan" not in svg and "inf" not in svg and len(svg) < 40_000
        found = re.search(r'points="([^"]*)"', svg)
        assert found
        pairs = [tuple(map(float, p.split(","))) for p in found.group(1).split()]
        assert all(0 <= x <= 440 and 0 <= y <= 250 for x, y in pairs)
        assert [x for x, _ in pairs] == sorted(x for x, _ in pairs)
    for low, high in ((0.0, 1.0), (2.31, 2.34), (0, 119), (1, 1e6)):
        marks = ticks(low, high)
        assert 1 <= len(marks) <= 6 and low - 1e-9 <= marks[0] and marks[-1] <= high + 1e-9


def test_write_report_writes_both_whole(tmp_path):
    report = fake()
    paths = rp.write_report(report, tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["report.html", "report.json"]
    assert json.loads(paths[0].read_text()) == rp.validate(report)
    assert paths[1].read_text() == html_page(rp.validate(report))
    # a report that is refused leaves the finished one as it was
    before = [p.read_bytes() for p in paths]
    with pytest.raises(ArtifactError, match="ladder.dense is missing"):
        rp.write_report(put(report, "ladder.dense", ...), paths[0].parent)
    assert [p.read_bytes() for p in paths] == before
    assert len(os.listdir(paths[0].parent)) == 2


def test_write_report_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        rp.write_report(fake(), blocked)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        rp.write_report(fake(), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []
