"""The study: recipes and their rules, token arithmetic, statistics, and the whole of it on a tiny model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import yaml
from stages import SEQ, jitted

from readme_jax import study, study_result
from readme_jax.config import ArtifactError, ConfigError, from_dict
from readme_jax.study import Recipe, StudyConfig
from readme_jax.train import study as program

ROUTER = {"steps": 3, "batch": 2, "records": 4, "shape": {"width": 16, "heads": 2}, "optim": {"lr": 1e-2}}
EXPERTS = {"batch": 1, "optim": {"lr": 2e-3}}
RECIPES = {
    "static": {"carve": {"carving": "static", "importance": "energy"}, "experts": EXPERTS},
    "paper": {
        "carve": {"importance": "mean_abs"},
        "router": {**ROUTER, "labels": {"kind": "overlap", "signed": True, "temperature": 0.1}},
        "experts": {**EXPERTS, "kd_weight": 0.0, "ce_weight": 1.0},
        "rounds": 2,
    },
    "domain": {"carve": {"importance": "energy"}, "router": ROUTER, "experts": EXPERTS},
    "frozen": {"carve": {"importance": "energy"}, "router": ROUTER, "masks": {"lr": 0.05}},
    "both": {"carve": {"importance": "energy"}, "router": ROUTER, "masks": {"share": 0.25}, "experts": EXPERTS},
    "untuned": {"carve": {"importance": "energy"}, "router": ROUTER},
}
KEPT = {**RECIPES["both"], "retune": False, "experts": {**EXPERTS, "refit": 2}}
RUN = {name: RECIPES[name] for name in ("static", "paper", "both", "untuned")}
TOKENS = 8 * SEQ


def write(folder, stages, recipes=RECIPES, **changes):
    """Path of a study's YAML and those of its recipes, in `folder`."""
    folder.mkdir(exist_ok=True)
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    config = {
        "out": str(folder / "out"),
        "model": str(stages.source),
        "data": {
            "seq": SEQ,
            "train_tokens": 640,
            "eval_tokens": 160,
            "calibration_tokens": 160,
            "domains": {n: {"source": "files", "path": str(stages.text / f"{n}.jsonl")} for n in tiny.DOMAINS},
        },
        "unseen": ["animals"],
        "recipes": [str(folder / f"{name}.yaml") for name in recipes],
        "tokens": [0, TOKENS],
        "default": "both" if "both" in recipes else "paper",
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path


def planned(folder, stages, recipes=RECIPES, **changes):
    """(config, recipes, jobs) of such a study."""
    config = study.load_yaml(StudyConfig, write(folder, stages, recipes, **changes))
    found = study.read_recipes(config)
    return config, found, study.plan(config, found)


# ---- recipes and chains -----------------------------------------------------------------------


def recipes_cut():
    return {**RECIPES["both"], "experts": RECIPES["both"]["experts"] | {"cut": 4}}


@pytest.mark.parametrize("records, share, masks, left", [(8, 0.25, 2, 6), (98, 0.25, 24, 74), (9, 0.5, 4, 5)])
def test_steps_read_the_tokens_exactly(records, share, masks, left):
    recipe = from_dict(Recipe, {**RECIPES["both"], "masks": {"share": share}})
    assert study.split_steps(recipe, records * SEQ, SEQ) == (masks, left)
    alone = from_dict(Recipe, RECIPES["frozen"])
    assert study.split_steps(alone, records * SEQ, SEQ) == (records, 0)
    plain = from_dict(Recipe, RECIPES["domain"])
    assert study.split_steps(plain, records * SEQ, SEQ) == (0, records)
    cut = from_dict(Recipe, {**recipes_cut(), "masks": {"share": share}})
    assert study.split_steps(cut, records * SEQ, SEQ) == (masks, 4 * left)


def test_tokens_of_every_job_are_what_was_asked(tmp_path, stages):
    _, recipes, jobs = planned(tmp_path, stages)
    for job in jobs:
        spent = 0
        for stage in job.stages:
            c = stage.config
            if stage.program == "masks":
                spent += c.steps * c.batch * c.accum * SEQ
            if stage.program == "alternate":
                spent += c.rounds * c.experts.steps * c.experts.batch * c.experts.accum * SEQ
        assert spent == job.tokens, job.recipe
        assert all(stage.config.router.batch for stage in job.stages if stage.program == "alternate")
    assert [j.recipe for j in jobs if j.tokens == 0] == ["both", "static", "paper", "domain", "frozen", "untuned"]
    assert [j.recipe for j in jobs if j.tokens] == ["both", "static", "paper", "domain", "frozen"]


def test_chains(tmp_path, stages):
    _, _, jobs = planned(tmp_path, stages, RECIPES | {"kept": KEPT})
    by = {(job.recipe, job.tokens): job.stages for job in jobs}

    def names(*key):
        return [
            (s.program, s.config.router.steps, s.config.experts.steps) if s.program == "alternate" else s.program
            for s in by[key][1:]
        ]

    assert names("static", 0) == ["carve"]
    assert names("static", TOKENS) == ["carve", ("alternate", 0, 8)]
    assert names("domain", 0) == ["carve", ("alternate", 3, 0)]
    assert names("domain", TOKENS) == ["carve", ("alternate", 3, 0), ("alternate", 0, 8)]
    assert names("paper", TOKENS) == ["carve", ("alternate", 3, 4)], "several rounds: in turns, from the start"
    assert names("frozen", TOKENS) == ["carve", ("alternate", 3, 0), "masks", ("alternate", 3, 0)]
    assert names("both", TOKENS) == ["carve", ("alternate", 3, 0), "masks", ("alternate", 3, 6)]
    assert names("kept", TOKENS) == ["carve", ("alternate", 3, 0), "masks", ("alternate", 0, 6)]
    assert by["kept", TOKENS][-1].config.experts.refit == 2 and by["kept", TOKENS][3].key == by["both", TOKENS][3].key
    assert names("kept", 0) == ["carve", ("alternate", 3, 0), ("alternate", 0, 0)], "calibration text is not tuned on"
    assert by["kept", 0][-1].config.experts.refit == 2
    for (recipe, count), chain in by.items():
        for before, after in zip(chain, chain[1:]):
            last = after.config.statistics if after.program == "carve" else after.config.model
            assert last == before.folder, (recipe, count)
    assert by["domain", 0][-1].key == by["both", TOKENS][2].key == by["frozen", 0][-1].key, "shared"
    assert by["domain", 0][1].key != by["paper", 0][1].key
    assert {chain[0].key for chain in by.values()} == {by["static", 0][0].key}, "statistics, once"


def test_what_decides_a_folder(tmp_path, stages):
    def keys(folder, change=lambda recipes: None, **changes):
        recipes = json.loads(json.dumps(RECIPES))
        change(recipes)
        jobs = planned(tmp_path / folder, stages, recipes, **changes)[2]
        return {(j.recipe, j.tokens, j.seed): [s.key for s in j.stages] for j in jobs}

    first = keys("a")
    assert keys("b") == first, "not where it lies"
    assert keys("c", lambda r: r["domain"]["carve"].update(fraction=0.5)) == first, "nor a default that is written out"
    other = keys("d", lambda r: r["domain"]["carve"].update(fraction=0.25))
    assert set(other["domain", TOKENS, 0]) & set(first["domain", TOKENS, 0]) == {first["domain", 0, 0][0]}
    assert other["both", TOKENS, 0] == first["both", TOKENS, 0]
    seeds = keys("e", seeds=[0, 3], finalists=["domain"])
    assert {key: own for key, own in seeds.items() if key[2] == 0} == first
    assert {key[:2] for key in seeds if key[2] == 3} == {(n, TOKENS) for n in ("domain", "static", "paper")}
    assert seeds["domain", TOKENS, 3][:2] == first["domain", TOKENS, 0][:2], "statistics and carving know no seed"
    assert not set(seeds["domain", TOKENS, 3][2:]) & set(first["domain", TOKENS, 0])
    own = keys("f", lambda r: r["domain"].update(calibrate={"batch": 2}))
    assert not set(own["domain", 0, 0]) & set(first["domain", 0, 0]), "statistics of its own"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda r: r["domain"]["carve"].update(importanze="energy"), "recipe domain.carve.importanze: no such key"),
        (lambda r: r["domain"]["carve"].update(fraction=2), "recipe domain.carve: fraction=2.0 must be above 0"),
        (lambda r: r["domain"].update(rooter={}), "domain.yaml: rooter: no such key"),
        (lambda r: r["domain"]["router"].update(step=3), "recipe domain.router.step: no such key"),
        (lambda r: r["domain"]["experts"].update(steps=3), "domain.yaml: experts.steps: the study sets it"),
        (lambda r: r["domain"]["experts"].update(optim={"lr": -1}), r"recipe domain.experts.optim: lr=-1.0 must be"),
        (lambda r: r["domain"]["experts"].update(kd_wait=1), "recipe domain.experts.kd_wait: no such key"),
        (lambda r: r["domain"].update(calibrate={"window": 0.5}), "recipe domain.calibrate.window: "),
        (lambda r: r["both"]["experts"].update(batch=0), "experts.batch=0 must be a whole number of at least 1"),
        (lambda r: r["both"]["masks"].update(accum="two"), "masks.accum='two' must be a whole number of at least 1"),
        (lambda r: r["both"]["experts"].update(cut=0), "experts.cut=0 must be a whole number of at least 1"),
        (lambda r: r["both"]["experts"].update(cut=3), "recipe both: experts.cut=3 does not divide data.seq=32"),
        (lambda r: r["both"]["experts"].pop("batch"), "recipe both.experts.batch: missing"),
        (lambda r: r["both"].update(carve="domain"), "both.yaml: carve: expected a mapping"),
        (lambda r: r["both"]["masks"].update(lr=0), "recipe both.masks: lr=0.0 must be positive"),
        (lambda r: r["both"]["masks"].update(share=1), "masks.share=1 must be above 0 and below 1"),
        (lambda r: r["both"]["masks"].update(share=0.99), "recipe both: masks.share=0.99: no step is left"),
        (lambda r: r["domain"].update(retune=False), "retune=false has no meaning without masks and router"),
        (lambda r: r["domain"]["carve"].update(carving="discovered"), "calibrate.window: missing"),
        (lambda r: r["domain"]["carve"].update(storage="separate"), "carve.storage: recipes are tuned with tied"),
        (lambda r: r["both"]["masks"].update(share=0.01), "recipe both: masks.share=0.01: no step of 8 records"),
        (lambda r: r["frozen"]["masks"].update(share=0.5), "masks.share=0.5: without experts all tokens are for masks"),
        (lambda r: r["frozen"]["masks"].update(batch=3), "recipe frozen: tokens=256: 2 rows of 32 tokens do not"),
        (
            lambda r: r["paper"].update(rounds=3),
            "recipe paper: tokens=256: 8 rows of 32 tokens do not divide into 3",
        ),
        (lambda r: r["domain"].pop("router"), "router: missing; only carving=static has none"),
        (lambda r: r["static"].update(router=ROUTER), "router: has no meaning with carving=static"),
        (lambda r: r.pop("paper"), "recipes: paper is missing"),
        (lambda r: r.pop("static"), "recipes: static is missing"),
        (lambda r: r.update(dense=r["static"]), "recipes: dense is the model itself"),
    ],
)
def test_bad_recipes_are_one_line_before_any_work(tmp_path, stages, change, says):
    recipes = json.loads(json.dumps(RECIPES))
    change(recipes)
    path = write(tmp_path, stages, recipes)
    with pytest.raises(ConfigError, match=says) as caught:
        program.main([str(path)])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(tokens=[256]), "tokens=.256.: 0, untuned, must be among them"),
        (dict(tokens=[0, 250]), "tokens=250 must be whole records of 32"),
        (dict(tokens=[0, 256, 256]), "tokens=.* names one twice"),
        (dict(tokens=[0, 64 * SEQ]), "tokens=2048: data has only 1280 to train on"),
        (dict(unseen=["plants"]), "unseen=plants is not one of data.domains"),
        (dict(unseen=list(tiny.DOMAINS)), "unseen: no domain is left"),
        (dict(default="best"), "default=best is not one of the recipes"),
        (dict(finalists=["best"]), "finalists=best is not one of the recipes"),
        (dict(seeds=[0, 1]), "finalists: none, so a second seed has no meaning"),
        (dict(seeds=[-1]), "seeds=.-1.: each in 0 .. "),
        (dict(seeds=[]), "seeds: at least one is needed"),
        (dict(bounds=["magic"]), "bounds=magic is not one of: oracle, oracle_layers"),
    ],
)
def test_bad_studies(tmp_path, stages, changes, says):
    with pytest.raises(ConfigError, match=says):
        program.main([str(write(tmp_path, stages, **changes))])
    assert not (tmp_path / "out").exists()


# ---- statistics -------------------------------------------------------------------------------


def rows(loss_MN, tokens=100.0):
    return {
        f"d{i}": {"loss": [tokens * x for x in own], "tokens": [tokens] * len(own)} for i, own in enumerate(loss_MN)
    }


def test_difference_against_the_normal_interval():
    rng = np.random.default_rng(0)
    hard_MN = rng.normal(3, 2, (3, 40))  # what both arms share does not widen the interval
    gap_MN = rng.normal(0.2, 0.1, (3, 40))
    found = study.difference(rows(hard_MN + gap_MN), rows(hard_MN), draws=20000)
    assert found["mean"] == pytest.approx(gap_MN.mean())
    error = np.sqrt(np.sum(gap_MN.var(1, ddof=1) / 40)) / 3
    half = np.diff(found["ci"])[0] / 2
    assert half == pytest.approx(1.96 * error, rel=0.04) and np.mean(found["ci"]) == pytest.approx(
        found["mean"], abs=0.003
    )
    assert found["by_domain"]["d1"]["mean"] == pytest.approx(gap_MN[1].mean())
    assert found == study.difference(rows(hard_MN + gap_MN), rows(hard_MN), draws=20000), "seeded"


def test_the_variance_of_few_records_is_not_too_small():
    """With n draws of n = 3 it would be 2/3 of the unbiased one."""
    gap_MN = np.random.default_rng(1).normal(0, 1, (60, 3))
    drawn = np.array(study.difference(rows(gap_MN), rows(0 * gap_MN), draws=20000)["ci"])
    error = np.sqrt(np.sum(gap_MN.var(1, ddof=1) / 3)) / 60
    assert np.diff(drawn)[0] / 2 == pytest.approx(1.96 * error, rel=0.05)


def test_a_constant_gap_has_no_width_and_one_record_no_interval():
    loss_MN = np.arange(6.0).reshape(2, 3)
    found = study.difference(rows(loss_MN), rows(loss_MN - 0.5))
    assert found["ci"] == pytest.approx([0.5, 0.5]) and found["mean"] == pytest.approx(0.5)
    assert study.difference(rows([[1.0]]), rows([[2.0]])) == {
        "mean": -1.0, "ci": None, "by_domain": {"d0": {"mean": -1.0, "ci": None}},
    }  # fmt: skip
    with pytest.raises(ArtifactError, match="other records"):
        study.difference(rows(loss_MN), rows(loss_MN, tokens=50.0))


def test_static_gap_is_positive_when_better():
    dense, static, better = rows([[2.0, 2.2]]), rows([[3.0, 3.2]]), rows([[2.5, 2.9]])
    found = study.quality(better, dense, static)
    assert found["static_gap"] == pytest.approx(0.4) and found["static_gap_ci"] == pytest.approx([0.3, 0.5])
    assert found["loss"] == pytest.approx(2.7) and found["r"] == pytest.approx(np.exp(0.6))
    assert found["excess"] == pytest.approx(0.6) and found["ci"] == pytest.approx([0.5, 0.7])
    assert study.quality(static, dense, static)["static_gap"] == 0
    assert "static_gap" not in study.quality(better, dense, None)


def evaluated(folder, routing, **arms):
    """A stage whose evaluation has these losses of two records, by arm."""
    folder.mkdir()
    records = {arm: rows([loss_N]) for arm, loss_N in arms.items()}
    (folder / "evaluation.json").write_text(json.dumps({"records": records, "routing": routing}))
    (folder / "manifest.json").write_text("{}")
    return study.Stage("evaluate", folder.name, SimpleNamespace(out=folder), {})


def test_regret_is_what_an_oracle_gains(tmp_path):
    dense = {"test": rows([[2.0, 2.0]])}
    routing = {"load_max_over_mean": 1.2, "entropy": 0.5, "keeps_previous": 0.8, "load": []}
    bounds = evaluated(tmp_path / "b", routing, oracle=[2.9, 3.0], oracle_layers=[2.9, 2.98])
    static = study.Job("static", 0, 0, [], {"test": evaluated(tmp_path / "s", None, routed=[3.5, 3.5])})
    job = study.Job("domain", 0, 0, [], {"test": evaluated(tmp_path / "d", routing, routed=[3.0, 3.2])}, bounds)
    found = study_result.figures(job, dense, static)
    assert found["regret"] == pytest.approx(0.15) and found["choice_cost"] == pytest.approx(0.01)
    assert found["load_max_over_mean"] == 1.2 and found["static_gap"] == pytest.approx(0.4)
    alone = study_result.figures(static, dense, static)
    assert alone["regret"] == alone["choice_cost"] == alone["static_gap"] == 0 and alone["load_max_over_mean"] == 1
    (bounds.folder / "manifest.json").unlink()
    short = study_result.figures(job, dense, None)
    assert "regret" not in short and short["loss"] == pytest.approx(3.1), "the oracle is asked last of all"


# ---- the whole of it --------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def finished(stages, tmp_path_factory):
    """A study killed in its first expert step, begun again; and the stages that ran, in order."""
    folder, ran = tmp_path_factory.mktemp("study"), []
    path = write(folder, stages, RUN, seeds=[0, 1], finalists=["static"], bounds=["oracle"])
    with pytest.MonkeyPatch.context() as patch:
        for name, module in program.PROGRAMS.items():
            run = module.main
            patch.setattr(module, "main", lambda argv, name=name, run=run: (ran.append((name, argv[-1])), run(argv))[1])
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(program.alternate.steps, "make_expert_step", lambda *_, **__: jitted(die))
            with pytest.raises(Killed):
                program.main([str(path)])
        partial = json.loads((folder / "out" / "study.json").read_text())
        first, ran[:] = list(ran), []
        program.main(["--config", str(path)])
    return path, partial, first, ran


def die(*_):
    raise Killed


def test_a_cut_study_shows_what_it_has(finished):
    _, partial, first, _ = finished
    assert partial["jobs"] == {"done": 4, "of": 9}
    assert {name: list(own) for name, own in partial["recipes"].items()} == {name: ["0"] for name in ("default", *RUN)}
    assert [name for name, _ in first].count("evaluate") == 2 + 2 * 3  # dense; three different models
    assert first[-1][0] == "alternate"


def test_each_stage_runs_once(finished):
    path, _, first, ran = finished
    assert len(ran) == len(set(ran)), "in one start"
    out = path.parent / "out"
    assert {p.name for p in (out / "stages").iterdir()} == {argv.split("/")[-1][:-5] for _, argv in ran}
    timed = json.loads((out / "stages.json").read_text())
    names = [p.name for p in (out / "stages").iterdir()]
    assert [n.split("-")[0] for n in names].count("carve") == 3, "static, mean_abs, energy"
    assert [n.split("-")[0] for n in names].count("alternate") == 7
    assert len(names) == 1 + 3 + 7 + 1 + 2 * (1 + 8) + 5, "and the bounds of five routed models"
    assert set(timed) == {"import", "data", "unseen", *names}


def test_the_result(finished):
    path, _, _, _ = finished
    out = path.parent / "out"
    found = json.loads((out / "study.json").read_text())
    assert found["jobs"] == {"done": 9, "of": 9} and found["default"] == "both"
    assert set(found["dense"]["by_domain"]) == {"numbers", "colours"}
    assert set(found["dense"]["unseen"]["by_domain"]) == {"animals"}
    for name, recipe in found["recipes"].items():
        assert list(recipe) == (["0"] if name == "untuned" else ["0", str(TOKENS)])
        for count, entry in recipe.items():
            assert entry["r"] == pytest.approx(np.exp(entry["loss"] - found["dense"]["loss"]))
            assert entry["ci"][0] <= entry["excess"] <= entry["ci"][1]
            assert "regret" in entry and ("choice_cost" in entry) == (name == "static"), "one oracle was asked for"
            assert entry["best_static_gap"] == pytest.approx(entry["static_gap"], abs=1e-9), "the only one of one mask"
            static = found["recipes"]["static"][count]
            assert entry["static_gap"] == pytest.approx(static["loss"] - entry["loss"])
            assert entry["unseen"]["static_gap"] == pytest.approx(static["unseen"]["loss"] - entry["unseen"]["loss"])
            assert entry["load_max_over_mean"] >= 1 and set(entry["by_domain"]) == {"numbers", "colours"}
            cost = entry["cost"]
            assert cost["tokens"]["masks"] + cost["tokens"]["experts"] == int(count)
            assert (cost["tokens"]["labels"] > 0) == (name != "static")
            assert cost["flops"] > 0 and cost["seconds"] > 0 and cost["peak_memory_gb"] > 0
            assert ("seeds" in entry) == (name in ("static", "paper") and count != "0")
            assert cost["tokens"]["calibration"] == 320
    assert found["recipes"]["both"]["0"]["loss"] == found["recipes"]["untuned"]["0"]["loss"]
    assert found["recipes"]["both"][str(TOKENS)]["cost"]["tokens"]["labels"] == 2 * 4 * SEQ, "labelled again for masks"
    assert found["recipes"]["paper"][str(TOKENS)]["cost"]["tokens"]["labels"] == 4 * SEQ
    again = found["recipes"]["static"][str(TOKENS)]["seeds"]["1"]
    assert (
        again["seed"] == 1
        and again["static_gap"] == 0
        and again["loss"] != found["recipes"]["static"][str(TOKENS)]["loss"]
    )
    page = (out / "study.md").read_text()
    for word in ("9 of 9 runs", "## Untuned", "## After 256 tuned tokens", "| both |", "Over seeds", "animals"):
        assert word in page
    assert (out / "excess.png").stat().st_size > 5000 and (out / "domains.png").stat().st_size > 5000


def test_a_finished_study_does_nothing_again(finished, monkeypatch):
    path, _, _, _ = finished
    before = (path.parent / "out" / "study.json").read_text()
    for owner, name in ((program.alternate, "train"), (program.evaluate, "evaluate"), (program.masks, "learn")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("done again"))
    program.main([str(path)])
    assert (path.parent / "out" / "study.json").read_text() == before
