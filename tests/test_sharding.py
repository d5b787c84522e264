"""The sharding table: what it maps to, what it refuses, and that it covers every parameter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from readme_jax import optim, sharding, steps
from readme_jax.config import ConfigError, ModelConfig, RouterConfig
from readme_jax.losses import HeadLoss
from readme_jax.models import backbone, router
from readme_jax.models.experts import ExpertTable, Masked, make_table
from readme_jax.models.layers import embed
from readme_jax.sharding import AXES, MeshConfig, P, computed, make_mesh, put, spec, stored, use_mesh


def test_spec_maps_logical_axes():
    assert spec("batch", "seq", None) == P(("data", "expert"), None, None)
    assert spec("layer", "mlp", "embed") == P(None, "model", None)
    with pytest.raises(KeyError):
        spec("width")
    with pytest.raises(ConfigError, match="one mesh axis"):
        spec("batch", "batch")


def test_mesh_keeps_axes_of_length_one_and_is_explicit():
    mesh = make_mesh(MeshConfig(data=2, model=2))
    assert dict(mesh.shape) == {"data": 2, "expert": 1, "model": 2}
    assert mesh.axis_types == (AxisType.Explicit,) * 3
    assert make_mesh(MeshConfig(expert=2, model=2)).shape["data"] == 2, "data=0 takes what the others leave"
    assert make_mesh(MeshConfig(data=2, model=3)).size == 6, "two of eight stay idle: sizes were said"


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": -1}, "mesh.data=-1 must be at least 1, or 0"),
        ({"expert": 0}, "mesh.expert=0 must be at least 1"),
        ({"model": -4}, "mesh.model=-4 must be at least 1"),
        ({"data": 9}, "mesh data=9 expert=1 model=1 needs 9 devices, there are 8"),
        ({"data": 2, "expert": 2, "model": 4}, "mesh data=2 expert=2 model=4 needs 16 devices, there are 8"),
        ({"model": 16}, "mesh expert=1 model=16 needs 16 devices, there are 8"),
        ({"model": 3}, "mesh expert=1 model=3: 3 devices do not divide the 8 .* mesh.data=2 would use 6 .* 2 idle"),
    ],
)
def test_mesh_refusals(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(MeshConfig(**sizes))


def test_several_processes_must_use_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="mesh data=2 expert=1 model=2 needs 4 devices, the 2 processes have 8"):
        make_mesh(MeshConfig(data=2, model=2))
    assert make_mesh(MeshConfig(data=4, model=2)).size == 8


def test_layouts_of_a_parameter():
    matrix, vector = ("layer", "mlp", "embed"), ("layer", "embed")
    with use_mesh(MeshConfig(data=4, expert=2)):
        assert computed(matrix, (3, 5, 16)) == P(None, "model", None)
        assert stored(matrix, (3, 5, 16)) == P(None, "model", ("data", "expert"))
        assert stored(matrix, (3, 5, 12)) == P(None, "model", "data"), "8 do not divide 12, 4 do"
        assert stored(matrix, (3, 5, 6)) == P(None, "model", None), "it stays whole"
        assert stored(vector, (3, 16)) == P(None, None), "vectors stay whole"
        assert stored((None, "router"), (4, 16)) == P(None, ("data", "expert"))
    with use_mesh(MeshConfig(data=2, model=4)):
        assert computed(("logit", "embed"), (64, 16)) == P("model", None)
        assert computed(("logit", "embed"), (63, 16)) == P(None, None), "4 do not divide 63 ids"
        for layout in (computed, stored):
            with pytest.raises(ConfigError, match="mlp=50 FFN channels must be a multiple of mesh.model=4"):
                layout(matrix, (3, 50, 16))
    with use_mesh(MeshConfig(data=1, model=8)):
        assert stored(matrix, (3, 16, 16)) == computed(matrix, (3, 16, 16)), "one device of the batch: one layout"


def test_device_counts_of_a_mesh():
    with use_mesh(MeshConfig(data=2, expert=2, model=2)):
        assert (sharding.batch_devices(), sharding.model_devices()) == (4, 2)
        array = put(np.zeros((4, 6), np.float32), spec("batch", "mlp"))
        assert {shard.data.shape for shard in array.addressable_shards} == {(1, 3)}
    with use_mesh(MeshConfig(data=1)):
        assert (sharding.batch_devices(), sharding.model_devices()) == (1, 1)


FULL = ModelConfig(
    family="llama", vocab=32000, embed=4096, mlp=11008, layer=32, head=32, kv_head=32, head_dim=128, norm_eps=1e-5,
    rope_theta=10000.0, max_position=4096, tied=False,
)  # fmt: skip
EVERY = dict(qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True)


def test_placement_of_every_parameter():
    small = dict(vocab=8, embed=4, mlp=6, layer=2, head=2, kv_head=1, head_dim=2)
    odd = ModelConfig(**(vars(FULL) | small | EVERY))
    with use_mesh(MeshConfig(data=4, model=2)):
        for cfg in (FULL, odd):
            abstract, specs = backbone.abstract_params(cfg), backbone.param_specs(cfg)
            assert jax.tree.structure(abstract) == jax.tree.structure(specs), "a spec for every parameter, and no other"
            channels = {"w_gate", "w_up", "w_down", "b_gate", "b_up"}
            heads = {"w_q", "w_k", "w_v", "b_q", "b_k", "b_v"} if cfg.kv_head % 2 == 0 else set()
            for name, placed in specs["layers"].items():
                assert len(placed) == abstract["layers"][name].ndim, name
                whole = name not in channels | heads | ({"w_o"} if heads else set())
                assert ("model" in placed) != whole, name
                assert whole or name == "w_o" or placed[1] == "model", name
                at_rest = [i for i, entry in enumerate(placed) if entry == ("data", "expert")]
                width = [1] if name == "w_o" else [len(placed) - 1]
                assert at_rest == (width if name.startswith("w_") else []), name
            assert specs["embedding"] == specs["head"] == P(None, ("data", "expert")) and specs["norm"] == P(None)
        host = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), abstract)
        placed = backbone.place(cfg, host)
        jax.tree.map(lambda a, s: None if jax.typeof(a).sharding.spec == s else pytest.fail(str(s)), placed, specs)
        table = make_table(np.array([[[0, 2]], [[1, 3]]], np.int32), cfg.mlp)
        assert table.mask_LEU.shape == (2, 1, cfg.mlp), "channels split over `model`: the mask has all of them"


def test_weights_and_state_are_whole_one_layer_at_a_time():
    """On eight devices of the batch a device holds an eighth of every matrix, of its gradient and of its moments."""
    cfg = ModelConfig(**(vars(FULL) | dict(vocab=72, embed=32, mlp=56, layer=3, head=4, kv_head=2, head_dim=8)))
    whole = {"w_q": "3,4,8,32", "w_k": "3,2,8,32", "w_o": "3,32,4,8", "w_gate": "3,56,32"}
    rng, tx = np.random.default_rng(0), optim.make(optim.OptimConfig(lr=1e-3), 10)
    with use_mesh(MeshConfig(data=4, expert=2)):
        host = jax.tree.map(lambda a: np.ones(a.shape, np.float32), backbone.abstract_params(cfg))
        phase, teacher = steps.start(backbone.place(cfg, host), tx), backbone.place(cfg, host)
        for path, leaf in jax.tree_util.tree_leaves_with_path(phase):
            matrix = not any(word in jax.tree_util.keystr(path) for word in ("norm", "count", "step"))
            assert leaf.nbytes == leaf.addressable_shards[0].data.nbytes * (8 if matrix else 1), path
        table = make_table(rng.permuted(np.tile(np.arange(28), (3, 2, 1)), axis=-1).astype(np.int32), cfg.mlp)
        ids = put(rng.integers(1, 72, (1, 8, 16)).astype(np.int32), P(None, *spec("batch", "seq")))
        data = {"ids": ids, "segments": ids, "route": Masked(ids % 2)}
        for remat in ("none",):
            step = steps.make_expert_step(cfg, HeadLoss(1.0, 0.5, 16), tx, remat=remat)
            text = step.lower(phase, {}, teacher, table, data).compile().as_text()
            for name, shape in whole.items():
                parts = shape[:-3] + ",4" if name != "w_o" else "3,4,4,8"
                assert f"f32[{shape}]" not in text, f"remat={remat}: {name} is whole for all layers at once"
                assert f"f32[{parts}]" in text, f"remat={remat}: {name} is not there in parts"
                assert re.search(rf"f32\[(1,)?{shape[2:]}\]\S* all-gather", text), f"{name} is gathered layer by layer"
            assert "f32[72,4]" in text and "all-to-all" in text, "the table stays in columns, activations travel"


@pytest.mark.parametrize("shape", [(16, 1, 8), (4, 8, 4)], ids=str)
def test_steps_of_a_7b_model_lower_on_a_pod(shape):
    """Shapes and placements of a full-size step are right on 128 TPU devices that nobody here has."""
    tx, table_shape = optim.make(optim.OptimConfig(lr=1e-4), 100), (32, 7, 5504)
    batch, seq = (1, 64, 512), P(None, *spec("batch", "seq"))
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3)

    def array(dims, dtype=np.float32, placed=sharding.REPLICATED):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, placed))

    def tree(abstract, specs):
        return jax.tree.map(lambda a, s: array(a.shape, a.dtype, s), abstract, specs)

    with jax.sharding.use_abstract_mesh(mesh):
        params = tree(backbone.abstract_params(FULL), backbone.param_specs(FULL))
        mask = array((32, 7, FULL.mlp), bool, spec("layer", "expert", "mlp"))
        table = ExpertTable(array(table_shape, np.int32), mask)
        ids = array(batch, np.int32, seq)
        data = {"ids": ids, "segments": ids, "route": Masked(ids)}
        phase = jax.eval_shape(lambda p: steps.Phase(jax.numpy.int32(0), p, tx.init(p)), params)
        step = steps.make_expert_step(FULL, HeadLoss(1.0, 0.5, 128), tx, dtype=jax.numpy.bfloat16, remat="full")
        traced = step.trace(phase, {}, params, table, data)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        new_phase = traced.out_info[0]
        assert jax.tree.map(lambda a: a.shape, new_phase.params) == jax.tree.map(lambda a: a.shape, params)
        moved = [
            name
            for name, leaf in new_phase.params["layers"].items()
            if leaf.sharding.spec != params["layers"][name].sharding.spec
        ]
        assert not moved, "a parameter lies where it lay before the step"
        assert "7x5504x4096" not in text, "tied masked training never gathers an expert's weights"

        abstract = router.abstract_params(RouterConfig(), FULL.vocab, 7)
        params = tree(abstract, router.param_specs(abstract))
        phase = jax.eval_shape(lambda p: steps.Phase(jax.numpy.int32(0), p, tx.init(p)), params)
        data = {
            "ids": ids,
            "segments": ids,
            "target": array((*batch, 7), np.float32, P(None, *spec("batch", "seq", None))),
        }
        step = steps.make_router_step(RouterConfig(), FULL.rope_theta, tx)
        step.trace(phase, data).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 2, 2), (1, 7, 1), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("width", [14, 16, 24])
def test_rows_of_a_token_table_at_rest(shape, width):
    """Split over both batch axes, over `data` alone or not at all; an odd `expert` axis once killed the compiler."""
    rng = np.random.default_rng(0)
    data, expert, model = shape
    table_VD = rng.normal(size=(48, width)).astype(np.float32)
    ids_BT = rng.integers(0, 48, (data * expert, 8)).astype(np.int32)
    cotangent_BTD = rng.normal(size=(*ids_BT.shape, width)).astype(np.float32)
    with use_mesh(MeshConfig(data=data, expert=expert, model=model)):
        given = put(cotangent_BTD, spec("batch", "seq", None))

        @jax.jit
        def run(table_VD, ids_BT):
            x_BTD, back = jax.vjp(lambda w: embed(w, ids_BT, jnp.float32), table_VD)
            return x_BTD, back(given)[0]

        place = stored(("vocab", "embed"), table_VD.shape)
        x_BTD, gradient_VD = run(put(table_VD, place), put(ids_BT, spec("batch", "seq")))
        assert jax.typeof(gradient_VD).sharding.spec == place, "the gradient comes back at rest"
    np.testing.assert_array_equal(x_BTD, table_VD[ids_BT])
    expected_VD = np.zeros_like(table_VD)
    np.add.at(expected_VD, ids_BT.ravel(), cotangent_BTD.reshape(-1, width))
    np.testing.assert_allclose(gradient_VD, expected_VD, rtol=1e-5, atol=1e-6)
