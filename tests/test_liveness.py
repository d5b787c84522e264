"""The estimate of peak memory against XLA's own analysis of the compiled step, and the packing of buffers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import sizes
from hypothesis import given
from hypothesis import strategies as st

from readme_jax import liveness
from readme_jax.abstract import Run, train_steps
from readme_jax.alternate import AlternateConfig, ExpertPhase, RouterPhase
from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.sharding import MeshConfig, use_mesh

TINY = ModelConfig(
    family="llama", vocab=384, embed=32, mlp=48, layer=2, head=4, kv_head=2, head_dim=8, norm_eps=1e-5,
    rope_theta=10000.0, max_position=512, tied=True,
)  # fmt: skip


def compare(cfg, mesh, rows, seq, **fields) -> dict[str, float]:
    """Estimate over XLA's figure of every step of a run: argument + output - alias + temp."""
    batch = rows * mesh[0] * mesh[1]
    config = AlternateConfig(
        model=Path("m"), data=Path("d"), out=Path("o"), rounds=1,
        router=RouterPhase(steps=1, batch=batch, teacher="current", shape=RouterConfig(width=16, heads=2)),
        experts=ExpertPhase(**(dict(steps=1, batch=batch) | fields)),
    )  # fmt: skip
    found = {}
    with use_mesh(MeshConfig(data=mesh[0], expert=mesh[1], model=mesh[2])):
        run = Run(config, cfg, sizes.half(cfg), config.router.shape, seq)
        for name, step in train_steps(run).items():
            traced = step.trace()
            ours = liveness.usage(traced.jaxpr, step.donated, early=True)
            xla = traced.lower().compile().memory_analysis()
            assert ours.arguments == xla.argument_size_in_bytes, name
            whole = xla.argument_size_in_bytes + xla.output_size_in_bytes - xla.alias_size_in_bytes
            found[name] = ours.total / (whole + xla.temp_size_in_bytes)
    return found


@pytest.mark.parametrize(
    ("mesh", "rows", "seq", "fields"),
    [
        ((1, 1, 1), 2, 32, {}),
        ((1, 1, 1), 2, 64, {"kd_weight": 0.0, "ce_weight": 1.0, "remat": "full", "accum": 2}),
        ((8, 1, 1), 1, 64, {}),
        ((2, 2, 2), 2, 64, {"accum": 2}),
    ],
    ids=str,
)
def test_tiny(mesh, rows, seq, fields):
    found = compare(TINY, mesh, rows, seq, **fields)
    assert found["experts"] == pytest.approx(1, abs=0.1), found
    assert found["router"] == pytest.approx(1, abs=0.1), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "fields"),
    [((1, 1, 1), {}), ((1, 1, 1), {"remat": "full", "accum": 2}), ((4, 1, 2), {})],
    ids=str,
)
def test_smollm2(mesh, fields):
    found = compare(sizes.SMOLLM2, mesh, 1, 512, **fields)
    assert found["experts"] == pytest.approx(1, abs=0.1), found


def test_what_is_alive_counts_once(mesh):
    """Two matmuls in turn need one buffer between them and the result; a chain of elementwise steps needs none."""

    def f(a, b):
        return jnp.tanh(a @ b * 2 + 1) @ b

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    usage = liveness.usage(jax.jit(f).trace(shape, shape).jaxpr, 0)
    assert usage == liveness.Usage(2 * 4 * 64 * 64, 2 * 4 * 64 * 64)


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_a_heap_holds_what_is_alive_and_not_more_than_all(buffers):
    buffers = [(size, min(a, b), max(a, b)) for size, a, b in buffers]
    aligned = [(-(-size // liveness.ALIGN) * liveness.ALIGN, *span) for size, *span in buffers]
    heap = liveness.pack(buffers)
    alive = [sum(size for size, born, last in aligned if born <= t <= last) for t in range(31)]
    assert max(alive) <= heap <= sum(size for size, *_ in aligned)
