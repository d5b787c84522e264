"""The device mesh and the one table that says where every array lies.

The mesh always has the axes `data`, `expert`, `model` (length 1 allowed), all Explicit: a wrong placement is a type
error while tracing. Model code names logical axes; only this file knows which mesh axis they map to.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from readme_jax.config import require

AXES = ("data", "expert", "model")
REPLICATED = P()

# Logical axis -> mesh axes. Batches are split over `data` and `expert` together; FFN channels over `model`.
RULES: dict[str, tuple[str, ...] | str | None] = {
    "batch": ("data", "expert"),
    "seq": None,
    "embed": None,
    "vocab": None,
    "layer": None,
    "head": None,
    "kv_head": None,
    "head_dim": None,
    "mlp": "model",
    "expert": None,
    "own_expert": "expert",
    "channel": None,
    "router": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis."""

    data: int = 0
    """Devices that split the batch; 0 takes every device that the other axes leave."""
    expert: int = 1
    """Devices that split the batch too, and separate experts."""
    model: int = 1
    """Devices that split the FFN channels."""


def spec(*axes: str | None) -> P:
    """PartitionSpec of logical axes; an unknown name is a KeyError, one mesh axis used twice a ConfigError."""
    mapped = [None if a is None else RULES[a] for a in axes]
    used = [m for entry in mapped if entry for m in ((entry,) if isinstance(entry, str) else entry)]
    require(len(used) == len(set(used)), f"{axes} puts two dimensions on one mesh axis: {mapped}")
    return P(*mapped)


def make_mesh(config: MeshConfig = MeshConfig()) -> jax.sharding.Mesh:
    """The mesh of a run over the local devices; ConfigError when they do not suffice."""
    count = jax.device_count()
    fixed = config.expert * config.model
    require(min(config.expert, config.model) >= 1, f"mesh {config} needs at least 1 on expert and model")
    data = config.data or max(count // fixed, 1)
    shape = (data, config.expert, config.model)
    need = int(np.prod(shape))
    require(
        need <= count,
        f"mesh data={data} expert={config.expert} model={config.model} needs {need} devices, there are {count}",
    )
    return jax.make_mesh(shape, AXES, devices=jax.devices()[:need], axis_types=(AxisType.Explicit,) * 3)


@contextlib.contextmanager
def use_mesh(config: MeshConfig = MeshConfig()) -> Iterator[jax.sharding.Mesh]:
    """Enter the mesh of `config` for the block."""
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        yield mesh


def batch_devices() -> int:
    """Number of shards of the batch axis on the current mesh: a batch must be a multiple of it."""
    shape = jax.sharding.get_abstract_mesh().shape
    return shape.get("data", 1) * shape.get("expert", 1)


def model_devices() -> int:
    """Number of shards of the FFN channels on the current mesh."""
    return jax.sharding.get_abstract_mesh().shape.get("model", 1)


def expert_devices() -> int:
    """Number of shards of separate experts on the current mesh."""
    return jax.sharding.get_abstract_mesh().shape.get("expert", 1)


def put(value: Any, partition: P = REPLICATED) -> jax.Array:
    """Place a host array on the current mesh."""
    mesh = jax.sharding.get_mesh()
    # One entry a dimension, as jit returns it: `P()` and `P(None)` are the same place but two entries of jit's cache.
    whole = P(*partition, *(None,) * (np.ndim(value) - len(partition)))
    return jax.device_put(value, jax.NamedSharding(mesh, whole))


def put_tree(tree: Any, specs: Any) -> Any:
    """Place a tree of host arrays by a tree of specs of the same structure."""
    return jax.tree.map(put, tree, specs)
