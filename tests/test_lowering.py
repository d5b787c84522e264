"""Full-size runs trace and lower for TPU pods on meshes that are not here: every step, no weights, no devices."""

import dataclasses
from pathlib import Path

import jax
import pytest
import sizes
from jax.sharding import AbstractMesh, AxisType

from readme_jax import jaxprs, liveness
from readme_jax.abstract import Run, train_steps
from readme_jax.alternate import AlternateConfig, ExpertPhase, RouterPhase
from readme_jax.config import ConfigError, RouterConfig
from readme_jax.sharding import AXES, MeshConfig

SEQ = 4096


def run_of(name: str, mesh: tuple[int, int, int], **experts) -> Run:
    """The paper's run of a model on a mesh: one record a batch device at a time, everything recomputed."""
    cfg, rows = sizes.MODELS[name], mesh[0] * mesh[1]
    chosen = dict(steps=200, batch=rows, accum=2, kd_weight=0.0, ce_weight=1.0, remat="full") | experts
    tuning = RouterPhase(steps=100, batch=rows, teacher="current")
    config = AlternateConfig(
        model=Path("model"), data=Path("data"), out=Path("out"), rounds=8, dtype="bfloat16", router=tuning,
        experts=ExpertPhase(**chosen), mesh=MeshConfig(data=mesh[0], expert=mesh[1], model=mesh[2]),
    )  # fmt: skip
    return Run(config, cfg, sizes.half(cfg), RouterConfig(), SEQ)


def separate_of(name: str, mesh: tuple[int, int, int], experts: int = 8) -> Run:
    """The same with separate experts of half of the dense FFN each, sent to over the `expert` axis."""
    tied = run_of(name, mesh, way="parallel")
    width = tied.model.mlp // 2
    own = dataclasses.replace(sizes.half(tied.model, experts), storage="separate", channels=width)
    config = dataclasses.replace(tied.config, router=dataclasses.replace(tied.config.router, steps=0))
    return dataclasses.replace(
        tied, config=config, experts=own, model=dataclasses.replace(tied.model, mlp=experts * width)
    )


def abstract(mesh: tuple[int, int, int]) -> AbstractMesh:
    return AbstractMesh(mesh, AXES, axis_types=(AxisType.Explicit,) * 3)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama2-7b", (1, 1, 1)),
        ("llama2-7b", (16, 8, 1)),
        ("llama3-8b", (8, 1, 1)),
        ("qwen3-32b", (4, 8, 4)),
        ("llama3-70b", (16, 8, 1)),
        ("llama3-70b", (4, 8, 4)),
    ],
    ids=str,
)
def test_every_step_lowers(name, mesh):
    with jax.sharding.use_abstract_mesh(abstract(mesh)):
        steps = train_steps(run_of(name, mesh))
        assert list(steps) == ["label", "router", "route", "experts"]
        for step in steps.values():
            text = step.trace().lower(lowering_platforms=("tpu",)).as_text()
            assert f"mhlo.num_partitions = {mesh[0] * mesh[1] * mesh[2]} " in text


@pytest.mark.parametrize(("name", "mesh"), [("llama2-7b", (16, 8, 1)), ("llama3-70b", (4, 8, 4))], ids=str)
def test_separate_experts_lower_and_stay(name, mesh):
    with jax.sharding.use_abstract_mesh(abstract(mesh)):
        run = separate_of(name, mesh)
        traced = train_steps(run)["experts"].trace()
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert "all_to_all" in text and "all_gather" not in text
        # a device computes with its own experts' rows, and nowhere is there a layer's matrix of all experts
        whole = run.model.mlp * run.model.embed * 2
        found = {v.size for v in jaxprs.Program(traced.jaxpr).values if not v.argument}
        assert whole // (mesh[1] * mesh[2]) in found and whole not in found


def test_what_does_not_fit_the_mesh_is_refused():
    with jax.sharding.use_abstract_mesh(abstract((8, 1, 1))):
        with pytest.raises(ConfigError, match=r"experts\.batch=12 must be a multiple of the mesh's 8 batch devices"):
            train_steps(run_of("llama2-7b", (8, 1, 1), batch=12))
    with jax.sharding.use_abstract_mesh(abstract((1, 1, 3))):
        with pytest.raises(ConfigError, match=r"mlp=11008 FFN channels must be a multiple of mesh\.model=3"):
            train_steps(run_of("llama2-7b", (1, 1, 3)))


def test_parameters_at_rest_are_shared_out():
    """70 B with AdamW in float32: 12 bytes a parameter, over 128 devices."""
    with jax.sharding.use_abstract_mesh(abstract((16, 8, 1))):
        step = train_steps(run_of("llama3-70b", (16, 8, 1)))["experts"]
        usage = liveness.usage(step.trace().jaxpr, step.donated)
    assert usage.arguments == pytest.approx(12 * 70.55e9 / 128, rel=0.02)
