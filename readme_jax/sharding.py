"""The device mesh and the one table that says where every array lies.

The mesh always has the axes `data`, `expert`, `model` (length 1 allowed), all Explicit: a wrong placement is a type
error while tracing. Model code names logical axes; only this file knows which mesh axis they map to.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
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
    "channel": None,
    "router": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis."""

    data: int = 0
    """Devices that split the batch; 0 takes every device that the other axes leave."""
    expert: int = 1
    """Devices that split the batch too (and separate experts, in a later version)."""
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
    for name in ("expert", "model"):
        require(getattr(config, name) >= 1, f"mesh.{name}={getattr(config, name)} must be at least 1")
    require(config.data >= 0, f"mesh.data={config.data} must be at least 1, or 0 for all devices that are left")
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


def put(value: Any, partition: P = REPLICATED) -> jax.Array:
    """Place a host array on the current mesh."""
    mesh = jax.sharding.get_mesh()
    # One entry a dimension, as jit returns it: `P()` and `P(None)` are the same place but two entries of jit's cache.
    whole = P(*partition, *(None,) * (np.ndim(value) - len(partition)))
    return jax.device_put(value, jax.NamedSharding(mesh, whole))


def put_parts(
    shape: tuple[int, ...],
    dtype: Any,
    read: Callable[[tuple[slice, ...]], np.ndarray],
    partition: P = REPLICATED,
    where: str = "array",
) -> jax.Array:
    """Place an array that is nowhere whole: read(index) gives the host array of one shard, in `dtype`.

    It is asked once for each distinct index among this process's devices. ConfigError, beginning with `where`, when a
    dimension does not divide over its mesh axes.
    """
    mesh = jax.sharding.get_mesh()
    whole = P(*partition, *(None,) * (len(shape) - len(partition)))
    for size, axes in zip(shape, whole):
        names = (axes,) if isinstance(axes, str) else axes or ()
        count = math.prod(mesh.shape[name] for name in names)
        require(size % count == 0, f"{where}: {size} does not divide over mesh {'*'.join(names)}={count}")
    parts: dict[tuple, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        index = tuple(slice(*s.indices(n)) for s, n in zip(index or (), shape))
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return jax.make_array_from_callback(shape, jax.NamedSharding(mesh, whole), part, dtype)
