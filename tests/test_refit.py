"""Down projections in closed form: least squares by hand, nothing to mend with all channels, the program, a resume."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stages import differing

from readme_jax import hf, placement, refit, steps
from readme_jax.config import ConfigError, Stopped
from readme_jax.data import open_records
from readme_jax.metrics import read_metrics
from readme_jax.models import backbone
from readme_jax.models.experts import Masked, make_table
from readme_jax.sharding import MeshConfig, put, spec, use_mesh
from readme_jax.train import separate

NONE = {"rounds": 1, "router__steps": 0, "experts__steps": 0}


def loaded(folder, stages, count=3):
    """(cfg, params, expert table, records with a random expert a token) on the current mesh."""
    cfg, shape, _ = hf.read_config(folder)
    params, table_LEC, _ = placement.load_sharded(folder, backbone.param_specs(cfg), dtype=np.float32)
    own = next(iter(open_records(stages.data, "train").values()))
    rng, records = np.random.default_rng(0), []
    for n in range(count):
        expert_BT = rng.integers(0, shape.experts, own.ids[n : n + 1].shape, dtype=np.int32)
        rows = {"ids": own.ids[n : n + 1], "segments": own.segments[n : n + 1], "expert": expert_BT}
        records.append({name: put(value) for name, value in rows.items()})
    return cfg, params, table_LEC, records


def test_solve_is_ridge_regression():
    rng = np.random.default_rng(0)
    h_MU, missed_MD = rng.standard_normal((50, 6)), rng.standard_normal((50, 3))
    h_MU[:, 2] = 0  # a channel that no token ran
    gram_UU, cross_UD = h_MU.T @ h_MU, h_MU.T @ missed_MD
    ridge = refit.RIDGE * np.trace(gram_UU) / 5
    # the same as plain least squares with sqrt(ridge) rows behind
    rows, want = np.concatenate([h_MU, np.sqrt(ridge) * np.eye(6)]), np.concatenate([missed_MD, np.zeros((6, 3))])
    expected_UD = np.linalg.lstsq(rows, want, rcond=None)[0]
    got_UD = refit.solve(jnp.array(gram_UU, jnp.float32), jnp.array(cross_UD, jnp.float32))
    np.testing.assert_allclose(got_UD, expected_UD, atol=1e-5)
    assert not np.asarray(got_UD)[2].any()


def test_with_all_channels_nothing_is_missed(stages, mesh):
    cfg, params, table_LEC, records = loaded(stages.carved, stages)
    everything = np.broadcast_to(np.arange(cfg.mlp, dtype=np.int32), (*table_LEC.shape[:2], cfg.mlp))
    w_LFD = refit.refit(cfg, params, make_table(everything, cfg.mlp), records)
    np.testing.assert_allclose(w_LFD, params["layers"]["w_down"], atol=1e-6)


def test_the_same_on_any_mesh(stages, any_mesh):
    def solved():
        cfg, params, table_LEC, records = loaded(stages.carved, stages, count=8)
        whole = {name: np.concatenate([np.asarray(record[name]) for record in records]) for name in records[0]}
        placed = {name: put(array, spec("batch", "seq")) for name, array in whole.items()}
        w_LFD = refit.refit(cfg, params, make_table(table_LEC, cfg.mlp), [placed])
        assert jax.typeof(w_LFD).sharding.spec == jax.typeof(params["layers"]["w_down"]).sharding.spec
        return np.asarray(w_LFD)

    got_LFD = solved()
    with use_mesh(MeshConfig(data=1)):
        np.testing.assert_allclose(got_LFD, solved(), atol=2e-5)


@pytest.mark.parametrize("name", ["static", "carved"])
def test_the_first_layer_by_hand_and_the_others_follow(stages, mesh, name):
    cfg, params, table_LEC, records = loaded(getattr(stages, name), stages)
    table = make_table(table_LEC, cfg.mlp)
    w_LFD = np.asarray(refit.refit(cfg, params, table, records))
    # layer 0: both models have the same input, so what is missed is the FFN output of the dropped channels
    inputs, layer = [], {key: np.asarray(leaf[0]) for key, leaf in params["layers"].items()}
    for record in records:
        x_BTD = backbone.embed(params["embedding"], record["ids"], jnp.float32)
        block = backbone.gathered(cfg, {key: leaf[0] for key, leaf in params["layers"].items()}, jnp.float32)
        _, y_BTD = backbone.packed(cfg, record["segments"])(x_BTD, block, None, lambda y_BTD, block: (y_BTD, y_BTD))
        inputs.append((np.asarray(y_BTD[0], np.float64), record))
    gram_FF, cross_FD = np.zeros((cfg.mlp, cfg.mlp)), np.zeros((cfg.mlp, cfg.embed))
    for y_TD, record in inputs:
        gate_TF, up_TF = y_TD @ layer["w_gate"].T, y_TD @ layer["w_up"].T
        h_TF = gate_TF / (1 + np.exp(-gate_TF)) * up_TF
        keep_TF = np.zeros_like(h_TF)
        for t, e in enumerate(np.asarray(record["expert"][0])):
            keep_TF[t, table_LEC[0, e]] = 1
        real_T = np.asarray(record["segments"][0]) > 0
        size_T = np.square(h_TF @ layer["w_down"]).sum(-1) * real_T
        weight_T = real_T / (size_T + size_T.sum() / real_T.sum())
        gram_FF += (h_TF * keep_TF * weight_T[:, None]).T @ (h_TF * keep_TF)
        cross_FD += (h_TF * keep_TF * weight_T[:, None]).T @ ((h_TF * (1 - keep_TF)) @ layer["w_down"])
    ran = np.diagonal(gram_FF) > 0
    ridge = refit.RIDGE * np.trace(gram_FF) / ran.sum()
    expected_FD = layer["w_down"] + np.linalg.solve(gram_FF + ridge * np.eye(cfg.mlp), cross_FD)
    np.testing.assert_allclose(w_LFD[0], expected_FD, atol=2e-4 * np.abs(expected_FD).max())

    def error(w_LFD, record):
        own = params | {"layers": params["layers"] | {"w_down": put(w_LFD)}}
        batch = record["ids"], record["segments"]
        x_BTD, _ = backbone.forward(cfg, own, *batch, table=table, route=Masked(record["expert"]))
        return float(jnp.square(x_BTD - backbone.forward(cfg, params, *batch)[0]).mean())

    before, after = (sum(error(w, r) for r in records) for w in (np.asarray(params["layers"]["w_down"]), w_LFD))
    assert after < 0.8 * before, (before, after)


def test_the_program_starts_from_it(stages, tmp_path, monkeypatch):
    seen, solved, solve = [], [], refit.refit

    def watched(cfg, params, table, records):
        seen.extend(np.asarray(record["ids"]) for record in records)
        solved.append(np.asarray(solve(cfg, params, table, records)))
        return put(solved[-1], jax.typeof(params["layers"]["w_down"]).sharding.spec)

    monkeypatch.setattr(refit, "refit", watched)
    stages.alternate(tmp_path / "plain", rounds=1)
    stages.alternate(tmp_path / "refit", rounds=1, experts__refit=15)
    lines = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "refit")}
    plain, first = (next(line["experts/loss"] for line in own if "experts/loss" in line) for own in lines.values())
    assert first < plain, "what it was solved for is there at the first step"
    there = np.concatenate([own.ids for own in open_records(stages.data, "calibration").values()])
    assert {row.tobytes() for ids in seen for row in ids} <= {row.tobytes() for row in there.astype(np.int32)}
    assert len(seen) == len({ids.tobytes() for ids in seen}) == 15, "batches of two, each record once"
    only = stages.alternate(tmp_path / "only", model=stages.static, experts__refit=3, **NONE)
    with use_mesh(MeshConfig(data=1)):
        cfg, _, _ = hf.read_config(only)
        was, is_ = (placement.load_sharded(f, backbone.param_specs(cfg))[0]["layers"] for f in (stages.static, only))
        assert np.abs(was["w_down"] - is_["w_down"]).max() > 0
        np.testing.assert_array_equal(is_["w_down"], solved[-1])
        np.testing.assert_array_equal(was["w_up"], is_["w_up"])


@pytest.mark.parametrize("tuned", ["all", "ffn"])
def test_stopped_and_started_again_it_ends_bit_equal(stages, tmp_path, monkeypatch, tuned):
    changes = {"rounds": 2, "experts__refit": 2, "experts__tuned": tuned}
    whole, calls, make = stages.alternate(tmp_path / "whole", **changes), [], steps.make_expert_step

    def stopping(*some, **more):
        step = make(*some, **more)

        def counted(*inputs):
            calls.append(1)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*inputs)

        counted.lower = step.lower
        return counted

    monkeypatch.setattr(steps, "make_expert_step", stopping)
    with pytest.raises(Stopped, match="saved at step 3 of 8"):
        stages.alternate(tmp_path / "again", **changes)
    stages.alternate(tmp_path / "again", **changes)
    assert not differing(tmp_path / "again", whole)


def test_bad_options(stages, tmp_path):
    separate.main(["--model", str(stages.tuned), "--out", str(tmp_path / "separate")])
    apart = {"model": tmp_path / "separate", "experts__kd_weight": 0, "experts__ce_weight": 1}
    for changes, says in (
        ({"experts__refit": -1}, "refit=-1 must not be negative"),
        (NONE, "router.steps, experts.steps and experts.refit are all 0"),
        ({**apart, "experts__refit": 1, **NONE}, "experts.refit needs the dense model"),
        ({"experts__refit": 16}, "experts.refit=16: 32 rows, calibration has only 30"),
    ):
        with pytest.raises(ConfigError, match=says):
            stages.alternate(tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()
