"""What the frozen model says of records, computed once before training and kept on disk: labels, likeliest tokens."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from readme_jax import artifacts, distributed
from readme_jax.alternate import AlternateConfig
from readme_jax.config import Stopped
from readme_jax.data import Batches
from readme_jax.loop import whole
from readme_jax.losses import TopK
from readme_jax.metrics import progress
from readme_jax.sharding import put, spec


def needed_records(batches: Batches, steps: int) -> np.ndarray:
    """Sorted ids of all records that the first `steps` batches hold."""
    seen = [batches.index(step).ravel() for step in range(steps)]
    return np.unique(np.concatenate(seen)) if seen else np.zeros(0, np.int32)


class RecordCache:
    """What a frozen model says of records, computed once in a fixed order and kept on disk: named arrays, a row of each
    for every record.

    The order and the batches of the pass do not depend on where a killed run stopped, so a resumed run sees bit-equal
    arrays. Files of another shape or cut short are computed again; changed values are not noticed. Process 0 writes,
    all read. fields: name -> (shape of a record's row, dtype); a field is `<folder>/<name>.<field>.npy`.
    """

    def __init__(self, folder: Path, name: str, ids_N: np.ndarray, fields: dict[str, tuple[tuple[int, ...], Any]]):
        self.ids_N, self.fields, self._mark = ids_N, fields, folder / f"{name}.json"
        self._paths = {field: folder / f"{name}.{field}.npy" for field in fields}
        self.files = [path.name for path in (self._mark, *self._paths.values())]
        self.done = distributed.on_main(self._begin)
        self._open("r+" if distributed.is_main() else "r")

    def _begin(self) -> int:
        if all(path.is_file() for path in (self._mark, *self._paths.values())):
            damage = self._damage()
            if not damage:
                return json.loads(self._mark.read_text())["records"]
            print(f"warning: {damage}; computed again from the start", file=sys.stderr, flush=True)
            self._mark.unlink()
        for field, (shape, dtype) in self.fields.items():
            rows = (len(self.ids_N), *shape)
            np.lib.format.open_memmap(self._paths[field], mode="w+", dtype=dtype, shape=rows)
            _reserve(self._paths[field])
        return 0

    def _damage(self) -> str:
        """What is wrong with the files of an earlier start, with the name of one; empty when nothing is."""
        try:
            done = json.loads(self._mark.read_text())["records"]
            assert type(done) is int and 0 <= done <= len(self.ids_N)
        except (ValueError, KeyError, TypeError, AssertionError):
            return f"{self._mark}: damaged"
        for field, (shape, dtype) in self.fields.items():
            path = self._paths[field]
            try:
                array = np.lib.format.open_memmap(path, mode="r")
            except (ValueError, OSError):
                return f"{path}: damaged"
            if array.shape != (len(self.ids_N), *shape) or array.dtype != dtype:
                return f"{path}: {array.shape} {array.dtype}, not what this run needs"
        return ""

    def _open(self, mode: Literal["r", "r+"]) -> None:
        self._arrays = {field: np.lib.format.open_memmap(path, mode=mode) for field, path in self._paths.items()}

    def fill(
        self,
        batch: int,
        compute: Callable[[np.ndarray], dict[str, np.ndarray]],
        saved_every: int = 32,
        *,
        stop: Callable[[], str] = lambda: "",
    ) -> None:
        """Compute what is missing: compute(ids_B) -> {field: [B, ...]} for `batch` record ids at a time, the last ones
        repeated.

        Stopped, with what is done kept, once `stop` of any process gives a reason.
        """
        for number, start in enumerate(range(self.done, len(self.ids_N), batch), 1):
            ids_B = self.ids_N[start : start + batch]
            values = compute(np.pad(ids_B, (0, batch - len(ids_B)), mode="edge"))
            self.done = start + len(ids_B)
            asked = [why for why in distributed.everyone(stop()) if why]
            if distributed.is_main():
                for field, array in self._arrays.items():
                    array[start : self.done] = values[field][: len(ids_B)]
                if number % saved_every == 0 or self.done == len(self.ids_N) or asked:
                    for array in self._arrays.values():
                        array.flush()
                    artifacts.write_text(self._mark, json.dumps({"records": self.done}))
            if asked:
                raise Stopped(f"stopped by {asked[0]}; {self.done} of {len(self.ids_N)} records are done")
        distributed.barrier()
        self._open("r")  # anew: with all that process 0 wrote

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of record ids of any shape: {field: [*index.shape, ...]}; no other row is read."""
        at = np.searchsorted(self.ids_N, index)
        return {field: array[at] for field, array in self._arrays.items()}


def ask_teacher(
    config: AlternateConfig,
    folder: Path,
    batches: dict[str, Batches],
    sizes: tuple[int, int],
    label: Callable[[jax.Array, jax.Array], jax.Array],
    top_k: Callable[[jax.Array, jax.Array], TopK],
    stop: Callable[[], str],
) -> dict[str, RecordCache]:
    """Caches of what the run needs the frozen model to say, complete. sizes: of the vocabulary, and experts.

    `labels`: target, float32 [T, E], by label(ids_BT, segments_BT). `top_k`: the fields of TopK, the ids in 2 bytes
    where the vocabulary fits. stop: see `RecordCache.fill`.
    """
    (vocab, experts), caches = sizes, {}
    if config.labelled:
        size, own = config.router.label_batch, batches["router"]
        ids_N = needed_records(own, config.rounds * config.router.steps)
        caches["labels"] = RecordCache(folder, "labels", ids_N, {"target": ((own.seq, experts), np.float32)})
        _fill(caches["labels"], "label", own, size, lambda *rows: {"target": label(*rows)}, stop)
    if k := config.experts.teacher_topk:
        own, token = batches["experts"], np.uint16 if vocab <= 1 << 16 else np.int32
        ids_N, seq = needed_records(own, config.rounds * config.experts.steps), own.seq
        fields = {"logp": ((seq, k), np.float32), "token": ((seq, k), token), "rest": ((seq,), np.float32)}
        caches["top_k"] = RecordCache(folder, "top_k", ids_N, fields)
        _fill(caches["top_k"], "teacher", own, config.experts.batch, lambda *rows: vars(top_k(*rows)), stop)
    return caches


def _fill(
    cache: RecordCache,
    name: str,
    batches: Batches,
    size: int,
    run: Callable[..., dict[str, jax.Array]],
    stop: Callable[[], str],
) -> None:
    """Complete a cache under a bar: run(ids_BT, segments_BT) -> {field: [B, T, ...]} for `size` records at a time."""
    seq, silent = batches.seq, not distributed.is_main()
    with progress(len(cache.ids_N) * seq, name, initial=cache.done * seq, silent=silent) as bar:

        def rows_of(index_B: np.ndarray) -> dict[str, np.ndarray]:
            rows = batches.take(index_B)
            bar.update(rows["ids"].size)
            return jax.device_get(whole(run(*(put(rows[key], spec("batch", "seq")) for key in ("ids", "segments")))))

        cache.fill(size, rows_of, stop=stop)


def _reserve(path: Path) -> None:
    """Take the disk blocks of a sparse file now: on a full disk a later write to the map would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
