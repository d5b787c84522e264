"""The device mesh and the one table that says where every array lies.

The mesh always has the axes `data`, `expert`, `model` (length 1 allowed), all Explicit: a wrong placement is a type
error while tracing. Model code names logical axes; only this file knows which mesh axis they map to.

A parameter has two layouts: in the computation (`spec`, `computed`) and at rest (`stored`), where it and its optimizer
state are split over the batch axes as well (ZeRO-3); `gather` leads from one to the other, a layer at a time.
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

BATCH = ("data", "expert")

# Logical axis -> mesh axes. Batches are split over `data` and `expert` together; FFN channels, attention heads and the
# vocabulary of the head's logits over `model`.
RULES: dict[str, tuple[str, ...] | str | None] = {
    "batch": BATCH,
    "seq": None,
    "embed": None,
    "vocab": None,
    "logit": "model",
    "layer": None,
    "head": "model",
    "kv_head": "model",
    "head_dim": None,
    "mlp": "model",
    "expert": None,
    "own_expert": "expert",
    "channel": None,
    "router": None,
}
# The same for parameters at rest, where it differs: every matrix has one of these axes.
STORED: dict[str, tuple[str, ...]] = {"embed": BATCH, "router": BATCH}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis."""

    data: int = 0
    """Devices that split the batch, and the parameters at rest; 0 takes every device that the other axes leave."""
    expert: int = 1
    """Devices that split batch and parameters too, and separate experts."""
    model: int = 1
    """Devices that split FFN channels, attention heads and the vocabulary of the output head."""

    def __post_init__(self):
        require(self.data >= 0, f"mesh.data={self.data} must be at least 1, or 0 for every device that is left")
        for name in ("expert", "model"):
            require(getattr(self, name) >= 1, f"mesh.{name}={getattr(self, name)} must be at least 1")


def spec(*axes: str | None) -> P:
    """PartitionSpec of logical axes; an unknown name is a KeyError, one mesh axis used twice a ConfigError."""
    mapped = [None if a is None else RULES[a] for a in axes]
    used = [m for entry in mapped if entry for m in ((entry,) if isinstance(entry, str) else entry)]
    require(len(used) == len(set(used)), f"{axes} puts two dimensions on one mesh axis: {mapped}")
    return P(*mapped)


def _fitting(axes: tuple[str | None, ...], shape: tuple[int, ...], names: list[Any]) -> P:
    """PartitionSpec of mesh axes `names`, without those that do not divide their dimension.

    A dimension of the batch axes falls back to `data` alone. FFN channels must divide: `model` is there for them.
    """
    mesh = jax.sharding.get_abstract_mesh().shape

    def fits(size: int, entry: Any) -> Any:
        options = [entry] if not isinstance(entry, tuple) else [entry, *entry[:1]]
        for option in options:
            count = math.prod(mesh.get(m, 1) for m in (option if isinstance(option, tuple) else (option,)))
            if size % count == 0:
                return option
        return None

    entries = [entry and fits(size, entry) for size, entry in zip(shape, names, strict=True)]
    for axis, size, entry in zip(axes, shape, entries, strict=True):
        many = mesh.get("model", 1)
        require(axis != "mlp" or entry is not None, f"mlp={size} FFN channels must be a multiple of mesh.model={many}")
    return P(*entries)


def computed(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> P:
    """Layout of a parameter while it is used: `spec`, without mesh axes that do not divide their dimension."""
    return _fitting(axes, shape, list(spec(*axes)))


def stored(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> P:
    """Layout of a parameter at rest, and of its gradient and optimizer state.

    A matrix is split over the batch axes too, along its model (or router) width: over both if they divide it, else
    over `data`, else not at all. Vectors are not: a collective each for a ten-thousandth of the memory.
    """
    names = list(spec(*axes))
    # With one device of the batch both layouts are one type: a change of type is a copy in XLA.
    if len([a for a in axes if a != "layer"]) > 1 and batch_devices() > 1:
        names = [STORED.get(a, entry) if a else entry for a, entry in zip(axes, names, strict=True)]
    return _fitting(axes, shape, names)


def gather(w: jax.Array, layout: P, dtype: Any) -> jax.Array:
    """A parameter at rest in the layout and dtype of the computation. It is cast first: what travels is `dtype`.

    The gradient comes back at rest: its sum over the batch's devices is scattered, not replicated.
    """
    w = w.astype(dtype)
    return w if jax.typeof(w).sharding.spec == layout else jax.reshard(w, layout)


def make_mesh(config: MeshConfig = MeshConfig()) -> jax.sharding.Mesh:
    """The mesh of a run over the devices of all processes; ConfigError when they do not match.

    Devices stay idle only when `data` is said: with data=0 the other axes must divide their number. Several processes
    must use all of them, for a process without a device on the mesh has nothing to do.
    """
    count, fixed = jax.device_count(), config.expert * config.model
    said = f"mesh expert={config.expert} model={config.model}"
    if not config.data:
        require(fixed <= count, f"{said} needs {fixed} devices, there are {count}")
        most = count // fixed
        require(
            count % fixed == 0,
            f"{said}: {fixed} devices do not divide the {count} there are; "
            f"mesh.data={most} would use {most * fixed} and leave {count % fixed} idle",
        )
    shape = (config.data or count // fixed, config.expert, config.model)
    need = math.prod(shape)
    said = f"mesh data={shape[0]} expert={shape[1]} model={shape[2]} needs {need} devices"
    require(need <= count, f"{said}, there are {count}")
    processes = jax.process_count()
    require(processes == 1 or need == count, f"{said}, the {processes} processes have {count}: all must be used")
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
    """Place a host array on the current mesh. With several processes each takes its own part of it, and none checks
    that the others hold the same."""
    mesh = jax.sharding.get_mesh()
    # One entry a dimension, as jit returns it: `P()` and `P(None)` are the same place but two entries of jit's cache.
    whole = jax.NamedSharding(mesh, P(*partition, *(None,) * (np.ndim(value) - len(partition))))
    if not mesh.is_multi_process:
        return jax.device_put(value, whole)
    host = np.asarray(value)
    return from_callback(host.shape, whole, lambda index: host[index])


def from_callback(shape: tuple[int, ...], place: jax.NamedSharding, read: Callable, dtype: Any = None) -> jax.Array:
    """jax.make_array_from_callback as the explicit transfer that it is: a transfer guard lets it through."""
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(shape, place, read, dtype)


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

    return from_callback(shape, jax.NamedSharding(mesh, whole), part, dtype)
