"""Model folders <-> arrays sharded over the mesh, one tensor of one layer at a time: no host ever holds the model.

In: a folder, and a PartitionSpec for every parameter. A host touches only the pages of the mapped files that hold its
own shards. Out: safetensors written by process 0, to which the others hand their shards tensor by tensor.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from readme_jax.config import CheckpointError, ModelConfig, require
from readme_jax.hf import Entry, Params, Reader, Writer, check, outgoing, read_config, set_leaf, stored_dtype, table
from readme_jax.sharding import REPLICATED, put_parts
from readme_jax.weights import contiguous

GATHER = 1 << 28  # bytes of a large tensor that every device holds at once while process 0 fetches it


def load_sharded(
    folder: str | Path,
    specs: Params,
    *,
    shapes: Params | None = None,
    router_specs: Params | None = None,
    dtype: Any = None,
) -> tuple[Params, np.ndarray | None, Params | None]:
    """`hf.load_params`, with the parameters placed on the current mesh: (params, experts_LEC on the host, router).

    specs: a PartitionSpec for every parameter, with the leading (unsplit) layer axis. shapes: a tree of things with a
    `.shape`, for parameters seen in other axes than the folder's, such as [L, E, C, D] for [L, E * C, D].
    router_specs: as specs for the router; None replicates it. Checks the whole folder first (CheckpointError,
    ConfigError). Host memory: this process's part of one tensor of one layer, whatever the size of the model.
    """
    cfg, experts, router = read_config(folder)
    reader = Reader(folder)
    check(reader, cfg, experts, router)
    tree: Params = {}
    for entry in table(cfg):
        seen = _leaf(shapes, entry.path)
        shape = entry.shape if seen is None else seen.shape[1 if entry.count else 0 :]
        kind = stored_dtype(reader, entry, dtype)
        set_leaf(tree, entry.path, _place(reader, entry, shape, _leaf(specs, entry.path), kind))
    own = None if dtype is None else np.float32  # the router's, as `hf.load_params` has it
    return tree, *_moe(reader, table(cfg, experts, router), router_specs, own)


def load_router(
    folder: str | Path, *, specs: Params | None = None, dtype: Any = None
) -> tuple[np.ndarray | None, Params | None]:
    """The last two of `load_sharded` without the backbone: (experts_LEC on the host, router placed by `specs`)."""
    cfg, experts, router = read_config(folder)
    reader = Reader(folder)
    check(reader, cfg, experts, router)
    return _moe(reader, table(cfg, experts, router), specs, dtype)


def _moe(
    reader: Reader, entries: list[Entry], specs: Params | None, dtype: Any
) -> tuple[np.ndarray | None, Params | None]:
    experts_LEC, tree = None, {}
    for entry in entries:
        if entry.path == ("experts",):
            experts_LEC = np.array(reader.get(entry.hf))
        elif entry.path[0] == "router":
            partition = REPLICATED if specs is None else _leaf(specs, entry.path[1:])
            placed = _place(reader, entry, entry.shape, partition, stored_dtype(reader, entry, dtype))
            set_leaf(tree, entry.path[1:], placed)
    return experts_LEC, tree or None


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    return None if tree is None else functools.reduce(lambda branch, key: branch[key], path, tree)


def _place(reader: Reader, entry: Entry, shape: tuple[int, ...], partition: P, dtype: np.dtype) -> jax.Array:
    def one(name: str, partition: P) -> jax.Array:
        return put_parts(shape, dtype, part_reader(reader, entry, name, shape, dtype), partition, where=name)

    if not entry.count:
        return one(entry.hf, partition)
    require(not partition or partition[0] is None, f"{'.'.join(entry.path)}: the layer axis cannot be split")
    inner, stack = P(*partition[1:]), None
    for i, name in enumerate(entry.names()):
        layer = one(name, inner)
        # Stacked on the device: gathering the layers on the host would need the host's part of the whole stack.
        stack = _empty(entry.count, layer) if stack is None else stack
        stack = _set_layer(stack, layer, np.int32(i))
    assert stack is not None
    return stack


def part_reader(
    reader: Reader, entry: Entry, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """read(index) -> that part of one tensor, seen as `shape` in our orientation, as a fresh array of `dtype`.

    The file is mapped once for all parts and only the pages of a part are touched.
    """
    ours = entry.to_ours(reader.get(name))
    fits = math.prod(shape) == ours.size
    require(fits, f"tensor {name}: shape {ours.shape} cannot be seen as {shape}", CheckpointError)
    view = ours.reshape(shape)  # splits an axis: a view, whatever the orientation
    return lambda index: contiguous(view[index], dtype)


def _empty(count: int, layer: jax.Array) -> jax.Array:
    partition = jax.typeof(layer).sharding.spec
    place = jax.NamedSharding(jax.sharding.get_mesh(), P(None, *partition))
    return jnp.zeros((count, *layer.shape), layer.dtype, device=place)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, at) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, at, 0)


# ---- writing ----------------------------------------------------------------------------------


def save_sharded(
    folder: str | Path,
    cfg: ModelConfig,
    params: Params,
    experts: np.ndarray | None = None,
    router: Params | None = None,
    *,
    max_shard_bytes: int = 1 << 30,
) -> None:
    """Write placed (or host) parameters into `folder` as `hf.save_params` would, byte for byte.

    Every process calls it on the current mesh, process 0 writes. With several processes a tensor is made whole on the
    devices (a large one in blocks of GATHER where its first axis is unsplit) and fetched by process 0 alone. Host
    memory: one shard file and one tensor. A parameter may have axes of the table's split in two. CheckpointError for
    a parameter that is missing, unknown or misshapen.
    """
    writing = jax.process_index() == 0
    with Writer(folder, max_shard_bytes) if writing else contextlib.nullcontext() as writer:
        for name, entry, array, layer in outgoing(cfg, params, experts, router):
            own = array.shape if layer is None else array.shape[1:]
            fits = math.prod(own) == math.prod(entry.shape)
            where = f"parameter {'.'.join(entry.path)}"
            require(fits, f"{where}: shape {own}, the config needs {entry.shape}", CheckpointError)
            whole = fetch(array, layer)
            if writer is not None and whole is not None:
                writer.add(name, entry.to_hf(whole.reshape(entry.shape)))


def fetch(array: Any, at: int | None = None) -> np.ndarray | None:
    """The host array of a placed one, or of its slice `at` along the first axis: on process 0; None on the others."""
    if not isinstance(array, jax.Array):
        return np.asarray(array if at is None else array[at])
    if array.is_fully_addressable:
        return np.asarray(array if at is None else _rows(array, np.int32(at), 1)).reshape(_shape(array, at))
    first, rows = (0, len(array)) if at is None else (at, 1)
    step = min(rows, _block_rows(array))
    whole = np.empty((rows, *array.shape[1:]), array.dtype) if jax.process_index() == 0 else None
    for start in range(0, rows, step):
        start = min(start, rows - step)  # the last block overlaps the one before: one shape, one program
        block = _whole_rows(array, np.int32(first + start), step).addressable_data(0)
        if whole is not None:
            whole[start : start + step] = np.asarray(block)
        jax.block_until_ready(block)  # or blocks would pile up on the devices of a process that fetches nothing
    return None if whole is None else whole.reshape(_shape(array, at))


def _block_rows(array: jax.Array) -> int:
    """Rows of the first axis that make at most GATHER bytes; all of them where that axis is split."""
    split = array.sharding.shard_shape(array.shape)[0] < len(array)
    return len(array) if split or array.nbytes <= GATHER else max(1, GATHER * len(array) // array.nbytes)


def _shape(array: jax.Array, at: int | None) -> tuple[int, ...]:
    return array.shape if at is None else array.shape[1:]


@functools.partial(jax.jit, static_argnums=2)
def _rows(array: jax.Array, start, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, count, 0)


@functools.partial(jax.jit, static_argnums=2)
def _whole_rows(array: jax.Array, start, count: int) -> jax.Array:
    rows = jax.lax.dynamic_slice_in_dim(array, start, count, 0) if count < len(array) else array
    return jax.reshard(rows, REPLICATED)
