"""The sharding table: what it maps to, what it refuses, and that it covers every parameter."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from readme_jax import optim, sharding, steps
from readme_jax.config import ConfigError, ModelConfig, RouterConfig
from readme_jax.losses import HeadLoss
from readme_jax.models import backbone, router
from readme_jax.models.experts import ExpertTable, Masked, make_table
from readme_jax.sharding import AXES, MeshConfig, P, make_mesh, put, spec, use_mesh


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
    assert dict(make_mesh(MeshConfig(model=3)).shape) == {"data": 2, "expert": 1, "model": 3}, "two of eight stay idle"


@pytest.mark.parametrize("bad", [MeshConfig(data=9), MeshConfig(model=16), MeshConfig(expert=0), MeshConfig(model=-1)])
def test_mesh_refusals(bad):
    with pytest.raises(ConfigError):
        make_mesh(bad)


@pytest.mark.parametrize("bad", [{"data": -1}, {"expert": 0}, {"model": -1}])
def test_a_size_that_is_none_is_named(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ConfigError, match=f"mesh.{name}={value} must be at least 1"):
        make_mesh(MeshConfig(**bad))


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
    for cfg in (FULL, ModelConfig(**(vars(FULL) | small | EVERY))):
        abstract, specs = backbone.abstract_params(cfg), backbone.param_specs(cfg)
        assert jax.tree.structure(abstract) == jax.tree.structure(specs), "a spec for every parameter, and no other"
        for name, placed in specs["layers"].items():
            assert len(placed) == abstract["layers"][name].ndim, name
            split = {"w_gate", "w_up", "w_down", "b_gate", "b_up"}
            assert ("model" in placed) == (name in split), name
            if name in split:
                assert placed[1] == "model", "FFN channels lie over the model axis"
    with use_mesh(MeshConfig(data=2, expert=1, model=2)):
        host = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), abstract)
        placed = backbone.place(cfg, host)
        jax.tree.map(lambda a, s: None if jax.typeof(a).sharding.spec == s else pytest.fail(str(s)), placed, specs)
        table = make_table(np.array([[[0, 2]], [[1, 3]]], np.int32), cfg.mlp)
        assert table.mask_LEU.shape == (2, 1, cfg.mlp), "channels split over `model`: the mask has all of them"


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
        params = tree(abstract, jax.tree.map(lambda _: P(), abstract))
        phase = jax.eval_shape(lambda p: steps.Phase(jax.numpy.int32(0), p, tx.init(p)), params)
        data = {
            "ids": ids,
            "segments": ids,
            "target": array((*batch, 7), np.float32, P(None, *spec("batch", "seq", None))),
        }
        step = steps.make_router_step(RouterConfig(), FULL.rope_theta, tx)
        step.trace(phase, data).lower(lowering_platforms=("tpu",))
