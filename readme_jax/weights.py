"""Tensors of a Hugging Face folder: `Reader` maps them one at a time, `Writer` streams them out shard by shard.

The safetensors header is parsed here, so that a truncated, overlapping or inconsistent file is named before any work
starts. Pickled weights are never opened.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from readme_jax.artifacts import write_text
from readme_jax.config import CheckpointError, require

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TILE = 256  # elements along each side of what a transposition moves at once
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor lies: `start` is its first byte in `file`."""

    file: Path
    start: int
    nbytes: int
    dtype: np.dtype
    shape: tuple[int, ...]


class Reader:
    """The tensors of `folder`, by Hugging Face name. Opening reads headers only; `get` maps one tensor's bytes.

    As in transformers, `model.safetensors` is taken before `model.safetensors.index.json`. Raises CheckpointError, one
    line with the file, for weights that are missing, truncated, inconsistent, listed twice or pickled.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        require(self.folder.is_dir(), f"{folder}: no such model folder", CheckpointError)
        if (self.folder / SINGLE).is_file():
            self._slots = read_header(self.folder / SINGLE)
        elif (self.folder / INDEX).is_file():
            self._slots = _read_sharded(self.folder)
        else:
            raise CheckpointError(_why_no_weights(self.folder))

    def names(self) -> list[str]:
        """Every tensor name, sorted."""
        return sorted(self._slots)

    def get(self, name: str) -> np.ndarray:
        """The tensor, read-only, in its own dtype (bfloat16 by ml_dtypes), mapped from the file.

        Each call makes a mapping of its own, released with the array: pages read do not pile up in resident memory.
        """
        slot = self._slot(name)
        if not slot.nbytes:
            return np.empty(slot.shape, slot.dtype)
        try:
            raw = np.memmap(slot.file, np.uint8, "r", slot.start, (slot.nbytes,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{slot.file}: {name} cannot be read any more ({error})") from None
        return np.asarray(raw).view(slot.dtype).reshape(slot.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._slot(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, without reading it."""
        return self._slot(name).dtype

    def file(self, name: str) -> Path:
        """The file that holds a tensor: for messages."""
        return self._slot(name).file

    def _slot(self, name: str) -> Slot:
        require(name in self._slots, f"{self.folder}: no tensor {name}", CheckpointError)
        return self._slots[name]


def read_header(path: Path) -> dict[str, Slot]:
    """Name -> place of every tensor of one safetensors file, checked against the file's size.

    The tensors must tile the file: no overlap, no gap, nothing behind the last one (the format's own rule).
    """
    size = path.stat().st_size
    require(size >= 8, f"{path}: truncated: {size} bytes are no safetensors file", CheckpointError)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        require(
            length <= min(size - 8, _HEADER_LIMIT),
            f"{path}: truncated or not safetensors: its header claims {length} bytes, the file has {size}",
            CheckpointError,
        )
        header = _json(file.read(length), f"{path}: safetensors header")
    header.pop("__metadata__", None)
    slots = {name: _slot(path, name, entry, 8 + length) for name, entry in header.items()}
    end, before = 8 + length, "the header"
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        fault = "overlaps" if slot.start < end else "leaves a gap after"
        require(slot.start == end, f"{path}: tensor {name} {fault} {before}", CheckpointError)
        end, before = slot.start + slot.nbytes, name
    require(end <= size, f"{path}: truncated: {size} bytes, its tensors need {end}", CheckpointError)
    require(end == size, f"{path}: {size - end} bytes follow the last tensor {before}", CheckpointError)
    return slots


def _slot(path: Path, name: str, entry: Any, base: int) -> Slot:
    where = f"{path}: tensor {name}"
    keys = {"dtype", "shape", "data_offsets"}
    require(isinstance(entry, dict) and set(entry) == keys, f"{where}: header entry is malformed", CheckpointError)
    require(
        entry["dtype"] in list(DTYPES),  # a list: the value may be unhashable
        f"{where}: dtype {entry['dtype']} is not supported (known: {', '.join(DTYPES)})",
        CheckpointError,
    )
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], DTYPES[entry["dtype"]]
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        whole = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
        require(whole, f"{where}: {key}={value} must be a list of whole numbers", CheckpointError)
    require(len(offsets) == 2, f"{where}: data_offsets={offsets} must be [begin, end]", CheckpointError)
    nbytes = math.prod(shape) * dtype.itemsize
    require(
        offsets[1] - offsets[0] == nbytes,
        f"{where}: data_offsets={offsets} span {offsets[1] - offsets[0]} bytes, {entry['dtype']}{shape} needs {nbytes}",
        CheckpointError,
    )
    return Slot(path, base + offsets[0], nbytes, dtype, tuple(shape))


def _read_sharded(folder: Path) -> dict[str, Slot]:
    index = folder / INDEX
    weight_map = _json(index.read_bytes(), str(index)).get("weight_map") or {}
    require(
        isinstance(weight_map, dict) and len(weight_map) > 0,
        f"{index}: weight_map is missing or empty: it must map tensor names to shard files",
        CheckpointError,
    )
    slots: dict[str, Slot] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        # A name with a folder in it could point anywhere on the machine.
        require(Path(shard).name == shard, f"{index}: shard {shard!r} must be a plain file name", CheckpointError)
        path = folder / shard
        require(path.is_file(), f"{path}: shard listed in {INDEX} but missing", CheckpointError)
        for name, slot in read_header(path).items():
            require(
                name not in slots,
                f"{path}: tensor {name} is in another shard too",
                CheckpointError,
            )
            require(
                weight_map.get(name) == shard,
                f"{path}: holds tensor {name}, {INDEX} says {weight_map.get(name, 'nothing of it')}",
                CheckpointError,
            )
            slots[name] = slot
    for name, shard in weight_map.items():
        require(name in slots, f"{folder / str(shard)}: tensor {name} is listed in {INDEX} but absent", CheckpointError)
    return slots


def _json(raw: bytes, where: str) -> dict:
    def no_twice(pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{where}: {twice} is listed twice")
        return found

    try:
        data = json.loads(raw, object_pairs_hook=no_twice)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, numbers or nesting without end
        raise CheckpointError(f"{where} is not valid JSON: damaged or not safetensors") from None
    require(isinstance(data, dict), f"{where} must be a JSON object", CheckpointError)
    return data


def _why_no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder / pickles[0]}: pickled weights are refused, loading a pickle can run any code; "
            "convert the model to safetensors"
        )
    return f"{folder}: no weights: neither {SINGLE} nor {INDEX} is there"


def contiguous(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """A fresh C-ordered copy, cast to `dtype`: never a view, so it outlives a mapped file.

    A transposed view is copied in tiles that fit the cache: about four times faster than NumPy's own order.
    """
    out = np.empty(array.shape, array.dtype if dtype is None else dtype)
    if array.ndim < 2 or array.strides[-1] == array.itemsize:
        out[...] = array
        return out
    same = out.dtype == array.dtype and array.dtype.itemsize in (1, 2, 4, 8)
    # Copied as plain integers: NumPy moves the types of ml_dtypes one element at a time.
    source, target = (a.view(f"u{a.itemsize}") for a in (array, out)) if same else (array, out)
    for at in np.ndindex(array.shape[:-2]):
        for row in range(0, array.shape[-2], TILE):
            for column in range(0, array.shape[-1], TILE):
                tile = (*at, slice(row, row + TILE), slice(column, column + TILE))
                target[tile] = source[tile]
    return out


# ---- writing ----------------------------------------------------------------------------------


class Writer:
    """Streams tensors into `folder` as safetensors that transformers opens; the same input gives the same bytes.

    Arrays are kept by reference until their shard is written: do not change one before `close`. At most one shard of
    `max_shard_bytes` is held. Files carry temporary names until `close`, which names them and writes the index last;
    leaving the `with` block by an error removes them. An older set of weights in the folder is replaced.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int = 1 << 30):
        require(max_shard_bytes >= 1, f"max_shard_bytes={max_shard_bytes} must be at least 1")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._total = 0
        self.abort()  # what a killed run left behind

    def add(self, name: str, array: np.ndarray) -> None:
        """Queue one tensor. A name given twice, or a dtype safetensors has no code for, raises CheckpointError."""
        require(name != "__metadata__", f"{self.folder}: a tensor cannot be called {name}", CheckpointError)
        require(name not in self._names, f"{self.folder}: tensor {name} written twice", CheckpointError)
        code = _CODES.get(array.dtype)
        require(
            code is not None, f"{self.folder}: tensor {name}: dtype {array.dtype} cannot be stored", CheckpointError
        )
        if self._pending and self._pending_bytes + array.nbytes > self.max_shard_bytes:
            self._flush()
        self._names.add(name)
        self._pending[name] = array
        self._pending_bytes += array.nbytes
        self._total += array.nbytes

    def close(self) -> list[str]:
        """Write the last shard, give the files their names, then the index if there are several. Returns file names."""
        require(bool(self._names), f"{self.folder}: no tensor was written", CheckpointError)
        if self._pending:
            self._flush()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        # Without its index an old set cannot be mistaken for the new one if we are killed between the renames.
        for old in (self.folder / INDEX, self.folder / SINGLE, *self.folder.glob("model-*-of-*.safetensors")):
            old.unlink(missing_ok=True)
        for i, name in enumerate(names):
            os.replace(self._temporary(i), self.folder / name)
        if count > 1:
            weight_map = {tensor: names[i] for i, shard in enumerate(self._shards) for tensor in shard}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
            names.append(INDEX)
        return names

    def abort(self) -> None:
        """Remove what has been written so far under temporary names."""
        for path in self.folder.glob(".model-*.safetensors.tmp"):
            path.unlink(missing_ok=True)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _temporary(self, shard: int) -> Path:
        return self.folder / f".model-{shard + 1:05d}.safetensors.tmp"

    def _flush(self) -> None:
        # Wide dtypes first keeps every tensor aligned to its own size, as the safetensors library does.
        names = sorted(self._pending, key=lambda name: (-self._pending[name].dtype.itemsize, name))
        try:
            with open(self._temporary(len(self._shards)), "wb") as file:
                _write_shard(file, names, self._pending)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self.abort()
            raise
        self._shards.append(names)
        self._pending, self._pending_bytes = {}, 0


def _write_shard(file: BinaryIO, names: list[str], arrays: dict[str, np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    start = 0
    for name in names:
        array = arrays[name]
        end = start + array.nbytes
        header[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        # One tensor at a time: a transposed view is made contiguous here and nowhere else.
        array = arrays[name] if arrays[name].flags.c_contiguous else contiguous(arrays[name])
        file.write(array.reshape(-1).view(np.uint8).data)
