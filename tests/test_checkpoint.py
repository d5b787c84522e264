"""Checkpoints: what goes in comes out, bit for bit and in place; the newest whole one counts."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from readme_jax import steps
from readme_jax.checkpoint import Checkpoints
from readme_jax.config import CheckpointError
from readme_jax.sharding import MeshConfig, put, spec, use_mesh


def phases(seed=0, width=4):
    rng = np.random.default_rng(seed)
    params = {
        "w_up": put(rng.normal(size=(8, width)).astype(np.float32), spec("mlp", None)),
        "norm": put(rng.normal(size=width).astype(np.float32)),
    }
    return {
        "experts": steps.start(params, optax.adam(1e-3)),
        "router": steps.start({"w": put(np.ones(3))}, optax.sgd(1)),
    }


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.sharding == y.sharding and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=2, model=2)], ids=["one", "four"])
def test_round_trip(tmp_path, mesh):
    with use_mesh(mesh):
        saved = phases(seed=1)
        checkpoints = Checkpoints(tmp_path / "c")
        assert checkpoints.latest() is None
        checkpoints.save(12, saved)
        checkpoints.close()
        again = Checkpoints(tmp_path / "c")
        assert again.latest() == 12
        restored = again.restore(phases(seed=2))
        assert equal(restored, saved) and not equal(restored, phases(seed=2))
        # arrays of its own: what is restored may be donated
        jax.jit(lambda t: jax.tree.map(lambda a: a + 1, t), donate_argnums=0)(restored)
        assert equal(again.restore(phases(seed=2)), saved)
        again.close()


def test_the_newest_is_kept(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (1, 2, 5):
        checkpoints.save(step, phases(step))
    checkpoints.save(5, phases(6))  # written again after a kill right behind it
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == [2, 5]
    again = Checkpoints(tmp_path / "c", keep=2)
    assert again.latest() == 5 and equal(again.restore(phases()), phases(6))
    again.close()


def test_a_half_written_checkpoint_does_not_count(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(3, phases(3))
    checkpoints.close()
    half = tmp_path / "c" / "4.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "c" / "3", half)
    again = Checkpoints(tmp_path / "c")
    assert again.latest() == 3 and equal(again.restore(phases()), phases(3))
    again.save(4, phases(4))
    assert again.latest() == 4
    again.close()


def test_what_does_not_fit_is_an_error(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(CheckpointError):
        checkpoints.restore(phases())
    checkpoints.save(3, phases(3))
    like = phases(width=5)
    with pytest.raises(CheckpointError, match="checkpoint 3: ") as caught:
        checkpoints.restore(like)
    assert "\n" not in str(caught.value)
    more = phases()
    with pytest.raises(CheckpointError, match="checkpoint 3: "):
        checkpoints.restore(more | {"third": {"w": jnp.ones(2)}})
    checkpoints.close()
