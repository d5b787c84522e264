"""`readme-jax plan`: what it prints, what it refuses, and what it needs, which is a config.json and no device."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sizes
import yaml
from stages import jitted

from readme_jax import flops, hf, placement, planning, steps
from readme_jax.alternate import AlternateConfig
from readme_jax.config import ConfigError, load_yaml
from readme_jax.sharding import MeshConfig, use_mesh
from readme_jax.train import alternate, plan

PAPER = Path(__file__).resolve().parents[1] / "configs" / "llama2-7b-paper" / "alternate.yaml"
TERMS = ("weights", "optimizer", "activations", "buffers")


@pytest.fixture(scope="module")
def llama2(tmp_path_factory) -> Path:
    """A folder that holds the config.json of Llama-2-7B and nothing else."""
    folder = tmp_path_factory.mktemp("llama2-7b")
    (folder / "config.json").write_text(json.dumps(hf.config_to_hf(sizes.MODELS["llama2-7b"], {})))
    return folder


def planned(tmp_path, *args) -> dict:
    path = tmp_path / "plan.json"
    plan.main([*map(str, args), "--json", str(path)])
    return json.loads(path.read_text())


def test_the_papers_run(llama2, tmp_path, capsys):
    """Sixteen chips that are not here. Parameters and tokens are the paper's; memory adds up."""
    made = planned(tmp_path, PAPER, "--accelerator", "v5p", "--model", llama2, "--seq", "4096")
    assert made["devices"] == 16 and made["peak"]["fits"] and made["levers"] == []
    assert made["parameters"]["backbone"] == 6_738_415_616  # Meta's count
    assert made["parameters"]["active"] == 6_738_415_616 - 32 * 3 * 4096 * 5504
    assert made["parameters"]["router"] == pytest.approx(17.97e6, rel=0.01)
    assert made["tokens"] == {"router": 8 * 100 * 64 * 4096, "experts": 8 * 200 * 128 * 4096}  # 1.04 B
    assert list(made["memory"]) == ["label", "router", "route", "experts"] and made["peak"]["step"] == "experts"
    for each in made["memory"].values():
        assert each["total"] == sum(each[term] for term in TERMS) and min(each.values()) > 0
    # float32 at rest over 16 devices: the model, which nothing asks as it was, and two moments of it
    experts = made["memory"]["experts"]
    assert experts["weights"] == pytest.approx(4 * 6.738e9 / 16, rel=0.02)
    assert experts["optimizer"] == pytest.approx(2 * 4 * 6.738e9 / 16, rel=0.02)
    assert experts["buffers"] > 4 * 6.738e9 / 16  # the gradients among them
    run, _ = plan.read_run(config := load_plan(llama2))
    each = flops.train_flops_per_token(run.model, run.experts, config.experts, 4096)
    assert made["flops"]["experts"] == each * made["tokens"]["experts"]
    assert made["hours"]["experts"] == pytest.approx(made["flops"]["experts"] / (16 * 459e12 * 0.4) / 3600)
    shown = capsys.readouterr().out
    for words in ("16 x v5p", "6.738 B, 4.574 B of them active", "838,860,800", "MFU of 40%", "fits: the experts step"):
        assert words in shown


def test_a_closed_form_is_planned(llama2, tmp_path):
    """Two float32 residual streams of its records, and as much work as `flops.refit_flops` counts."""
    args = PAPER, "--accelerator", "v5p", "--model", llama2, "--seq", "4096", "--experts.refit", "2"
    made = planned(tmp_path, *args)
    each = made["memory"]["refit"]
    tokens = 2 * 128 * 4096  # of two steps, over 16 devices
    assert each["activations"] == 2 * 4 * 4096 * tokens // 16
    assert each["weights"] > made["memory"]["experts"]["weights"] and each["optimizer"] > 0
    assert made["tokens"]["refit"] == tokens and made["flops"]["refit"] == tokens * flops.refit_flops(
        sizes.MODELS["llama2-7b"], 4096, 11008
    )
    cut = planned(tmp_path, *args, "--experts.cut", "4")
    assert 4 * cut["tokens"]["experts"] == made["tokens"]["experts"]
    assert cut["tokens"]["router"] == made["tokens"]["router"]
    assert cut["memory"]["experts"]["activations"] < made["memory"]["experts"]["activations"] / 2
    alone = planned(tmp_path, *args, "--experts.steps", "0", "--router.steps", "0", "--rounds", "1")
    assert alone["peak"]["step"] == "refit" and alone["tokens"]["experts"] == 0


def test_what_checkpoints_ask_of_the_disk(llama2, tmp_path, capsys):
    """Weights and two moments of 4 bytes each; two are kept, and a third is there before the oldest goes."""
    args = [PAPER, "--accelerator", "v5p", "--model", llama2, "--seq", "4096"]
    made = planned(tmp_path, *args)
    asked, both = made["checkpoint"], made["parameters"]["backbone"] + made["parameters"]["router"]
    assert asked["bytes"] == pytest.approx(12 * both, rel=1e-6) and asked["held"] == 3 and asked["takes"] is None
    assert asked["every"] == 300 and asked["rate"] == asked["bytes"] / 300
    assert "243.2 GB\n  one every 5.0 min needs a disk that takes 0.270 GB/s" in capsys.readouterr().out
    made = planned(tmp_path, *args, "--disk", "0.15", "--checkpoint.keep-best", "1")
    assert made["checkpoint"]["takes"] == asked["bytes"] / 0.15e9 and made["checkpoint"]["held"] == 4
    assert "at 0.15 GB/s it takes 9.0 min: training waits" in capsys.readouterr().out
    planned(tmp_path, *args, "--disk", "0.3")
    assert "at 0.3 GB/s it takes 4.5 min\n" in capsys.readouterr().out
    hours = made["hours"]  # a step of the experts takes longer than one of the router
    made = planned(tmp_path, *args, "--checkpoint.minutes", "0")["checkpoint"]
    assert made["every"] == pytest.approx(min(hours.values()) * 3600 / 8)
    made = planned(tmp_path, *args, "--checkpoint.minutes", "0", "--checkpoint.steps", "3")["checkpoint"]
    assert made["every"] == pytest.approx(3 * hours["router"] * 3600 / 800)


def load_plan(model: Path, **changes) -> plan.PlanConfig:
    config = load_yaml(plan.PlanConfig, PAPER)
    return dataclasses.replace(config, model=model, seq=4096, **changes)


def test_a_run_that_cannot_fit_is_refused_with_the_biggest_lever(llama2, tmp_path, capsys):
    args = [
        PAPER,
        "--accelerator",
        "v5e",
        "--model",
        llama2,
        "--seq",
        "4096",
        "--mesh.data",
        "8",
        "--router.steps",
        "0",
    ]
    with pytest.raises(planning.PlanError) as refused:
        planned(tmp_path, *args)
    made = json.loads((tmp_path / "plan.json").read_text())  # the plan is there all the same
    assert not made["peak"]["fits"] and "does NOT fit" in capsys.readouterr().out
    message, first = str(refused.value), made["levers"][0]
    assert "\n" not in message and "its experts step needs" in message and "v5e has 14.400 GB to use" in message
    assert f"biggest lever: {first['setting']} ({first['bytes'] / 1e9:.3f} GB)" in message
    assert made["peak"]["bytes"] > first["bytes"] and made["levers"][-1]["bytes"] <= made["peak"]["usable"]
    # with it the plan is what was said
    axis, value = first["setting"].split("=")
    changed = planned(tmp_path, *args, f"--{axis}", value, "--accelerator", "v5p")
    assert changed["peak"]["bytes"] == first["bytes"]


def test_levers_on_the_same_devices(llama2):
    """Where activations are kept, not keeping them is the biggest; with the devices given, none asks for more."""
    run, _ = plan.read_run(load_plan(llama2, mesh=MeshConfig(data=8)))
    config = run.config
    kept, off = dataclasses.replace(config.experts, remat="none"), dataclasses.replace(config.router, steps=0)
    run = dataclasses.replace(run, config=dataclasses.replace(config, experts=kept, router=off))
    found = [lever.setting for lever in planning.levers(run, "gpu", 10**15, more=False)]
    assert found[:2] == ["experts.remat=full", "experts.batch=8 experts.accum=16"]
    assert [setting for setting in found if setting.startswith("mesh.")] == ["mesh.data=4 mesh.model=2"]
    assert planning.levers(run, "gpu", 0, more=False) == []  # none that is not smaller


@pytest.mark.slow
def test_levers_of_separate_experts(llama2):
    """They are split over `expert` and `model`, not over `data`: weights and moments say so, and the levers."""

    def planned_on(data, expert):
        config = load_plan(llama2, mesh=MeshConfig(data=data, expert=expert), carve_experts=8)
        phase = dataclasses.replace(config.experts, way="parallel", batch=32, accum=4)
        config = dataclasses.replace(config, router=dataclasses.replace(config.router, steps=0), experts=phase)
        run, _ = plan.read_run(config)
        with jax.sharding.use_abstract_mesh(planning.abstract_mesh(config.mesh)):
            return run, planning.peak(planning.memory(run, "tpu"))[1]

    (run, now), own = planned_on(8, 2), 8 * 32 * 3 * 4096 * 5504  # parameters of all experts
    other = 6_738_415_616 - 32 * 3 * 4096 * 11008  # of what the batch's devices share
    assert now.weights == pytest.approx(4 * (own / 2 + other / 16), rel=0.01)
    assert now.optimizer == pytest.approx(8 * (own / 2 + other / 16), rel=0.01)
    found = {lever.setting: lever.total for lever in planning.levers(run, "tpu", now.total, more=True)}
    assert list(found)[:2] == ["mesh.expert=4", "mesh.model=2"] and found["mesh.model=2"] < 0.55 * now.total
    assert found["mesh.data=16"] > 0.94 * now.total
    there = {lever.setting for lever in planning.levers(run, "tpu", now.total, more=False)}
    assert {"mesh.data=4 mesh.expert=4", "mesh.data=4 mesh.model=2"} <= there
    run, now = planned_on(2, 8)  # one expert a device: the axis can be no longer
    assert not [lever for lever in planning.levers(run, "tpu", now.total, more=True) if "expert=" in lever.setting]


def test_levers_of_precision(llama2):
    """Of a run that distils in float32: what each saves."""
    run, _ = plan.read_run(load_plan(llama2, mesh=MeshConfig(data=8)))
    config, phase = run.config, dataclasses.replace(run.config.experts, kd_weight=1.0, ce_weight=0.0)
    off = dataclasses.replace(config.router, steps=0)
    run = dataclasses.replace(run, config=dataclasses.replace(config, experts=phase, router=off))
    with jax.sharding.use_abstract_mesh(planning.abstract_mesh(run.config.mesh)):
        found = planning.memory(run, "tpu")
    now, each = planning.peak(found)[1].total, 6_738_415_616 // 8
    saved = {lever.setting: now - lever.total for lever in planning.levers(run, "tpu", now, more=False)}
    assert list(found) == ["route", "experts"]
    assert saved["experts.teacher_topk=64"] == pytest.approx(4 * each, rel=0.02)
    assert saved["experts.teacher_dtype=bfloat16"] == pytest.approx(2 * each, rel=0.1)
    assert saved["experts.optim.mu_dtype=bfloat16"] >= 1.9 * each
    assert saved["experts.optim.params=bfloat16"] >= 1.9 * each
    kept = dataclasses.replace(phase, teacher_topk=64)
    with jax.sharding.use_abstract_mesh(planning.abstract_mesh(run.config.mesh)):
        changed = dataclasses.replace(run, config=dataclasses.replace(run.config, experts=kept))
        before = planning.memory(changed, "tpu")["teacher"]  # which fills the cache, before there is an optimizer
    assert before.optimizer == 0 and before.weights == pytest.approx(4 * each, rel=0.01)
    asked = planning.work(changed)
    assert asked.tokens["teacher"] == asked.tokens["experts"] and planning.work(changed, 10).tokens["teacher"] == 40960
    dense = planning.work(run).flops["experts"] - asked.flops["experts"]  # what no longer runs in each step
    assert asked.flops["teacher"] == pytest.approx(dense)


def test_a_carved_folder_and_its_data(stages, tmp_path):
    """The YAML of a run as it is: lengths and records from the data folder, U from the table."""
    path = stages.yaml("alternate", tmp_path / "out")
    made = planned(tmp_path, path, "--accelerator", "h100")
    assert made["devices"] == 1 and made["tokens"]["experts"] == 2 * 2 * 2 * 32
    assert made["tokens"]["labels"] <= made["tokens"]["router"] == 2 * 2 * 2 * 32
    config = load_yaml(plan.PlanConfig, path)
    run, records = plan.read_run(config)
    assert run.seq == 32 and 0 < run.used <= 48 and records > 0


KEPT = {"experts__teacher_topk": 8}
HALF = {"experts__optim": {"lr": 2e-3, "params": "bfloat16", "mu_dtype": "bfloat16"}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts__tuned": "ffn"},
        HALF,
        {"experts__teacher_dtype": "bfloat16"},
        HALF | {"experts__teacher_dtype": "bfloat16", "experts__tuned": "ffn"},
        KEPT,
        {"experts__kd_weight": 0.0, "experts__ce_weight": 1.0},
        {"experts__kd_weight": 0.0, "experts__ce_weight": 1.0, "router__teacher": "current"},
    ],
    ids=str,
)
def test_resident_memory_is_what_the_program_places(stages, tmp_path, monkeypatch, changes):
    """Arrays that the training program hands to its steps, byte for byte, each counted once."""
    path, held = stages.yaml("alternate", tmp_path / "out", **changes), {}
    load = placement.load_sharded

    def loads(*args, **options):
        held["loaded"] = load(*args, **options)
        return held["loaded"]

    def stops(name, *terms):
        def make(*_, **__):
            def step(*args):
                held.update({f"{name} {term}": value for term, value in zip(terms, args)})
                if name == "experts":
                    raise InterruptedError
                return args[0], {"loss": 0.0, "load": np.ones(7)}

            return jitted(step)

        monkeypatch.setattr(steps, f"make_{name.removesuffix('s')}_step", make)

    def label(*_):
        def step(params, table, ids_BT, _):
            held.update({"label params": params, "label table": table})
            return jnp.zeros((*ids_BT.shape, 3))

        return step

    monkeypatch.setattr(placement, "load_sharded", loads)
    monkeypatch.setattr(steps, "make_label", label)
    stops("router", "phase")
    stops("experts", "phase", "frozen", "teacher", "table")
    with pytest.raises(InterruptedError):
        alternate.main(["--config", path])
    run, _ = plan.read_run(config := load_yaml(plan.PlanConfig, path))
    with use_mesh(run.config.mesh):
        (weights, optimizer), before = planning.resident(run), planning.resident(run, before=True)
    phases = held["router phase"], held["experts phase"]
    assert optimizer == nbytes([phase.opt_state for phase in phases])
    others = [held[f"experts {term}"] for term in ("frozen", "teacher", "table")]
    assert weights == nbytes([[p.params for p in phases], others])
    with use_mesh(run.config.mesh):
        assert planning.checkpoint_bytes(run) == nbytes(phases)
    if config.labelled:
        assert before == (nbytes([held["loaded"][0], held["label params"], held["label table"]]), 0)


def nbytes(tree) -> int:
    return sum({id(array): array.nbytes for array in jax.tree.leaves(tree)}.values())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--accelerator", "v9"], r"accelerator='v9' is not known \(known: v4, v4i, v5e"),
        ([], r"accelerator='' is not known"),
        (["--accelerator", "v5p", "--devices", "8"], r"mesh data=16 expert=1 model=1 needs 16 devices, devices=8"),
        (["--accelerator", "v5p", "--mesh.data", "0"], r"mesh\.data=0 takes all devices: say devices, or mesh\.data"),
        (["--accelerator", "v5p", "--mesh.data", "32"], r"router\.batch=16 must be a multiple of the mesh's 32"),
        (["--accelerator", "v5p", "--mesh.data", "1000000000"], r"needs 1000000000 devices: more than 1048576 cannot"),
        (["--accelerator", "v5p", "--seq", "8192"], r"seq=8192 exceeds the model's context of 4096"),
        (["--accelerator", "v5p", "--experts.cut", "3"], r"experts\.cut=3 does not divide records of 4096 tokens"),
        (["--accelerator", "v5p", "--seq", "0"], r"seq: say it, there is no result in data=runs/llama2-7b/data yet"),
        (["--accelerator", "v5p", "--margin", "-0.5"], r"margin=-0\.5 must be at least 0 and below 1, or -1"),
        (["--accelerator", "v5p", "--disk", "-1"], r"disk=-1\.0 must not be negative"),
        (["--accelerator", "v5p", "--mfu", "40"], r"mfu=40\.0 must be above 0 and at most 1"),
        (["--accelerator", "v5p", "--experts.way", "parallel"], r"router\.steps needs labels of a dense run"),
    ],
    ids=str,
)
def test_bad_input(llama2, args, message):
    seq = [] if "--seq" in args else ["--seq", "4096"]
    with pytest.raises(ConfigError, match=message):
        plan.main([str(PAPER), "--model", str(llama2), *seq, *args])


def test_separate_experts_are_planned_from_a_bare_config(llama2, tmp_path, capsys):
    args = ["--experts.way", "parallel", "--router.steps", "0", "--carve-experts", "8", "--mesh.expert", "8"]
    file = llama2 / "config.json"
    made = planned(tmp_path, PAPER, "--accelerator", "v5p", "--model", file, "--seq", "4096", "--mesh.data", "2", *args)
    assert made["mesh"] == {"data": 2, "expert": 8, "model": 1} and list(made["memory"]) == ["route", "experts"]
    assert made["peak"]["usable"] == 0.75 * made["peak"]["of"] and "33% more than planned" in capsys.readouterr().out
    # eight experts of half of the FFN: four FFNs in all, one half of them for a token
    dense = 6_738_415_616
    assert made["parameters"]["backbone"] == dense + 3 * 32 * 3 * 4096 * 11008
    assert made["parameters"]["active"] == dense - 32 * 3 * 4096 * 5504


def test_every_config_of_the_paper_is_of_one_chain():
    """What a stage reads is what an earlier one writes; the schedule is Table 2's."""
    configs = PAPER.parent
    made = {p.stem: yaml.safe_load(p.read_text()) for p in configs.glob("*.yaml") if p.stem != "simulate"}
    assert set(made) == {"import", "data", "calibrate", "carve", "alternate", "evaluate"}
    written = {each["out"] for each in made.values()}
    for each in made.values():
        assert {each[key] for key in ("model", "data", "statistics") if isinstance(each.get(key), str)} <= written
    config = load_yaml(AlternateConfig, PAPER)
    router, experts = config.router, config.experts
    assert (config.rounds, router.steps, experts.steps) == (8, 100, 200)
    assert (router.batch * router.accum, experts.batch * experts.accum) == (64, 128)
    assert (router.optim.lr, experts.optim.lr, experts.optim.round_decay) == (5e-4, 5e-5, 0.8)
    assert (experts.kd_weight, experts.ce_weight, made["data"]["data"]["seq"]) == (0, 1, 4096)
    tokens = made["data"]["data"]["train_tokens"] * len(made["data"]["data"]["domains"])
    assert tokens >= 8 * 200 * 128 * 4096 and made["data"]["data"]["calibration_tokens"] == 16 * 4096
