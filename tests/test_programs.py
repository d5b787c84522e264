"""The stages as programs, one after the other: results, resumption bit for bit, and every way to tune."""

import contextlib
import gc
import json
import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from stages import ONE, differing, jitted, weights

from readme_jax import api, artifacts, cli, loop, routing
from readme_jax import carve as carving
from readme_jax.alternate import AlternateConfig
from readme_jax.checkpoint import Checkpoints
from readme_jax.config import ArtifactError, load_yaml
from readme_jax.data import Batches, open_records
from readme_jax.infer import export, generate
from readme_jax.losses import next_token
from readme_jax.metrics import NonFiniteError, read_metrics
from readme_jax.statistics import load_statistics
from readme_jax.teacher import RecordCache
from readme_jax.train import alternate, calibrate, carve, evaluate, import_hf, prepare

FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class Killed(Exception):
    """Stands for the end of the process."""


def dies_at(monkeypatch, owner, name, call):
    """`owner.name` makes a function: let the made function raise Killed at its `call`-th call (from 0)."""

    def die():
        raise Killed

    calls_at(monkeypatch, owner, name, call, die)


def calls_at(monkeypatch, owner, name, call, what):
    """`owner.name` makes a function: do `what` before the `call`-th call (from 0) of the made function."""
    make = getattr(owner, name)

    def made(*args, **kwargs):
        function, count = make(*args, **kwargs), iter(range(10**9))

        def counted(*args):
            if next(count) == call:
                what()
            return function(*args)

        return jitted(counted, function)

    monkeypatch.setattr(owner, name, made)


@contextlib.contextmanager
def nothing_compiles(monkeypatch):
    """What XLA is asked for while `train` runs its loop: after what it compiles ahead, before the result."""
    names, within = [], []

    def heard(name, seconds, fun_name="", **_):
        saves = fun_name == "jit(slice)"  # Orbax, of what several devices hold
        if within and name == "/jax/core/compile/backend_compile_duration" and not saves:
            names.append(fun_name)

    profiler, write = alternate.Profiler, alternate.write
    with monkeypatch.context() as patch:
        patch.setattr(alternate, "Profiler", lambda *args: within.append(1) or profiler(*args))
        patch.setattr(alternate, "write", lambda *args: within.clear() or write(*args))
        jax.monitoring.register_event_duration_secs_listener(heard)
        yield
        jax.monitoring.unregister_event_duration_listener(heard)
    assert names == []


def test_results(stages):
    before, after = weights(stages.source), weights(stages.dense)
    assert before.keys() == after.keys()
    assert all((a.dtype, a.tobytes()) == (after[n].dtype, after[n].tobytes()) for n, a in before.items())
    for name, stage, parents in (
        ("dense", "import", set()),
        ("data", "data", set()),
        ("statistics", "calibrate", {"model", "data"}),
        ("carved", "carve", {"model", "statistics"}),
        ("tuned", "alternate", {"model", "data"}),
    ):
        manifest = artifacts.verify(getattr(stages, name), hashes=True)
        assert manifest["stage"] == stage and set(manifest["parents"]) == parents and "jax" in manifest["versions"]
    config = load_yaml(AlternateConfig, stages.tuned)
    lines = read_metrics(stages.tuned / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(config.total)) == list(range(8))
    for line in lines:
        assert {key.split("/")[0] for key in line if key != "step"} == {config.at(line["step"])[0]}
    assert [config.at(t)[0][0] for t in range(8)] == list("rreerree")
    assert lines[2]["experts/loss"] == pytest.approx(lines[2]["experts/kl"], rel=1e-4)
    assert lines[2]["experts/kl"] > 0 and lines[0]["router/loss"] > 0
    assert sorted(p.name for p in stages.tuned.iterdir()) == sorted(
        ["config.json", "config.yaml", "generation_config.json", "manifest.json", "metrics.jsonl", "model.safetensors"]
        + ["timing.jsonl", "tokenizer.json", "tokenizer_config.json"]
    )
    info = artifacts.read_manifest(stages.tuned)["info"]
    assert info["tokens"] == {"router": 4 * 2 * 32, "experts": 4 * 2 * 32} and info["tokens_per_s"]["experts"] > 0
    # the teacher and the table stay; router and every tensor of the backbone were tuned
    assert weights(stages.tuned)["readme.experts"].tolist() == weights(stages.carved)["readme.experts"].tolist()
    assert differing(stages.tuned, stages.carved) == set(weights(stages.tuned)) - {"readme.experts"}


def test_statistics_are_means_over_tokens(stages):
    stats = load_statistics(stages.statistics)
    records = open_records(stages.data, "calibration")
    assert stats.names == tuple(records)
    assert stats.tokens_M.tolist() == [np.count_nonzero(r.segments) for r in records.values()]
    np.testing.assert_allclose(stats.share_MLF.sum(-1), 1, rtol=1e-5)
    assert (stats.abs_MLF >= np.abs(stats.mean_MLF) - 1e-7).all()
    assert (stats.square_MLF * (1 + 1e-5) >= stats.abs_MLF**2).all()


def test_finished_stages_are_not_redone(stages, monkeypatch, capsys):
    for owner, name in ((alternate, "train"), (evaluate, "evaluate"), (calibrate, "make_statistics")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("done again"))
    folders = {import_hf: "dense", prepare: "data", calibrate: "statistics", carve: "carved", alternate: "tuned"}
    for program, name in folders.items():
        folder = getattr(stages, name)
        stamp = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        program.main(["--config", str(folder)])  # the resolved config of a result reruns it
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == stamp
    assert capsys.readouterr().out.count("already there") == 3


# ---- resumption -------------------------------------------------------------------------------


def test_killed_anywhere_ends_bit_equal(stages, tmp_path, monkeypatch, capsys):
    """Killed while labelling, before and after checkpoints, in a phase and while the result is written."""
    out = tmp_path / "tuned"
    with monkeypatch.context() as patch:
        patch.setattr(RecordCache.fill, "__defaults__", (1,))
        dies_at(patch, alternate.steps, "make_label", 5)
        with pytest.raises(Killed):
            stages.alternate(out)
    assert json.loads((tmp_path / ".tuned.partial/labels.json").read_text()) == {"records": 5}
    for name, call, resumed in (
        ("make_router_step", 1, None),  # nothing was saved yet
        ("make_expert_step", 0, None),  # right after the first phase was saved
        ("make_router_step", 1, 2),  # in the second round: that round's router phase is lost
        ("make_expert_step", 1, 4),
    ):
        with monkeypatch.context() as patch:
            dies_at(patch, alternate.steps, name, call)
            with pytest.raises(Killed):
                stages.alternate(out)
        assert (f"resumed at step {resumed} of 8" in capsys.readouterr().out) == (resumed is not None)
    with monkeypatch.context() as patch:
        patch.setattr(alternate, "write", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            stages.alternate(out)
    assert not out.exists()
    stages.alternate(out)
    assert "resumed at step 6 of 8" in capsys.readouterr().out
    assert differing(out, stages.tuned) == set()
    assert (out / "metrics.jsonl").read_text() == (stages.tuned / "metrics.jsonl").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tuned", "tuned.alternate.yaml"]


def test_bfloat16_and_the_likeliest_tokens_killed_anywhere_end_bit_equal(stages, tmp_path, monkeypatch):
    """Parameters, first moment and teacher in bfloat16, the teacher from the disk: resumption, and what is written."""
    half = {"params": "bfloat16", "mu_dtype": "bfloat16"}
    run = {"experts__optim": {"lr": 2e-3} | half, "router__optim": {"lr": 1e-2} | half, "experts__teacher_topk": 32}
    run |= {"dtype": "bfloat16", "experts__teacher_dtype": "bfloat16"}
    whole, out = stages.alternate(tmp_path / "whole", **run), tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(RecordCache.fill, "__defaults__", (1,))
        dies_at(patch, alternate.steps, "make_top_k", 2)
        with pytest.raises(Killed):
            stages.alternate(out, **run)
    assert json.loads((tmp_path / ".killed.partial/top_k.json").read_text()) == {"records": 4}
    with monkeypatch.context() as patch:
        patch.setattr(alternate.steps, "make_label", lambda *_: lambda *_: pytest.fail("labelled again"))
        dies_at(patch, alternate.steps, "make_expert_step", 3)
        with pytest.raises(Killed):
            stages.alternate(out, **run)
    with monkeypatch.context() as patch:
        patch.setattr(alternate.steps, "make_top_k", lambda *_: lambda *_: pytest.fail("asked again"))
        stages.alternate(out, **run)
    assert differing(out, whole) == set()
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert {str(a.dtype) for n, a in weights(out).items() if n != "readme.experts"} == {"bfloat16"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert not [p.name for p in out.iterdir() if p.name.startswith(("top_k", "labels"))]
    model = api.load(out)
    assert np.isfinite(model.logits([[1, 2, 3]])).all() and model.route([[1, 2, 3]]).shape == (1, 3)
    assert logged(out, "router/loss") == pytest.approx(logged(stages.tuned, "router/loss"), rel=0.05)
    kl, part = logged(stages.tuned, "experts/kl")[2], logged(out, "experts/kl")[2]
    assert 0.02 * kl < part < kl, "of 33 classes in place of 384"


def test_all_tokens_from_the_disk_are_the_dense_teacher(stages, tmp_path, monkeypatch):
    """With K = V nothing is left out: the run of the teacher on the device, in other arithmetic."""
    with nothing_compiles(monkeypatch):
        out = stages.alternate(tmp_path / "out", experts__teacher_topk=384, experts__accum=2, experts__batch=1)
    for key in ("experts/kl", "experts/loss", "experts/grad_norm", "router/loss"):
        assert logged(out, key) == pytest.approx(logged(stages.tuned, key), rel=1e-3), key


@pytest.mark.parametrize(
    "change, copies, teacher",
    [
        ({}, 4, True),  # parameters, two moments, the teacher
        ({"experts__teacher_topk": 8}, 3, False),
        ({"experts__kd_weight": 0.0, "experts__ce_weight": 1.0}, 3, False),
        ({"experts__kd_weight": 0.0, "experts__ce_weight": 1.0, "router__teacher": "current"}, 3, False),
        ({"experts__kd_weight": 0.0, "experts__ce_weight": 1.0, "experts__tuned": "ffn"}, 3, False),
    ],
)
def test_no_teacher_on_the_device_that_nothing_asks(stages, tmp_path, monkeypatch, change, copies, teacher):
    seen, make = [], alternate.steps.make_expert_step

    def spy(*args, **kwargs):
        step = make(*args, **kwargs)

        def counted(*inputs):
            gc.collect()
            gates = [a for a in jax.live_arrays() if a.shape == (2, 48, 32) and not a.is_deleted()]
            seen.append((len(gates) // 3, inputs[2] is not None))  # gate, up and down have one shape
            return step(*inputs)

        return jitted(counted, step)

    monkeypatch.setattr(alternate.steps, "make_expert_step", spy)
    monkeypatch.setattr(Checkpoints, "save", lambda *_: None)  # what is being written is alive as well
    stages.alternate(tmp_path / "out", rounds=1, **change)
    assert seen == [(copies, teacher)] * 2


def test_checkpoints_within_a_phase(stages, tmp_path, monkeypatch, capsys):
    """A checkpoint at every step: a start that dies takes up the last one."""
    out = tmp_path / "tuned"
    for call, resumed in ((1, None), (0, 3)):
        with monkeypatch.context() as patch:
            dies_at(patch, alternate.steps, "make_expert_step", call)
            with pytest.raises(Killed):
                stages.alternate(out, checkpoint__minutes=1e-9)
        assert (f"resumed at step {resumed} of 8" in capsys.readouterr().out) == (resumed is not None)
    with nothing_compiles(monkeypatch):
        stages.alternate(out, checkpoint__minutes=1e-9)
    assert differing(out, stages.tuned) == set()
    assert (out / "metrics.jsonl").read_text() == (stages.tuned / "metrics.jsonl").read_text()
    timing, info = read_metrics(out / "timing.jsonl"), artifacts.read_manifest(out)["info"]
    assert [line["step"] for line in timing] == list(range(8)), "of three starts"
    spent = sum(line["time/step"] - line["time/compile"] for line in timing if line["step"] % 4 < 2)
    assert info["tokens_per_s"]["router"] == pytest.approx(4 * 2 * 32 / spent), "over all starts"
    assert info["seconds"] > sum(line["time/step"] for line in timing)
    assert timing[0]["time/compile"] > 0 and not any(line["time/compile"] for line in timing if line["step"] in (1, 2))
    with pytest.raises(ArtifactError, match="belongs to another run .*seed=0 there, 1 here"):
        stages.alternate(out, checkpoint__minutes=1e-9, seed=1)


def test_a_timed_checkpoint_is_written_once(stages, tmp_path, monkeypatch):
    """With several processes a wish comes back a step late."""
    now, wishes, saved, save = [0.0], [0], [], Checkpoints.save

    class Late:
        def step(self, wish):
            now[0] += 60
            wishes.append(wish)
            return wishes[-2]

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(alternate.distributed, "Agreement", Late)
    monkeypatch.setattr(Checkpoints, "save", lambda own, tick, *rest: saved.append(tick) or save(own, tick, *rest))
    run = {"rounds": 1, "router__steps": 2, "experts__steps": 7}
    stages.alternate(tmp_path / "out", checkpoint__minutes=1.5, **run)
    assert saved == [2, 6, 9], "phases end at 2 and 9; the time is up at 5, which is known at 6 and over with that"


def test_asked_to_stop_it_saves_and_says_so(stages, tmp_path, monkeypatch, capsys):
    """SIGTERM in the midst of a phase and while labelling: exit code 75, and the next start goes on from there."""
    out, resumed = tmp_path / "tuned", []
    for name, call, words in (
        ("make_label", 2, "stopped by SIGTERM; 3 of 8 records are done"),
        ("make_router_step", 0, "stopped by SIGTERM; saved at step 1 of 8"),
        ("make_expert_step", 2, "stopped by SIGTERM; saved at step 7 of 8"),
    ):
        with monkeypatch.context() as patch:
            calls_at(patch, alternate.steps, name, call, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(SystemExit) as stop:
                cli.run(lambda _: stages.alternate(out))
        assert stop.value.code == 75
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-1] == words
        resumed += [line for line in printed.out.splitlines() if "resumed" in line]
    stages.alternate(out)
    assert "resumed at step 7 of 8" in capsys.readouterr().out and resumed == ["resumed at step 1 of 8"]
    assert differing(out, stages.tuned) == set()
    assert (out / "metrics.jsonl").read_text() == (stages.tuned / "metrics.jsonl").read_text()


@pytest.mark.parametrize("owner, name", [("placement", "load_sharded"), ("optim", "make")])
def test_asked_to_stop_outside_of_the_steps(stages, tmp_path, monkeypatch, capsys, owner, name):
    """While the model is loaded, and between labels and steps: the first moment to leave is taken."""
    own, began = getattr(getattr(alternate, owner), name), []

    def asked(*args, **kwargs):
        if not began:
            began.append(os.kill(os.getpid(), signal.SIGTERM))
        return own(*args, **kwargs)

    monkeypatch.setattr(getattr(alternate, owner), name, asked)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda _: stages.alternate(tmp_path / "out"))
    assert stop.value.code == 75
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGTERM; nothing is lost"
    labels = tmp_path / ".out.partial/labels.json"
    assert labels.exists() == (name == "make") and not (tmp_path / ".out.partial/checkpoints/1").exists()


def test_a_loss_that_is_not_finite_stops_the_run(stages, tmp_path, monkeypatch, capsys):
    """It names step and records, and what is saved is from before it."""
    make = alternate.steps.make_expert_step

    def poisoned(*args, **kwargs):
        step, count = make(*args, **kwargs), iter(range(10**9))

        def run(*args):
            phase, values = step(*args)
            return phase, values | ({"loss": values["loss"] * np.float32("nan")} if next(count) == 1 else {})

        return jitted(run, step)

    monkeypatch.setattr(alternate.steps, "make_expert_step", poisoned)
    monkeypatch.setattr(alternate.jax, "transfer_guard_host_to_device", lambda _: contextlib.nullcontext())
    with pytest.raises(NonFiniteError) as stop:
        stages.alternate(tmp_path / "tuned", checkpoint__steps=1)
    config = load_yaml(AlternateConfig, stages.tuned)
    records = open_records(stages.data, "train")
    numbers = Batches(records, dict.fromkeys(records, 1.0), batch=2, seed=1).index(1)
    assert config.at(3) == ("experts", 1)
    where = f"step 1 of phase experts, records {', '.join(map(str, sorted(numbers.ravel())))}"
    said = f"step 3 ({where}): experts/loss is nan; the run stops before this is saved; the same config comes to it"
    assert str(stop.value).startswith(said)
    assert max(int(p.name) for p in (tmp_path / ".tuned.partial/checkpoints").iterdir()) == 3


def test_a_window_of_steps_is_traced(stages, tmp_path):
    out = stages.alternate(tmp_path / "tuned", rounds=1, profile={"steps": 1, "start": 2})
    assert list((out / "profile").rglob("*.xplane.pb"))
    manifest = json.loads((out / "manifest.json").read_text())
    identity = artifacts.parent_identity(out)
    for name, same in (("timing.jsonl", True), ("metrics.jsonl", False)):
        manifest["files"][name]["sha256"] = "other"
        (out / "manifest.json").write_text(json.dumps(manifest))
        assert (artifacts.parent_identity(out) == identity) == same, "what was measured is no part of an identity"


def test_interrupted_calibration_goes_on(stages, tmp_path, monkeypatch):
    argv = ["--model", str(stages.dense), "--data", str(stages.data), "--out", str(tmp_path / "s"), *ONE]
    monkeypatch.setattr(calibrate, "SAVE_EVERY", -1.0)
    for call in (13, 4):
        with monkeypatch.context() as patch:
            dies_at(patch, calibrate, "make_statistics", call)
            with pytest.raises(Killed):
                calibrate.main(argv)
    with monkeypatch.context() as patch:  # 30 records, of which 13 and 4 are done
        dies_at(patch, calibrate, "make_statistics", 13)
        calibrate.main(argv)
    whole, resumed = load_statistics(stages.statistics), load_statistics(tmp_path / "s")
    assert whole.names == resumed.names and whole.tokens_M.tolist() == resumed.tokens_M.tolist()
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(array, resumed.arrays()[name])
    assert not list((tmp_path / "s").glob("*unfinished*"))


def test_another_run_in_the_same_folder_is_refused(stages, tmp_path):
    for program, name, *change in (
        (import_hf, "dense", "--source", str(tmp_path)),
        (prepare, "data", "--data.seq", "16"),
        (calibrate, "statistics", "--dtype", "bfloat16"),
        (carve, "carved", "--fraction", "0.25"),
        (alternate, "tuned", "--experts.ce_weight", "0.5"),
    ):
        folder = getattr(stages, name)
        with pytest.raises(ArtifactError, match=f"out={folder} belongs to another run"):
            program.main(["--config", str(folder), *change])
        artifacts.verify(folder)


# ---- ways to tune -----------------------------------------------------------------------------


def logged(folder, key):
    """{step: value} of a metric."""
    return {line["step"]: line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line}


def test_grouped_with_remat_equals_masked(stages, tmp_path, monkeypatch):
    with nothing_compiles(monkeypatch):
        out = stages.alternate(tmp_path / "grouped", rounds=1, experts__way="grouped", experts__remat="full")
    for key in ("router/loss", "experts/loss", "experts/kl", "experts/grad_norm"):
        whole = logged(stages.tuned, key)
        assert logged(out, key).keys() == whole.keys() & {0, 1, 2, 3}
        for step, value in logged(out, key).items():
            assert value == pytest.approx(whole[step], rel=1e-4, abs=1e-6), (key, step)


def test_static_model_and_ffn_only(stages, tmp_path):
    """One expert needs no router; with `ffn` all else keeps its bytes."""
    out = stages.alternate(tmp_path / "static", model=stages.static, router__steps=0, experts__tuned="ffn", rounds=1)
    changed = differing(out, stages.static)
    assert changed == {n for n in weights(stages.static) if any(part in n for part in FFN)}
    model = api.load(out)
    assert model.router_config is None and model.route([[1, 2, 3]]).tolist() == [[0, 0, 0]]


def test_records_cut_into_rows(stages, tmp_path):
    """Half as long rows, so half the tokens a step; what the teacher says of them is kept by row."""
    out = stages.alternate(tmp_path / "cut", rounds=1, experts__cut=2)
    tokens = {m: artifacts.read_manifest(m)["info"]["tokens"] for m in (out, stages.tuned)}
    assert 2 * tokens[out]["experts"] * 2 == tokens[stages.tuned]["experts"], "one round, and half the tokens"
    assert 2 * tokens[out]["router"] == tokens[stages.tuned]["router"]
    kept = stages.alternate(tmp_path / "kept", rounds=1, experts__cut=2, experts__teacher_topk=384)
    asked, told = logged(out, "experts/kl"), logged(kept, "experts/kl")
    assert told == pytest.approx(asked, rel=1e-3)


def test_current_teacher_labels_on_the_fly(stages, tmp_path, monkeypatch):
    with nothing_compiles(monkeypatch):
        out = stages.alternate(tmp_path / "current", router__teacher="current")
    original, current = logged(stages.tuned, "router/loss"), logged(out, "router/loss")
    assert [current[t] for t in (0, 1)] == pytest.approx([original[t] for t in (0, 1)], rel=1e-6)
    # from the second round on the labels are of the tuned model
    assert all(current[t] != original[t] and current[t] == pytest.approx(original[t], rel=0.05) for t in (4, 5))


def test_router_alone_on_a_pool_of_records(stages, tmp_path, monkeypatch):
    pools, make = [], RecordCache.__init__

    def spy(self, folder, name, ids_N, *rest):
        pools.append(ids_N.tolist())
        make(self, folder, name, ids_N, *rest)

    monkeypatch.setattr(RecordCache, "__init__", spy)
    out = stages.alternate(tmp_path / "router", router__records=3, router__steps=3, experts__steps=0)
    # one record of each domain, all of them seen in six steps of two
    assert len(pools) == 1 and len(pools[0]) == 3
    assert {n.split(".")[1] for n in differing(out, stages.carved)} == {"router"}
    again = stages.alternate(tmp_path / "experts", model=out, router__steps=0, rounds=1)
    assert not any(n.startswith("readme") for n in differing(again, out)), "the router is frozen"
    assert {n for n in weights(out) if not n.startswith("readme")} <= differing(again, out)


def test_paper_configuration(stages, tmp_path):
    labels = dict(kind="overlap", signed=True, hard_weight=0.75, soft_weight=0.25, label_smoothing=0.5, temperature=0.1)
    out = stages.alternate(
        tmp_path / "paper", rounds=1, dtype="bfloat16", router__accum=2, router__labels=labels, experts__accum=2,
        experts__batch=1, experts__kd_weight=0.0, experts__ce_weight=1.0,
    )  # fmt: skip
    losses = logged(out, "experts/loss")
    assert losses == logged(out, "experts/ce") and set(logged(out, "experts/kl").values()) == {0.0}
    # the records are those of the float32 run: as many a step, in the same order
    assert losses[2] == pytest.approx(logged(stages.tuned, "experts/ce")[2], rel=0.01)
    assert {a.dtype for n, a in weights(out).items() if n != "readme.experts"} == {np.dtype(np.float32)}
    # three experts: smoothing and mix keep the cross-entropy of the labels away from 0
    assert all(0.5 < value < 1.5 for value in logged(out, "router/loss").values())


def test_separate_storage(stages, tmp_path):
    separate = tmp_path / "separate"
    carving.to_separate(stages.tuned, separate)
    ids = np.random.default_rng(0).integers(0, 384, (2, 40))
    tied, apart = api.load(stages.tuned), api.load(separate)
    np.testing.assert_array_equal(apart.route(ids), tied.route(ids))
    np.testing.assert_allclose(apart.logits(ids), tied.logits(ids), rtol=0, atol=1e-4)
    out = stages.alternate(
        tmp_path / "out", model=separate, router__steps=0, rounds=1, experts__kd_weight=0.0, experts__ce_weight=1.0
    )
    tuned = api.load(out)
    np.testing.assert_array_equal(tuned.route(ids), tied.route(ids))
    assert set(np.unique(tied.route(ids))) > {0}, "more than one expert is used"
    assert np.abs(tuned.logits(ids) - apart.logits(ids)).max() > 1e-3


APART = {"router__steps": 0, "experts__kd_weight": 0.0, "experts__ce_weight": 1.0, "experts__batch": 6}
APART |= {"experts__accum": 2}
SIX = {"experts__way": "parallel", "mesh__data": 2, "mesh__expert": 3}


@pytest.fixture
def hasty():
    """Programs of six devices that run for a moment: most of the time goes into compiling them well."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_parallel_experts_are_masked_ones(stages, tmp_path, monkeypatch, hasty):
    """Three experts on three devices, two batches of them: what one device gets, in fewer channels a token."""
    separate = tmp_path / "separate"
    carving.to_separate(stages.tuned, separate)
    one = stages.alternate(tmp_path / "one", model=separate, **APART)
    with nothing_compiles(monkeypatch):
        many = stages.alternate(tmp_path / "many", model=separate, **APART, **SIX)
    for key in ("experts/loss", "experts/grad_norm"):
        assert logged(many, key) == pytest.approx(logged(one, key), rel=1e-5)
    for name, array in weights(one).items():
        np.testing.assert_allclose(weights(many)[name], array, rtol=0, atol=2e-4, err_msg=name)


def test_parallel_sizes_that_were_not_foreseen(stages, tmp_path, monkeypatch, capsys, hasty):
    """They are compiled in the run, which says so and does not time it; killed and resumed it ends bit-equal."""
    separate = tmp_path / "separate"
    carving.to_separate(stages.tuned, separate)
    run = {"model": separate, "checkpoint__steps": 1, **APART, **SIX}
    monkeypatch.setattr(routing, "likely", lambda needs, tokens, peers: routing.ladder(tokens, peers)[:1])
    whole, out = stages.alternate(tmp_path / "whole", **run), tmp_path / "killed"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("experts: compiled in ")]
    timing = read_metrics(whole / "timing.jsonl")
    late = [line for line in timing[1:] if line["time/compile"]]
    assert 1 <= len(late) <= len(lines) <= len(late) + 1, "one of them may be the first step's"
    for line in late:
        assert line["time/step"] > line["time/compile"] + line["time/save"] > line["time/step_p95"]
    with monkeypatch.context() as patch:
        dies_at(patch, alternate.steps, "make_expert_step", 2)
        with pytest.raises(Killed):
            stages.alternate(out, **run)
    stages.alternate(out, **run)
    assert "resumed at step" in capsys.readouterr().out
    assert differing(out, whole) == set()
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


# ---- evaluate, generate, export ---------------------------------------------------------------


def test_evaluate_against_logits(stages, tmp_path, capsys):
    """Losses and routing counts of the program against NumPy on the facade's logits and experts."""
    config = {"model": stages.tuned, "data": stages.data, "out": tmp_path / "e", "mesh": {"data": 1}, "agreement": True}
    config["arms"] = ["dense", "own_domain", "routed"]
    (tmp_path / "e.yaml").write_text(json.dumps(config, default=str))
    evaluate.main(["--config", str(tmp_path / "e.yaml")])
    assert capsys.readouterr().out.count("perplexity") == 3
    result = json.loads((tmp_path / "e/evaluation.json").read_text())
    records = open_records(stages.data, "test")
    tuned = api.load(stages.tuned)
    total, routed, same, pairs = 0, np.zeros(3), 0, 0
    for name, own in records.items():
        loss = tokens = 0.0
        for ids_T, segments_T in zip(own.ids, own.segments):
            for segment in np.unique(segments_T):  # documents are independent of each other
                ids_1T = ids_T[None, segments_T == segment]
                logits_TV = tuned.logits(ids_1T)[0].astype(np.float64)
                logits_TV -= logits_TV.max(-1, keepdims=True)
                logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
                loss -= logp_TV[np.arange(ids_1T.shape[1] - 1), ids_1T[0, 1:]].sum()
                tokens += ids_1T.shape[1] - 1
                expert_T = tuned.route(ids_1T)[0]
                routed += np.bincount(expert_T, minlength=3)
                same, pairs = same + (expert_T[1:] == expert_T[:-1]).sum(), pairs + len(expert_T) - 1
        entry = result["arms"]["routed"][name]
        assert entry["tokens"] == tokens and entry["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        assert entry["perplexity"] == pytest.approx(np.exp(loss / tokens), rel=1e-4)
        total += entry["loss"] / len(records)
        weight = sum(next_token(i[None], s[None])[1].sum() for i, s in zip(own.ids, own.segments))
        assert result["arms"]["dense"][name]["tokens"] == int(weight) == tokens
    assert result["mean_loss"]["routed"] == pytest.approx(total, rel=1e-9)
    routing = result["routing"]
    np.testing.assert_allclose(routing["load"], routed / routed.sum(), atol=1e-9)
    assert routing["keeps_previous"] == pytest.approx(same / pairs) and 0 <= routing["agreement"] <= 1
    assert len({round(v, 6) for v in result["mean_loss"].values()}) == 3, "three arms, three different models"


def test_router_of_another_folder(stages, tmp_path):
    argv = ["--model", str(stages.carved), "--data", str(stages.data), "--router", str(stages.tuned)]
    evaluate.main([*argv, "--arms", "routed", "--out", str(tmp_path / "e"), *ONE])
    result = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert set(result["arms"]) == {"routed"} and result["routing"]["agreement"] is None
    assert sum(result["routing"]["load"]) == pytest.approx(1)


def test_generate_prints_texts(stages, capsys, monkeypatch):
    argv = ["--model", str(stages.tuned), "--max-new-tokens", "4"]
    generate.main([*argv, "--prompts", "one two", "red", "--experts"])
    out = capsys.readouterr().out
    assert out.startswith("> one two\n") and "\n> red\n" in out and out.count("experts: ") == 2
    monkeypatch.setattr("sys.stdin", iter(["one two\n", "\n", "red\n"]))
    generate.main(argv)
    piped = capsys.readouterr().out
    assert piped.splitlines()[:2] == out.splitlines()[:2]


def test_export_writes_a_folder(stages, tmp_path, capsys):
    export.main(["--model", str(stages.tuned), "--out", str(tmp_path / "x"), "--no-check"])
    assert capsys.readouterr().out == f"exported: {tmp_path / 'x'}\n"
    assert differing(stages.tuned, tmp_path / "x") == set()
    names = {p.name for p in (tmp_path / "x").iterdir()}
    assert {"modeling_readme.py", "configuration_readme.py", "README.md"} <= names
