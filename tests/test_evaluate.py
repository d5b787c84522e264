"""The oracles of `evaluate`: a choice by layer against a table of all combinations, labels and losses against NumPy."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles_core import energy_share, log_softmax, packed, random_params, random_table
from stages import ONE

from readme_jax import hf
from readme_jax.data import open_records
from readme_jax.evaluate import Arm, make_losses
from readme_jax.labels import LabelConfig
from readme_jax.losses import next_token
from readme_jax.models import backbone
from readme_jax.models.experts import Masked, make_table
from readme_jax.sharding import MeshConfig, use_mesh
from readme_jax.train import evaluate


@pytest.fixture(scope="module")
def one_device():
    with use_mesh(MeshConfig(data=1)):
        yield


def test_a_choice_by_layer_is_a_choice_among_combinations(tiny_cfg, one_device):
    """Experts of a table that has every combination of the layers' experts say the same with one choice for all."""
    params = jax.tree.map(jnp.asarray, random_params(backbone.abstract_params(tiny_cfg)))
    table_LEC = random_table(tiny_cfg.layer, 2, 24, tiny_cfg.mlp)
    ids_BT, segments_BT = packed([[20, 12], [32]], 32, tiny_cfg.vocab)
    combinations = list(itertools.product(range(2), repeat=tiny_cfg.layer))
    combined_LKC = np.stack([table_LEC[i, [c[i] for c in combinations]] for i in range(tiny_cfg.layer)])
    one_BT = np.random.default_rng(3).integers(0, len(combinations), ids_BT.shape).astype(np.int32)
    own_LBT = np.moveaxis(np.array(combinations, np.int32)[one_BT], -1, 0)

    def run(table_LEC, choice):
        table, route = make_table(table_LEC, tiny_cfg.mlp), Masked(jnp.asarray(choice))
        return np.asarray(backbone.forward(tiny_cfg, params, ids_BT, segments_BT, table=table, route=route)[0])

    by_layer = run(table_LEC, own_LBT)
    np.testing.assert_allclose(by_layer, run(combined_LKC, one_BT), atol=1e-6)
    same_LBT = np.broadcast_to(own_LBT[0], own_LBT.shape)
    np.testing.assert_array_equal(run(table_LEC, same_LBT), run(table_LEC, own_LBT[0]))
    assert np.abs(by_layer - run(table_LEC, own_LBT[0])).max() > 1e-3


def test_oracles_against_numpy(stages, tmp_path, one_device):
    """Labels of a tuned model's dense run, and what the program makes of them."""
    arms = ["routed", "oracle", "oracle_layers"]
    argv = ["--model", str(stages.tuned), "--data", str(stages.data), "--arms", *arms]
    evaluate.main([*argv, "--out", str(tmp_path / "e"), *ONE])
    result = json.loads((tmp_path / "e/evaluation.json").read_text())
    cfg, experts, _ = hf.read_config(stages.tuned)
    params, table_LEC, _ = hf.load_params(stages.tuned)
    assert experts is not None and table_LEC is not None
    table, w_down_LFD = make_table(table_LEC, cfg.mlp), params["layers"]["w_down"]
    params = jax.tree.map(jnp.asarray, params)
    label = make_losses(cfg, LabelConfig())
    hit = np.zeros(3)
    for name, own in open_records(stages.data, "test").items():
        ids_BT, segments_BT = np.array(own.ids), np.array(own.segments)
        _, h_LBTF = backbone.forward(cfg, params, ids_BT, segments_BT, tap=lambda h, layer, table: h)
        share_LBTE = np.array([
            energy_share(h_BTF.reshape(-1, cfg.mlp), w_down_FD, table_EC).reshape(*ids_BT.shape, -1)
            for h_BTF, w_down_FD, table_EC in zip(np.asarray(h_LBTF), w_down_LFD, table_LEC)
        ])  # fmt: skip
        choices: dict[Arm, np.ndarray] = {
            "oracle": share_LBTE.mean(0).argmax(-1),
            "oracle_layers": share_LBTE.argmax(-1),
        }
        _, _, found = label(params, table, ids_BT, segments_BT, None)
        target_BT, weight_BT = map(np.asarray, next_token(jnp.asarray(ids_BT), jnp.asarray(segments_BT)))
        for arm, choice in choices.items():
            np.testing.assert_array_equal(found[arm], choice)
            route = Masked(jnp.asarray(choice.astype(np.int32)))
            x_BTD, _ = backbone.forward(cfg, params, ids_BT, segments_BT, table=table, route=route)
            logp_BTV = log_softmax(np.asarray(backbone.unembed(params, x_BTD), np.float64))
            loss_BT = -np.take_along_axis(logp_BTV, target_BT[..., None], -1)[..., 0] * weight_BT
            np.testing.assert_allclose(result["records"][arm][name]["loss"], loss_BT.sum(-1), rtol=1e-5)
            assert result["arms"][arm][name]["loss"] == pytest.approx(loss_BT.sum() / weight_BT.sum(), rel=1e-5)
            assert result["arms"][arm][name]["error"] > 0
        hit += np.bincount(choices["oracle"][segments_BT > 0], minlength=3)
    np.testing.assert_allclose(result["oracle"]["load"], hit / hit.sum(), atol=1e-9)
    assert result["oracle"]["agreement"] == 1 and 0 <= result["routing"]["agreement"] <= 1
    assert result["mean_loss"]["oracle"] != result["mean_loss"]["oracle_layers"]


def test_a_labeller_says_what_tuned_weights_cannot(stages, tmp_path, one_device):
    """The oracles' choice is of another folder's run with all channels, their loss of the model's own weights."""
    argv = ["--model", str(stages.tuned), "--data", str(stages.data), "--arms", "dense", "routed", "oracle", *ONE]
    evaluate.main([*argv, "--labeller", str(stages.carved), "--agreement", "--out", str(tmp_path / "e")])
    result = json.loads((tmp_path / "e/evaluation.json").read_text())
    cfg, _, _ = hf.read_config(stages.tuned)
    carved, table_LEC, _ = hf.load_params(stages.carved)
    tuned, own_LEC, _ = hf.load_params(stages.tuned)
    assert table_LEC is not None and own_LEC is not None and np.array_equal(table_LEC, own_LEC)
    carved, tuned = (jax.tree.map(jnp.asarray, params) for params in (carved, tuned))
    table, label, loss = make_table(table_LEC, cfg.mlp), make_losses(cfg, LabelConfig()), make_losses(cfg)
    other = 0
    for name, own in open_records(stages.data, "test").items():
        ids_BT, segments_BT = np.array(own.ids), np.array(own.segments)
        best_BT = label(carved, table, ids_BT, segments_BT, None)[2]["oracle"]
        other += int((best_BT != label(tuned, table, ids_BT, segments_BT, None)[2]["oracle"]).sum())
        for arm, route in (("oracle", Masked(best_BT)), ("dense", None)):
            loss_B, _, _ = loss(tuned, table, ids_BT, segments_BT, route)
            np.testing.assert_allclose(result["records"][arm][name]["loss"], loss_B, rtol=1e-5)
    assert other > 0, "tuned weights would have said something else"
    assert result["oracle"]["agreement"] == 1 and 0 <= result["routing"]["agreement"] <= 1
