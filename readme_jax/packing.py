"""Documents -> fixed-length records of token ids and segment ids, in memory or streamed into files.

A record holds `seq` tokens of one document after the other. Segment ids count 1, 2, ... anew in each record and 0 is
padding; a document that runs over a record's end goes on in the next as a new segment.
"""

import contextlib
import dataclasses
import errno
import json
import math
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from readme_jax import artifacts
from readme_jax.config import DataError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENISE = 1 << 18  # characters handed to the tokenizer at once
KINDS = ("ids", "segments")


@dataclasses.dataclass(frozen=True)
class Records:
    """Packed text of one domain and split: ids_NT and segments_NT (0 = padding), memory-mapped when opened.

    On disk both are uint16 where their values fit, else int32; `take` gives int32 always.
    """

    ids: np.ndarray
    segments: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, parts: int) -> "Records":
        """Views of the same tokens in rows of T / parts, `parts` for each record. ConfigError if T is no multiple."""
        count, seq = self.ids.shape
        require(seq % parts == 0, f"experts.cut={parts} does not divide records of {seq} tokens")
        return Records(*(a.reshape(count * parts, seq // parts) for a in (self.ids, self.segments)))

    def take(self, rows_B: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """ids and segments of some records, int32 [B, T]."""
        return self.ids[rows_B].astype(np.int32), self.segments[rows_B].astype(np.int32)

    def advise(self, advice: str) -> None:
        """Tell the kernel how the mapped files are read: "MADV_RANDOM", "MADV_DONTNEED". Arrays in memory need nothing.

        Without MADV_RANDOM every record read in random order costs a whole read-ahead (up to megabytes).
        """
        for array in (self.ids, self.segments):
            while isinstance(array, np.ndarray):
                array = array.base
            if isinstance(array, mmap.mmap) and hasattr(mmap, advice):
                array.madvise(getattr(mmap, advice))


class Packer:
    """Cuts documents into whole records; the tokens left over wait for the next documents.

    A document is followed by the end-of-text token, or preceded by the begin token where the tokenizer itself adds one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", seq: int, where: str, vocab: int | None = None):
        self.seq, self.where, self.vocab = seq, where, vocab
        self._core = tokenizer.backend_tokenizer
        self._core.no_truncation()
        self._core.no_padding()
        self._opening, self._closing = _document_marks(tokenizer)
        self.ids_R, self.segments_R = np.zeros(0, np.int32), np.zeros(0, np.int32)  # of the record begun, R < seq

    def add(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The records that these documents complete: int32 ids [N, T] and segments [N, T].

        DataError, beginning with `where`, for a token id >= vocab.
        """
        rows = [e.ids for e in self._core.encode_batch_fast(texts, add_special_tokens=False)]
        rows = [np.array([*self._opening, *row, *self._closing], np.int32) for row in rows]
        ids_M = np.concatenate([self.ids_R, *rows])
        if self.vocab is not None and ids_M.max(initial=0) >= self.vocab:
            message = f"{self.where}: token id {ids_M.max()} does not fit the model's vocab={self.vocab}"
            raise DataError(message)
        # Documents numbered on from those in the record begun, then counted anew from each record's first.
        first = self.segments_R[-1] + 1 if len(self.segments_R) else 1
        kept = [len(row) for row in rows if len(row)]
        documents_M = np.repeat(np.arange(first, first + len(kept), dtype=np.int32), kept)
        segments_M = np.concatenate([self.segments_R, documents_M])
        count = len(ids_M) // self.seq
        ids_NT, self.ids_R = self._cut(ids_M, count)
        segments_NT, self.segments_R = self._cut(segments_M, count)
        segments_NT = segments_NT - (segments_NT[:, :1] - 1)
        if count and len(self.segments_R):
            self.segments_R = self.segments_R - (self.segments_R[0] - 1)
        return ids_NT, segments_NT

    def _cut(self, values_M: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        return values_M[: count * self.seq].reshape(count, self.seq), values_M[count * self.seq :].copy()

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The record begun, padded: [1, T], or [0, T] when there is none."""
        count = min(len(self.ids_R), 1)
        padded = [np.zeros((count, self.seq), np.int32) for _ in KINDS]
        for array, values_R in zip(padded, (self.ids_R, self.segments_R)):
            array[:, : len(values_R)] = values_R
        return padded[0], padded[1]


def _document_marks(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[Any], list[Any]]:
    # What a tokenizer adds to empty text is its own habit, whichever of its files says so.
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"]:
        return [tokenizer.bos_token_id], []
    return [], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _groups(docs: Iterable[str]) -> Iterator[list[str]]:
    texts, size = [], 0
    for text in docs:
        texts.append(text)
        size += len(text)
        if size >= TOKENISE:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _check_enough(found: int, tokens: int, where: str) -> None:
    require(found > 0, f"{where}: no text, {tokens} tokens asked", DataError)
    require(found >= tokens, f"{where}: {found} tokens, {tokens} asked", DataError)


def _bar(tokens: int, where: str, initial: int = 0) -> tqdm:
    every = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(total=tokens, desc=where, unit="tok", unit_scale=True, mininterval=every, initial=initial)


def pack(
    docs: Iterable[str],
    tokenizer: "PreTrainedTokenizerFast",
    seq: int,
    tokens: int,
    *,
    where: str = "text",
    vocab: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The first ceil(tokens / seq) records of these documents, in memory: int32 ids_NT and segments_NT.

    Text beyond `tokens` fills the last record; only where there is none is it padded. DataError, beginning with
    `where`, when there is no text, fewer tokens than asked, or a token id >= vocab.
    """
    require(tokens >= 1, f"{where}: tokens={tokens} must be at least 1")
    packer, count, made = Packer(tokenizer, seq, where, vocab), math.ceil(tokens / seq), []
    for texts in _groups(docs):
        made.append(packer.add(texts))
        if sum(len(ids_NT) for ids_NT, _ in made) >= count:
            break
    else:
        _check_enough(sum(ids_NT.size for ids_NT, _ in made) + len(packer.ids_R), tokens, where)
        made.append(packer.finish())
    ids_NT, segments_NT = (np.concatenate(parts)[:count] for parts in zip(*made))
    return ids_NT, segments_NT


# ---- files ------------------------------------------------------------------------------------


def record_paths(folder: Path, name: str, split: str) -> tuple[Path, Path]:
    """Files of a domain's ids and segments."""
    return folder / f"{name}.{split}.ids.npy", folder / f"{name}.{split}.segments.npy"


def dtypes(seq: int, vocab: int) -> tuple[np.dtype, np.dtype]:
    """What ids and segments are stored as: two bytes a value where that is enough."""
    short, wide = np.dtype(np.uint16), np.dtype(np.int32)
    return short if vocab <= 1 << 16 else wide, short if seq < 1 << 16 else wide


def fill(
    windows: Any,
    tokenizer: "PreTrainedTokenizerFast",
    paths: tuple[Path, Path],
    seq: int,
    tokens: int,
    vocab: int,
    *,
    where: str,
) -> int:
    """Stream ceil(tokens / seq) records into two .npy files; returns the number of their tokens, padding apart.

    windows(after) -> iterator of (documents, place), as `corpus.windows`: after each, data and then a mark beside the
    files are on disk, so that a killed call goes on from there and ends with the same bytes. The files' whole size is
    taken at the start. Memory: one window of text. Errors as `pack`; OSError of a full disk.
    """
    count, kinds = math.ceil(tokens / seq), dtypes(seq, vocab)
    packer = Packer(tokenizer, seq, where, vocab)
    parts = [path.with_name(f".{path.name}.part") for path in paths]
    mark = parts[0].with_name(f".{paths[0].stem}.mark.json")
    if mark.is_file():
        state = json.loads(mark.read_text())
        packer.ids_R, packer.segments_R = (np.array(values, np.int32) for values in state["begun"])
    else:
        state = {"records": 0, "place": None, "tokens": None}
        for path, dtype in zip(parts, kinds):
            _create(path, dtype, (count, seq))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(p if p.is_file() else path, "r+b")) for p, path in zip(parts, paths)]
        bar = stack.enter_context(_bar(count * seq, where, state["records"] * seq))

        def write(blocks: tuple[np.ndarray, np.ndarray]) -> None:
            room = count - state["records"]
            for file, dtype, values_NT in zip(files, kinds, blocks):
                file.write(np.ascontiguousarray(values_NT[:room], dtype).data)
            state["records"] += min(room, len(blocks[0]))
            bar.update(min(room, len(blocks[0])) * seq)

        def save() -> None:
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            state["begun"] = [packer.ids_R.tolist(), packer.segments_R.tolist()]
            artifacts.write_text(mark, json.dumps(state))

        for file, dtype, path in zip(files, kinds, parts):
            file.seek(_start(file, path) + state["records"] * seq * dtype.itemsize)
        if state["tokens"] is None:
            for texts, place in windows(state["place"]):
                state["place"] = place
                for group in _groups(texts):
                    write(packer.add(group))
                    if state["records"] == count:
                        break
                if state["records"] == count:
                    break
                save()
            padding = 0
            if state["records"] < count:
                found = state["records"] * seq + len(packer.ids_R)
                _check_enough(found, tokens, where)
                padding = count * seq - found
                write(packer.finish())
            state["tokens"] = count * seq - padding
            save()
    for part, path in zip(parts, paths):
        if part.is_file():
            os.replace(part, path)
    return state["tokens"]


def forget_mark(paths: tuple[Path, Path]) -> None:
    """Remove the mark of a finished `fill`, once what depends on its files is on disk too."""
    paths[0].with_name(f".{paths[0].stem}.mark.json").unlink(missing_ok=True)


def copy_first(source: Path, target: Path, count: int) -> None:
    """The first `count` records of a file as a file of their own."""
    array = np.load(source, mmap_mode="r")
    part = target.with_name(f".{target.name}.part")
    _create(part, array.dtype, (count, array.shape[1]))
    with open(part, "r+b") as file:
        file.seek(_start(file, part))
        for start in range(0, count, 4096):
            file.write(np.ascontiguousarray(array[start : min(start + 4096, count)]).data)
    os.replace(part, target)


def _create(path: Path, dtype: np.dtype, shape: tuple[int, int]) -> None:
    """An .npy file of this shape with its disk blocks taken: a full disk is met now, not hours into the work."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        size = file.tell() + math.prod(shape) * dtype.itemsize
        file.truncate(size)
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except AttributeError:  # not on this system
            pass
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # not on this file system
                raise


def _start(file: Any, path: Path) -> int:
    file.seek(0)
    require(np.lib.format.read_magic(file) == (1, 0), f"{path}: not a file of records", DataError)
    np.lib.format.read_array_header_1_0(file)
    return file.tell()
