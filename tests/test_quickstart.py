"""The quickstart: how it divides its minutes, what becomes its report, and the whole of it on a tiny model."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny
from stages import jitted

from readme_jax import artifacts, quickstart, report
from readme_jax.config import ArtifactError, ConfigError
from readme_jax.quickstart import CUT, DOMAINS, SEQ, Plan, QuickstartConfig, load_plan, make_plan, paired_error, sizes
from readme_jax.train import quickstart as program

# ---- the plan ---------------------------------------------------------------------------------


def total(minutes, rate=400.0, spent=60.0):
    plan = make_plan(QuickstartConfig(minutes=minutes), sizes(minutes, False), spent, rate)
    return plan, {
        "labels": plan.label_records * SEQ * quickstart.LABEL_COST / rate,
        "router": plan.router_steps * plan.router_batch * SEQ * quickstart.ROUTER_COST / rate,
        "experts": 2 * plan.expert_steps * SEQ // CUT * quickstart.EXPERT_COST / rate,
    }


def test_more_minutes_more_tokens():
    plans = [total(minutes) for minutes in (5, 15, 60, 240)]
    for (less, _), (more, _) in zip(plans, plans[1:]):
        assert less.expert_steps < more.expert_steps
        assert less.label_records < more.label_records
        assert less.router_steps * less.router_batch <= more.router_steps * more.router_batch
    for minutes, (plan, seconds) in zip((5, 15, 60, 240), plans):
        assert sum(seconds.values()) < 60 * minutes, "the plan fits into its minutes"
        assert seconds["experts"] > 2 * seconds["labels"] and seconds["experts"] > 2 * seconds["router"]
        assert plan.label_records <= len(DOMAINS) * sizes(minutes, False).train // SEQ
        assert plan.router_steps * plan.router_batch <= 10 * plan.label_records + plan.router_batch


def test_a_faster_machine_takes_more():
    assert total(15, rate=4000)[0].expert_steps > 5 * total(15, rate=400)[0].expert_steps
    assert total(15, spent=600)[0].expert_steps < total(15, spent=60)[0].expert_steps
    late = total(15, spent=10_000)[0]  # over time already: still a whole run, a short one
    assert late.expert_steps >= 2 and late.router_steps >= 8 and late.label_records >= 8 and late.router_batch >= 1


def test_sizes_are_whole_records():
    small, large, chip = sizes(1, False), sizes(60, False), sizes(15, True)
    for size in (small, large, chip):
        assert all(n >= SEQ and n % SEQ == 0 for n in vars(size).values())
    assert small.train < sizes(15, False).train < large.train < chip.train * 2
    assert sizes(15, False).train < chip.train and sizes(15, False).test < chip.test


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(minutes=0), "minutes=0 must be positive"),
        (dict(minutes=math.inf), "minutes=inf must be positive"),
        (dict(fraction=0), "fraction=0 must be above 0"),
        (dict(fraction=1.1), "fraction=1.1 must be above 0 and at most 1"),
        (dict(seed=-1), r"seed=-1 must be in 0 \.\. 2\*\*32 - 2"),
    ],
)
def test_rules(options, message):
    with pytest.raises(ConfigError, match=message):
        QuickstartConfig(**options)


def test_the_plan_is_kept(tmp_path):
    path = tmp_path / "plan.json"
    config = QuickstartConfig(out=tmp_path, minutes=5)
    assert load_plan(path, config) is None
    plan = make_plan(config, sizes(5, False), 10, 400)
    artifacts.write_text(path, json.dumps(vars(plan)))
    assert load_plan(path, config) == plan
    for name, value in (("minutes", 6), ("seed", 1)):
        with pytest.raises(
            ArtifactError, match=f"out={tmp_path} was begun with {name}=.*, now {value}; choose another"
        ):
            load_plan(path, QuickstartConfig(out=tmp_path, **({"minutes": 5} | {name: value})))


# ---- the report -------------------------------------------------------------------------------


def test_paired_error_against_numpy():
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 500, 9).astype(float)
    a, b = tokens * rng.normal(3, 0.3, 9), tokens * rng.normal(2.9, 0.3, 9)
    ratio = (a - b).sum() / tokens.sum()
    expected = np.std(a - b - ratio * tokens, ddof=1) * 3 / tokens.sum()  # the residuals' mean is 0 by construction
    arms = [{"loss": x.tolist(), "tokens": tokens.tolist()} for x in (a, b)]
    assert paired_error(*arms) == pytest.approx(expected) == pytest.approx(paired_error(*arms[::-1]))
    assert paired_error(arms[0], arms[0]) == 0
    assert paired_error({"loss": [1.0], "tokens": [2.0]}, {"loss": [2.0], "tokens": [2.0]}) is None
    # what two arms have in common does not count: hard records are hard for both
    noise = tokens * rng.normal(0, 5, 9)
    shifted = [{"loss": (x + noise).tolist(), "tokens": tokens.tolist()} for x in (a, b)]
    assert paired_error(*shifted) == pytest.approx(expected)


def fake_folders(root):
    """The files of finished stages that the report reads, with numbers that can be told apart."""
    folders = {}
    arms = {"untuned": ("dense", "own_domain", "routed"), "static": ("routed",)}
    arms |= {"static_tuned": ("routed",), "routed_tuned": ("routed",)}
    for number, (name, own) in enumerate(arms.items()):
        folder = folders[f"evaluate_{name}"] = root / f"evaluate_{name}"
        folder.mkdir()
        losses = {arm: {d: 2 + number + 0.1 * i + 0.01 * j for j, d in enumerate("ab")} for i, arm in enumerate(own)}
        routing = {"load": [0.5, 0.5], "load_by_domain": [[1, 0], [0, 1]], "load_max_over_mean": 1.0}
        routing |= {"entropy": 0.69, "keeps_previous": 0.8, "agreement": 0.25 if name == "untuned" else None}
        evaluation = {
            "arms": {
                arm: {d: {"loss": x, "error": 0.03 + number / 100} for d, x in by.items()} for arm, by in losses.items()
            },
            "mean_loss": {arm: sum(by.values()) / 2 for arm, by in losses.items()},
            "routing": None if name.startswith("static") else routing,
            "records": {arm: {d: {"loss": [1.0 + number, 2.0], "tokens": [1.0, 1.0]} for d in "ab"} for arm in own},
        }
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    for name, keys in (("static_tuned", ["experts/loss"]), ("tuned", ["router/loss", "experts/loss"])):
        folders[name] = root / name
        folders[name].mkdir()
        lines = [{"step": i, keys[i % len(keys)]: float(i)} for i in range(6)]
        (folders[name] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders["carved"] = root / "carved"
    folders["carved"].mkdir()
    info = {"names": ["a", "b"], "channels": 4, "mlp": 8, "overlap": [[1, 0.5], [0.5, 1]], "error": 0.0}
    info |= {"shared_share": 0.5, "union_share": 0.75, "pairwise_overlap": 0.5}
    rest = {"stage": "carve", "fingerprint": "", "config": {}, "files": {}}
    (folders["carved"] / "manifest.json").write_text(json.dumps({**rest, "info": info}))
    return folders


def test_collect_gives_a_whole_report(tmp_path):
    plan = Plan(minutes=5, seed=0, label_records=8, router_steps=9, router_batch=1, expert_steps=3)
    extra = {
        "source": "a/model",
        "samples": [{"prompt": "p", "dense": "d", "static_tuned": "s", "routed_tuned": "r"}],
        "strip": [["red", 1]],
        "stages": {"calibrate": {"seconds": 1.0, "tokens": 8, "tokens_per_s": 8.0, "peak_memory_gb": 0.5}},
        "export": {"folder": "x", "checks": {"expert_mismatches": 0}},
    }
    config = QuickstartConfig(out=tmp_path, minutes=5)
    found = report.validate(quickstart.collect(config, plan, fake_folders(tmp_path), extra))
    ladder = {"dense": 2.005, "own_domain": 2.105, "routed": 2.205}
    ladder |= {"static": 3.005, "static_tuned": 4.005, "routed_tuned": 5.005}
    assert found["ladder"] == pytest.approx(ladder)
    assert found["domains"]["b"]["routed_tuned"] == pytest.approx(5.01)
    assert found["errors"]["static"] == pytest.approx(0.04 / np.sqrt(2))
    # the arms differ by -1 and 0 in records of one token: mean -0.5, residuals -0.5 and 0.5, in each of two domains
    assert found["errors"]["gain"] == pytest.approx(np.sqrt(2 * 0.5) / 2 / np.sqrt(2))
    assert found["router"] | {"loss_curve": 0} == {
        "agreement": 0.25, "entropy": 0.69, "keeps_previous": 0.8, "steps": 9, "loss_curve": 0,
    }  # fmt: skip
    assert found["curves"]["router"] == [[0, 0.0], [1, 2.0], [2, 4.0]] == found["router"]["loss_curve"]
    assert found["curves"]["routed_tuned"] == [[0, 1.0], [1, 3.0], [2, 5.0]]
    assert len(found["curves"]["static_tuned"]) == 6 and found["config"]["plan"]["expert_steps"] == 3
    assert "Held-out text" in report.terminal_table(found)


# ---- the whole of it --------------------------------------------------------------------------


def test_whole_run_with_an_interruption(stages, tmp_path, monkeypatch, capsys):
    """Every stage on the tiny model and local text, killed while tuning, begun again, then once more for nothing."""
    texts = {name: stages.text / f"{name}.jsonl" for name in tiny.DOMAINS}
    monkeypatch.setattr(program.sources, "fetch_domains", lambda names=None: {n: texts[n] for n in names or texts})
    for module in (program, quickstart):
        monkeypatch.setattr(module, "DOMAINS", tuple(texts))
        monkeypatch.setattr(module, "SEQ", 32)
    checks = {"tokens": 1024, "expert_mismatches": 0, "logits_max_abs": 1e-6}
    checked = []
    monkeypatch.setattr(program.export, "check_export", lambda *a, **k: checked.append(a[0]) or checks)
    out = tmp_path / "out"
    argv = ["--model", str(stages.source), "--out", str(out), "--minutes", "0.01"]

    class Killed(Exception):
        pass

    with monkeypatch.context() as patch:

        def die(*_):
            raise Killed

        patch.setattr(program.alternate.steps, "make_router_step", lambda *_: jitted(die))
        with pytest.raises(Killed):
            program.main(argv)
    assert (out / "static_tuned" / "manifest.json").is_file() and not (out / "tuned").exists()
    plan = (out / "plan.json").read_text()
    program.main(argv)
    first = capsys.readouterr().out
    assert "Held-out text" in first and f"report: {out / 'report.html'}" in first
    assert (out / "plan.json").read_text() == plan and checked == [out / "exported"]
    found = json.loads((out / "report.json").read_text())
    assert set(found["ladder"]) == {"dense", "static", "static_tuned", "own_domain", "routed", "routed_tuned"}
    assert set(found["domains"]) == set(texts) == set(found["experts"]["names"])
    assert found["export"] == {"folder": str(out / "exported"), "checks": checks}
    assert len(found["samples"]) == 3 and all(s["routed_tuned"] and s["dense"] for s in found["samples"])
    assert len(found["strip"]) == 3 * 32 and {e for _, e in found["strip"]} <= {0, 1, 2}
    stages_run = ["fetch", "import", "data", "calibrate", "carve", "carve_static", "tune_static", "tune_routed"]
    stages_run += ["evaluate_untuned", "evaluate_static", "evaluate_static_tuned", "evaluate_routed_tuned"]
    assert list(found["stages"]) == [*stages_run, "generate", "export"]
    assert (
        found["stages"]["calibrate"]["tokens_per_s"] > 0
        and found["router"]["steps"] == json.loads(plan)["router_steps"]
    )
    assert (
        len(found["curves"]["routed_tuned"]) == len(found["curves"]["static_tuned"]) == json.loads(plan)["expert_steps"]
    )
    names = ("train", "evaluate", "make_statistics")
    with monkeypatch.context() as patch:  # a finished quickstart does no stage again
        for owner, name in zip((program.alternate, program.evaluate, program.calibrate), names):
            patch.setattr(owner, name, lambda *_, **__: pytest.fail("done again"))
        patch.setattr(program, "show", lambda *_: pytest.fail("generated again"))
        program.main(argv)
    assert json.loads((out / "report.json").read_text()) == found
    for lost in (out / "samples.json", out / "export.json"):  # what is kept beside the folders is made again
        lost.unlink()
    shutil.rmtree(out / "exported")
    program.main(argv)
    assert checked == [out / "exported"] * 2
    assert json.loads((out / "report.json").read_text())["samples"] == found["samples"]
    with pytest.raises(ArtifactError, match="was begun with minutes=0.01, now 1.0"):
        program.main([*argv, "--minutes", "1"])
