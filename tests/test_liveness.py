"""Planned memory against XLA's own analysis of the compiled steps on the forced devices, and the packing of buffers.

All of it: `pytest -m "slow or not slow" tests/test_liveness.py tests/test_lowering.py tests/test_plan.py`. Held to
10 %: what a run needs at its peak, and each of its steps. Listed below as misses, and held to be such until mended:
router steps on 256 tokens, a third to a half too high (XLA computes scores and what follows in one kernel); at tiny
sizes labels of 32 tokens on eight devices, 17 % too low, and the pass that keeps a teacher's likeliest tokens, a third
too low, neither ever a run's peak; bfloat16 compute, up to a fifth too low, for the CPU backend computes it in float32.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import sizes
from hypothesis import given
from hypothesis import strategies as st

from readme_jax import jaxprs, liveness, planning
from readme_jax.abstract import Run, train_steps
from readme_jax.alternate import AlternateConfig, ExpertPhase, RouterPhase
from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.optim import OptimConfig
from readme_jax.sharding import MeshConfig, use_mesh

TINY = ModelConfig(
    family="llama", vocab=384, embed=32, mlp=48, layer=2, head=4, kv_head=2, head_dim=8, norm_eps=1e-5,
    rope_theta=10000.0, max_position=512, tied=True,
)  # fmt: skip
SMALL = RouterConfig(width=16, heads=2)
CE = {"kd_weight": 0.0, "ce_weight": 1.0}
PAPER = CE | {"remat": "full"}
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2)]
STEPS = ("label", "router", "route", "experts")


def compare(
    cfg, router, mesh, rows, seq, steps, *, router_rows=0, dtype: Any = "float32", **fields: Any
) -> dict[str, float]:
    """Planned bytes of steps over XLA's: what stays on a device all along, the batch, and what the compiled step needs
    beside its arguments (output - alias + temp). `peak`: the largest of the steps, likewise.

    rows: records of a microbatch on each batch device; labels are of one record a batch device.
    """
    many = mesh[0] * mesh[1]
    chosen: dict[str, Any] = dict(steps=1, batch=rows * many) | fields
    tuning = RouterPhase(steps=1, batch=(router_rows or rows) * many, shape=router, label_batch=many)
    config = AlternateConfig(
        model=Path("m"), data=Path("d"), out=Path("o"), rounds=1, router=tuning, dtype=dtype,
        experts=ExpertPhase(**chosen),
    )  # fmt: skip
    planned, measured = {}, {}
    with use_mesh(MeshConfig(data=mesh[0], expert=mesh[1], model=mesh[2])):
        run = Run(config, cfg, sizes.half(cfg), router, seq)
        found = planning.memory(run, "cpu")
        for name in steps:
            step = train_steps(run)[name]
            traced = step.trace()
            xla = traced.lower().compile().memory_analysis()
            assert liveness.usage(traced.jaxpr, step.donated).arguments == xla.argument_size_in_bytes, name
            batch = sum(map(jaxprs.device_bytes, jax.tree.leaves(step.arguments[step.held :])))
            needs = xla.output_size_in_bytes - xla.alias_size_in_bytes + xla.temp_size_in_bytes
            measured[name] = sum(planning.resident(run, step.before)) + batch + needs
            planned[name] = found[name].total
    ratios = {name: planned[name] / measured[name] for name in steps}
    return ratios | {"peak": max(planned.values()) / max(measured.values())}


tiny = functools.partial(compare, TINY, SMALL)


def within(found: dict[str, float], *, missed: tuple[str, ...] = ()) -> None:
    """All within a tenth, but for those that are known to miss and do: mended, they must be taken off the list."""
    assert {n: r for n, r in found.items() if n not in missed} == {
        n: pytest.approx(1, abs=0.1) for n in found if n not in missed
    }
    assert all(abs(found[name] - 1) > 0.1 for name in missed), f"no longer missed: {found}"


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_tiny(mesh):
    """The run that every program's test makes, by the step that decides whether it fits."""
    within(tiny(mesh, 1, 32, ("experts",)))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(("rows", "seq"), [(1, 32), (2, 32), (1, 64)], ids=str)
def test_tiny_whole(mesh, rows, seq):
    within(tiny(mesh, rows, seq, STEPS), missed=("label",) if (mesh, seq) == ((8, 1, 1), 32) else ())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("fields", [{}, PAPER], ids=str)
def test_tiny_of_256_tokens(mesh, fields):
    within(tiny(mesh, 2, 128, STEPS, **fields), missed=("router",))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    ("rows", "seq", "fields"),
    [
        (2, 64, {"accum": 2}),
        (4, 32, {"accum": 2}),
        (1, 128, CE),
        (2, 64, PAPER | {"accum": 2}),
        (2, 64, {"remat": "full", "accum": 2}),
        (2, 64, {"tuned": "ffn"}),
    ],
    ids=str,
)
def test_tiny_in_many_ways(mesh, rows, seq, fields):
    within(tiny(mesh, rows, seq, ("router", "route", "experts"), **fields))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {"optim": OptimConfig(lr=1e-3, mu_dtype="bfloat16")},
        {"optim": OptimConfig(lr=1e-3, params="bfloat16", mu_dtype="bfloat16")},
        {"teacher_dtype": "bfloat16"},
        {"teacher_topk": 8},
    ],
    ids=["mu", "params", "teacher", "top-k"],
)
def test_tiny_with_levers_of_precision(mesh, fields):
    kept = ("teacher",) if "teacher_topk" in fields else ()
    within(tiny(mesh, 2, 32, (*kept, "experts"), **fields), missed=kept)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_tiny_in_bfloat16(mesh):
    within(tiny(mesh, 2, 32, ("router", "experts"), dtype="bfloat16"), missed=("experts", "peak"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("fields", [{}, CE], ids=["kd", "ce"])
def test_smollm2(mesh, fields):
    """configs/quickstart; on eight devices one record a batch device, for the batches must divide."""
    steps = STEPS if not fields else ("experts",)
    rows = 8 if mesh == (1, 1, 1) else 1
    within(compare(sizes.SMOLLM2, RouterConfig(), mesh, 1, 512, steps, router_rows=rows, **fields))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "seq", "fields"),
    [
        ((1, 1, 1), 512, {"remat": "full", "accum": 2}),
        ((8, 1, 1), 256, PAPER),
        ((2, 2, 2), 256, {}),
        ((2, 2, 2), 256, PAPER | {"accum": 2}),
    ],
    ids=str,
)
def test_smollm2_in_other_ways(mesh, seq, fields):
    within(compare(sizes.SMOLLM2, RouterConfig(), mesh, 1, seq, STEPS, **fields))


def test_what_is_alive_counts_once(mesh):
    """Two matmuls in turn need one buffer between them and the result; a chain of elementwise steps needs none."""

    def f(a, b):
        return jnp.tanh(a @ b * 2 + 1) @ b

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    usage = liveness.usage(jax.jit(f).trace(shape, shape).jaxpr, 0)
    assert usage == liveness.Usage(2 * 4 * 64 * 64, 2 * 4 * 64 * 64)


def test_lookups_that_xla_places_have_their_share(mesh):
    """A table split over eight devices, indexed with an `out_sharding`: nowhere is there the whole of it."""
    with use_mesh(MeshConfig(data=8)) as eight:
        table = jax.ShapeDtypeStruct((1024, 64), jnp.float32, sharding=jax.NamedSharding(eight, jax.P(None, "data")))
        ids = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=jax.NamedSharding(eight, jax.P(None)))

        def f(table, ids):
            return table.at[ids].get(out_sharding=jax.P(None, "data"))

        usage = liveness.usage(jax.jit(f).trace(table, ids).jaxpr, 0)
    assert usage.arguments == 1024 * 8 * 4 + 16 * 4 and usage.heap < 2048


def test_rows_added_to_zeros_are_added_to_what_they_join(mesh):
    """The gradient of a table that is looked up and multiplied with: one array of its size, as in XLA."""

    def f(table, ids, x):
        return jax.grad(lambda t: jnp.sum(t[ids] * 2) + jnp.sum(jnp.tanh(jnp.einsum("md,vd->mv", x, t))))(table)

    args = [((512, 64), jnp.float32), ((8,), jnp.int32), ((4, 64), jnp.float32)]
    traced = jax.jit(f).trace(*(jax.ShapeDtypeStruct(*each) for each in args))
    needs, xla = liveness.usage(traced.jaxpr, 0, platform="cpu").heap, traced.lower().compile().memory_analysis()
    table = 512 * 64 * 4
    assert (
        xla is not None
        and table <= needs < 1.2 * table
        and xla.temp_size_in_bytes + xla.output_size_in_bytes < 1.2 * table
    )


def test_code_for_other_platforms_needs_nothing(mesh):
    def f(x):
        def wide(x):
            return jnp.sum(jnp.tanh(x[:, None] @ x[None]), 0)

        return jax.lax.platform_dependent(x, cpu=lambda x: x * 2, default=wide)

    traced = jax.jit(f).trace(jax.ShapeDtypeStruct((256,), jnp.float32))
    assert liveness.usage(traced.jaxpr, 0, platform="cpu").heap == 1024
    for platform in ("tpu", "gpu"):
        assert liveness.usage(traced.jaxpr, 0, platform=platform).heap > 256 * 1024


def test_weights_are_told_from_what_tokens_make(mesh):
    """Of the gradient step of one matrix, the gradient is a weight's buffer and the activation is none."""

    def f(w, x):
        return jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w) @ jnp.ones((48, 8))

    w, x = jax.ShapeDtypeStruct((32, 48), jnp.float32), jax.ShapeDtypeStruct((512, 32), jnp.float32)
    usage = liveness.usage(jax.jit(f).trace(w, x).jaxpr, 0, weights=frozenset({(32, 48)}))
    assert 0 < usage.weights < 0.2 * usage.heap


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_a_heap_holds_what_is_alive_and_not_more_than_all(buffers):
    buffers = [(size, min(a, b), max(a, b)) for size, a, b in buffers]
    aligned = [(-(-size // liveness.ALIGN) * liveness.ALIGN, *span) for size, *span in buffers]
    heap = liveness.pack(buffers)
    alive = [sum(size for size, born, last in aligned if born <= t <= last) for t in range(31)]
    assert max(alive) <= heap <= sum(size for size, *_ in aligned)
