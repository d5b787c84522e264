"""What XLA made of the steps with separate experts at a real model's width: none of their weights is gathered.

`pytest -m "slow or not slow" tests/test_compiled.py` compiles for TPU too, where `libtpu` is installed: no TPU needed.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from test_lowering import separate_of

from readme_jax.abstract import train_steps
from readme_jax.sharding import AXES, MeshConfig, use_mesh

ODD = 43  # Llama-2-7B's experts have 5504 = 128 * 43 channels each, and no other size of it has this factor
ALONE = re.compile(r"replica_groups=(?:\{(?:\{\d+\},?)+\}|\[\d+,1\]<=)")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


def collectives(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(name, dimensions) of every operand and result of a collective in a compiled program's text.

    Fused and asynchronous ones are instructions of their own there, `all-gather-start` say. Left out are those of
    groups of one device, which move nothing.
    """
    shape_of, found = {}, []
    for line in text.splitlines():
        made = re.match(r"\s*(?:ROOT )?(%?[\w.\-]+) = (.*?)(?:^|\s)([a-z][a-z\-]*)\((.*)", line)
        if not made:
            continue
        name, result, kind, rest = made.groups()
        shape_of[name.lstrip("%")] = shapes = _shapes(result)
        kind = kind.removesuffix("-start")
        if kind in COLLECTIVES and not ALONE.search(rest):
            operands = re.findall(r"%?([\w.\-]+)", rest.split(")")[0])
            found += [(kind, dims) for dims in shapes + [d for o in operands for d in shape_of.get(o, [])]]
    return found


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", text)]


def of_experts(found: list[tuple[str, tuple[int, ...]]], odd: int) -> set[str]:
    """Collectives with an array that holds whole rows of expert weights, whatever its shape or share: its size has the
    factor that only the channels have."""
    return {name for name, dims in found if math.prod(dims) % odd == 0}


def compiled(mesh: jax.sharding.Mesh, platform: str, layers: int, seq: int) -> dict[str, str]:
    """Text of every step of Llama-2-7B with eight separate experts, compiled for the devices of a mesh, from shapes.

    Those are the router's pass and the expert step: router tuning asks a dense model, which such a run does not have.
    """
    shape = tuple(mesh.shape.values())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = separate_of("llama2-7b", shape, 8)
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, layer=layers), seq=seq)

        def there(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, leaf.sharding.spec))

        texts = {}
        for key, step in train_steps(run).items():
            traced = step.function.trace(*jax.tree.map(there, step.arguments))
            texts[key] = traced.lower(lowering_platforms=(platform,)).compile().as_text()
    return texts


def test_the_search_finds_what_is_gathered():
    """Weights split over `data` too, as those of ZeRO-3 are, and gathered before they are used: whole, and a layer."""
    with use_mesh(MeshConfig(data=2, expert=4)) as mesh:
        partition = jax.P(None, "expert", "data", None)
        w = jax.ShapeDtypeStruct((2, 8, 86, 64), jnp.float32, sharding=jax.NamedSharding(mesh, partition))
        x = jax.ShapeDtypeStruct((4, 64), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))

        def run(x, w_LECD, spec):
            def layer(x, w_ECD):
                return x + jnp.sum(jnp.tanh(jnp.einsum("md,ecd->mec", x, jax.reshard(w_ECD, spec))), (1, 2))[:, None], 0

            return jax.lax.scan(layer, x, w_LECD)[0]

        for spec in (jax.P("expert", None, None), jax.P()):
            text = jax.jit(functools.partial(run, spec=spec)).trace(x, w).lower().compile().as_text()
            assert text is not None and "all-gather" in of_experts(collectives(text), ODD)
    made = "%a.1 = bf16[2,43,8]{2,1,0:T(8,128)} parameter(0)\n"
    pair = f"{made} %b = (bf16[2,43,8]{{2}}, bf16[8,43,8]{{2}}) all-gather-start(%a.1)"
    for groups in ("{{0,1},{2,3}}", "[2,4]<=[8]"):
        found = collectives(f"{pair}, replica_groups={groups}, x")
        assert found == [("all-gather", d) for d in ((2, 43, 8), (8, 43, 8), (2, 43, 8))]
    for groups in ("{{0},{1}}", "[8,1]<=[8]"):
        assert collectives(f"{pair}, replica_groups={groups}, x") == []
    assert of_experts([("all-gather", (4096, 32, 128)), ("all-to-all", (200, 4096))], ODD) == set()


def check(texts: dict[str, str], data: int) -> None:
    """No collective but the sum of gradients over `data`, whose devices hold the same experts, sees their weights."""
    assert list(texts) == ["route", "experts"]
    found = {name: collectives(text) for name, text in texts.items()}
    assert {"all-gather", "all-to-all"} <= {kind for kind, _ in found["experts"]}, "other weights and the tokens move"
    assert of_experts(found["route"], ODD) == set()
    assert of_experts(found["experts"], ODD) == ({"all-reduce"} if data > 1 else set())


@pytest.mark.parametrize("shape", [(2, 4, 1), pytest.param((1, 4, 2), marks=pytest.mark.slow)], ids=str)
def test_no_expert_weight_is_gathered(shape):
    """Llama-2-7B's width, vocabulary and heads, two layers in the scan, compiled for eight CPU devices."""
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3)
    check(compiled(mesh, "cpu", 2, 512), shape[0])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu")
@pytest.mark.parametrize(
    ("topology", "shape", "layers"),
    [("v5e:2x4", (2, 4, 1), 2), ("v5p:2x4x4", (4, 8, 1), 32), ("v5p:2x4x4", (4, 4, 2), 32)],
    ids=str,
)
def test_no_expert_weight_is_gathered_on_tpu(monkeypatch, topology, shape, layers):
    """What libtpu makes of it for chips that are not here: two layers, and Llama-2-7B whole, 4096 tokens a record."""
    from jax.experimental import topologies

    library = importlib.util.find_spec("libtpu")
    assert library is not None and library.origin is not None
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_LIBRARY_PATH", os.path.join(os.path.dirname(library.origin), "libtpu.so"))
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Explicit,) * 3)
    check(compiled(mesh, "tpu", layers, 512 if layers == 2 else 4096), shape[0])
