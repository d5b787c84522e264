"""Learned masks: exact budgets, the gradient through the choice, a start that is the carved model, the program."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stages import differing

from readme_jax import artifacts, hf, masks, placement, steps
from readme_jax import load as open_model
from readme_jax.carve import choose
from readme_jax.config import ConfigError, Stopped
from readme_jax.data import open_records
from readme_jax.metrics import read_metrics
from readme_jax.models import backbone, experts
from readme_jax.sharding import MeshConfig, put, use_mesh
from readme_jax.train import masks as program


def arguments(stages, out, *more, model=None):
    steps = [] if "--steps" in more else ["--steps", "6"]
    model = stages.tuned if model is None else model
    return ["--model", str(model), "--data", str(stages.data), "--out", str(out), *steps, *more]


@pytest.fixture(scope="module")
def learned(stages, tmp_path_factory):
    out = tmp_path_factory.mktemp("masks") / "learned"
    program.main(arguments(stages, out))
    return out


def test_exactly_c_channels_ties_to_the_lower_id():
    scores_LEF = jnp.array([[[0.5, 0.1, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [-1.0, 3.0, 2.0, 4.0]]])
    assert masks.chosen(scores_LEF, 2).astype(int).tolist() == [[[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 1]]]
    assert masks.table_of(scores_LEF, 2).tolist() == [[[0, 2], [0, 1], [1, 3]]]


def test_the_gradient_passes_straight_through():
    scores_LEF = jnp.array([[[0.9, 0.2, 0.4]]])
    value, grad = jax.value_and_grad(lambda s: jnp.sum(masks.straight_through(s, 1) * jnp.array([2.0, 3.0, 5.0])))(
        scores_LEF
    )
    assert value == 2 and grad.tolist() == [[[2.0, 3.0, 5.0]]], "channels that are not chosen have one too"


def test_a_mask_of_floats_is_the_mask_of_bools():
    rng = np.random.default_rng(0)
    gate_BTF, up_BTF = jnp.array(rng.standard_normal((2, 1, 3, 8), np.float32))
    keep_BTF = jnp.array(rng.random((1, 3, 8)) < 0.5)

    def out(keep_BTF):
        return experts._gated(gate_BTF, up_BTF, keep_BTF)

    np.testing.assert_array_equal(out(keep_BTF), out(keep_BTF.astype(jnp.float32)))
    grad_BTF = jax.grad(lambda keep: jnp.sum(out(keep)))(keep_BTF.astype(jnp.float32))
    np.testing.assert_allclose(grad_BTF, jax.nn.silu(gate_BTF) * up_BTF, rtol=1e-6)


def test_the_first_scores_are_the_table_then_importance():
    share_ELF = np.array([[[1.0, 2.0, 3.0, 5.0]], [[2.5, 2.5, 2.5, 3.0]]])
    table_LEC = np.array([[[1, 2], [0, 3]]])
    scores_LEF = masks.first_scores(share_ELF, table_LEC)  # first: in the table 1 < 2, outside 0 < 3
    np.testing.assert_array_equal(scores_LEF[0] * 4, [[0, 2, 3, 1], [2, 0, 1, 3]])
    np.testing.assert_array_equal(masks.table_of(jnp.array(scores_LEF), 2), table_LEC)


def test_importance_is_of_the_own_domain_or_the_own_windows(stages):
    """Names of domains: their statistics. Other names: the windows of text of which an expert keeps most."""
    cfg, shape, _ = hf.read_config(stages.tuned)
    assert shape is not None
    records = open_records(stages.data, "calibration")
    with use_mesh(MeshConfig(data=1)):
        params, table_LEC, _ = placement.load_sharded(stages.tuned, backbone.param_specs(cfg), dtype=np.float32)
        assert table_LEC is not None
        whole = masks.importance(cfg, params, records, table_LEC, shape.names)
        found = masks.importance(cfg, params, records, table_LEC, ("expert0", "expert1", "expert2"))
        one = masks.importance(cfg, params, records, table_LEC[:, :1], ("static",))
        share_MPLF = {name: [] for name in records}
        for (name, own), mean_LF in zip(records.items(), whole[[shape.names.index(n) for n in records]]):
            total_LF = 0
            for ids_T, segments_T in zip(own.ids, own.segments):
                batch = put(np.array(ids_T)[None]), put(np.array(segments_T)[None])
                h_LTF = np.asarray(backbone.forward(cfg, params, *batch, tap=lambda h, layer, table: h)[1])[:, 0]
                energy_LTF = h_LTF**2 * (np.asarray(params["layers"]["w_down"]) ** 2).sum(-1)[:, None]
                share_LTF = energy_LTF / energy_LTF.sum(-1, keepdims=True) * (segments_T > 0)[:, None]
                share_MPLF[name] += [part.sum(1) for part in np.split(share_LTF, len(ids_T) // masks.WINDOW, axis=1)]
                total_LF += share_LTF.sum(1)
            np.testing.assert_allclose(mean_LF, total_LF / np.count_nonzero(own.segments), rtol=1e-3, atol=1e-6)
    expected, rest_LF = np.zeros_like(found), 0
    for name, own in records.items():
        tokens = np.count_nonzero(own.segments)
        for share_LF in share_MPLF[name]:
            kept_E = np.take_along_axis(share_LF[:, None], table_LEC, 2).sum((0, 2))
            expected[kept_E.argmax()] += share_LF / tokens
        rest_LF += np.sum(share_MPLF[name], axis=0) / tokens
    assert sum(part.any() for part in expected) > 1
    for got_LF, own_LF in zip(found, expected):
        right_LF = own_LF if own_LF.any() else rest_LF / len(records)
        np.testing.assert_allclose(got_LF, right_LF, rtol=2e-3, atol=1e-5)
    np.testing.assert_array_equal(np.argsort(one[0], -1)[:, -10:], np.argsort(rest_LF, -1)[:, -10:])


def test_scores_in_common_change_nothing_at_the_start(mesh):
    scores_LEF = np.random.default_rng(0).permuted(np.tile(np.arange(48, dtype=np.float32) / 48, (2, 3, 1)), axis=-1)
    for part_LEF in (scores_LEF, scores_LEF[:, :1]):
        params = masks.begin(part_LEF)
        assert len(params) == (1 if part_LEF.shape[1] == 1 else 2)
        np.testing.assert_array_equal(masks.table_of(masks.whole(params), 24), np.sort(np.argsort(-part_LEF)[..., :24]))


def test_the_program_learns_and_keeps_the_function(stages, learned):
    kl = [line["masks/kl"] for line in read_metrics(learned / "metrics.jsonl")]
    info = artifacts.verify(learned, hashes=True)["info"]
    assert len(kl) == 6 and min(kl) > 0 and info["changed"] > 0
    before, after = open_model(stages.tuned), open_model(learned)
    assert after.experts.shape == before.experts.shape, "the budget is the same"
    ids_BT = open_records(stages.data, "test")[next(iter(open_records(stages.data, "test")))].ids[:2]
    np.testing.assert_array_equal(after.route(ids_BT), before.route(ids_BT))
    assert np.abs(after.logits(ids_BT) - before.logits(ids_BT)).max() > 0
    assert hf.read_config(learned)[1].carving == "learned"
    assert not (learned / "checkpoints").exists()


@pytest.mark.parametrize("name", ["static", "tuned"])
def test_the_loss_falls(stages, name):
    """From the channels that carving would take last, on the same batch over and over."""
    folder = getattr(stages, name)
    cfg, shape, _ = hf.read_config(folder)
    assert shape is not None
    ids_BT = np.concatenate([own.ids[:2] for own in open_records(stages.data, "train").values()])
    with use_mesh(MeshConfig(data=1)):
        params, _, _ = placement.load_sharded(folder, backbone.param_specs(cfg), dtype=np.float32)
        one_LEC = np.arange(shape.channels, dtype=np.int32) + np.zeros((cfg.layer, 1, 1), np.int32)
        records = open_records(stages.data, "calibration")
        shares_ELF = masks.importance(cfg, params, records, one_LEC, ("any",)).repeat(shape.experts, axis=0)
        scores_LEF = masks.first_scores(-shares_ELF, choose(-shares_ELF, shape.channels))
        tx = masks.optimizer(masks.MasksConfig(model=folder, data=stages.data, out=folder / "x", steps=40))
        phase = steps.start(masks.begin(scores_LEF), tx)
        step = masks.make_mask_step(cfg, shape.channels, tx, 32)
        batch = {"ids": put(ids_BT[None]), "segments": put(np.ones_like(ids_BT)[None])}
        batch["expert"] = put(np.asarray(open_model(folder).route(ids_BT))[None])
        kl = []
        for _ in range(40):
            phase, values = step(phase, params, batch)
            kl.append(float(values["kl"]))
    assert max(kl[-3:]) < 0.7 * kl[0], kl


def test_stopped_and_started_again_it_ends_bit_equal(stages, learned, tmp_path, monkeypatch):
    out, calls = tmp_path / "learned", []
    make = masks.make_mask_step

    def stopping(*some):
        step = make(*some)

        def counted(*inputs):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*inputs)

        return counted

    monkeypatch.setattr(masks, "make_mask_step", stopping)
    with pytest.raises(Stopped, match="stopped by SIGTERM; saved at step 3 of 6"):
        program.main(arguments(stages, out))
    program.main(arguments(stages, out))
    assert len(calls) == 6 and not differing(out, learned)
    assert (out / "metrics.jsonl").read_text() == (learned / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "change, says",
    [
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--batch", "0"], "batch=0, accum=1 must be at least 1"),
        (["--batch", "4000"], "batch=4000, accum=1: only"),
        (["--head-chunk", "0"], "head_chunk=0 must be at least 1"),
        (["--seed", "-1"], "seed=-1 must not be negative"),
        (["--lr", "0"], "lr=0.0 must be positive and finite"),
    ],
)
def test_bad_options(stages, tmp_path, change, says):
    with pytest.raises(ConfigError, match=says):
        program.main(arguments(stages, tmp_path / "out", *change))
    assert not (tmp_path / "out").exists()


def test_models_that_have_no_masks_to_learn(stages, tmp_path):
    from readme_jax.train import separate

    separate.main(["--model", str(stages.tuned), "--out", str(tmp_path / "separate")])
    for model, says in (
        (stages.dense, "is not carved; run `readme-jax carve` first"),
        (stages.carved, "has no router: tune one first"),
        (tmp_path / "separate", "separate experts have no other channels"),
    ):
        with pytest.raises(ConfigError, match=says):
            program.main(arguments(stages, tmp_path / "out", model=model))
        assert not (tmp_path / "out").exists()
