"""Text by domain -> tokenised, packed records -> batch(step).

In: a `DataConfig` and a fast tokenizer. Out: an artifact with `<domain>.<split>.ids.npy` and `.segments.npy` (int32
[records, seq]), opened as memory maps, and `Batches`, a pure function of the step number. Splits on disk are `train`,
`calibration` (the first records of the same train text) and `test`.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from readme_jax import artifacts
from readme_jax.config import ArtifactError, CheckpointError, DataError, SourceError, require
from readme_jax.corpus import DomainConfig, documents, first_line, source_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENISE = 1 << 18  # characters handed to the tokenizer at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Domains, the record length and how many tokens of each split every domain gives."""

    domains: dict[str, DomainConfig]
    """Name to source of every domain."""
    seq: int
    """Tokens of a record."""
    train_tokens: int
    """Tokens of the train split per domain; 0 writes none."""
    eval_tokens: int
    """Tokens of the test split per domain; 0 writes none."""
    calibration_tokens: int
    """Tokens for calibration per domain, the first of the train split (never of the test split); 0 writes none."""

    def __post_init__(self):
        require(bool(self.domains), "domains is empty; at least one is needed")
        for name in self.domains:
            ok = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name)
            require(bool(ok), f"domains.{name}: a domain name may hold letters, digits, - and _ only")
        require(self.seq >= 8, f"seq={self.seq} must be at least 8")
        for field in ("train_tokens", "eval_tokens", "calibration_tokens"):
            require(getattr(self, field) >= 0, f"{field}={getattr(self, field)} must be 0 or more")
        require(any(self.tokens.values()), "train_tokens, eval_tokens and calibration_tokens are all 0")
        require(any(d.weight for d in self.domains.values()), "domains: every weight is 0")

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens asked per domain, by the split's name on disk."""
        return {"train": self.train_tokens, "test": self.eval_tokens, "calibration": self.calibration_tokens}

    @property
    def weights(self) -> dict[str, float]:
        """Share of each domain in training; they need not sum to 1."""
        return {name: domain.weight for name, domain in self.domains.items()}


# ---- tokenizer --------------------------------------------------------------------------------


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a model folder, with its chat template; reads local files only.

    `tokenizer.json` is the whole tokenizer and is taken as it is: per-class loaders rebuild parts of it. Folders with
    only `tokenizer.model` or a vocabulary go through AutoTokenizer. CheckpointError when there is none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    require(folder.is_dir(), f"{folder}: no such folder (tokenizer)", CheckpointError)
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the loader raises whatever its parser raises, down to bare Exception
        raise CheckpointError(f"{folder}: no tokenizer can be loaded: {first_line(error)}") from None
    require(tokenizer.is_fast, f"{folder}: {type(tokenizer).__name__} is not a fast tokenizer", CheckpointError)
    return tokenizer


# ---- packed records ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Records:
    """Packed text of one domain and split: int32 ids_NT and segments_NT (0 = padding), memory-mapped when opened."""

    ids: np.ndarray
    segments: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def pack(
    docs: Iterable[str],
    tokenizer: "PreTrainedTokenizerFast",
    seq: int,
    tokens: int,
    *,
    where: str = "text",
    vocab: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise documents, one after the other, into ceil(tokens / seq) records: int32 ids_NT and segments_NT.

    A document is followed by the end-of-text token, or preceded by the begin token where the tokenizer itself adds
    one. Segment ids count 1, 2, ... anew in each record; a document that runs over a record's end goes on in the next
    as a new segment. Text beyond `tokens` fills the last record; only where there is none is it padded (segment 0).
    DataError, beginning with `where`, when there is no text, fewer tokens than asked, or a token id >= vocab.
    """
    require(tokens >= 1, f"{where}: tokens={tokens} must be at least 1")
    opening, closing = _document_marks(tokenizer)
    count = math.ceil(tokens / seq)
    size = count * seq
    ids_M, segments_M = np.zeros(size, np.int32), np.full(size, -1, np.int32)
    filled, document = 0, 0
    with _bar(size, where) as bar:
        for texts in _groups(docs):
            rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            for row in rows:
                row = np.asarray([*opening, *row, *closing][: size - filled], np.int64)
                if not row.size:
                    continue
                if vocab is not None and row.max() >= vocab:
                    raise DataError(f"{where}: token id {row.max()} does not fit the model's vocab={vocab}")
                ids_M[filled : filled + len(row)] = row
                segments_M[filled : filled + len(row)] = document
                filled, document = filled + len(row), document + 1
                bar.update(len(row))
            if filled == size:
                break
    require(document > 0, f"{where}: no text, {tokens} tokens asked", DataError)
    require(filled >= tokens, f"{where}: {filled} tokens, {tokens} asked", DataError)
    segments_NT = segments_M.reshape(count, seq)
    segments_NT -= segments_NT[:, :1] - 1
    segments_M[filled:] = 0
    return ids_M.reshape(count, seq), segments_NT


def _document_marks(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
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


def _bar(tokens: int, where: str) -> tqdm:
    return tqdm(total=tokens, desc=where, unit="tok", unit_scale=True, mininterval=0.1 if sys.stderr.isatty() else 30.0)


# ---- the artifact -----------------------------------------------------------------------------


def prepare(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    out: str | Path,
    vocab: int,
    *,
    parents: Mapping[str, Path] | None = None,
    resolved: Any = None,
) -> Path:
    """Tokenise and pack every domain into the artifact `out` (stage "data"); goes on after a kill, domain by domain.

    vocab: rows of the model's embedding, which the tokenizer has been checked against. resolved: the program's whole
    config, written beside the result. Sources are found (fallback text: fetched) before anything is written.
    ConfigError, SourceError, DataError or ArtifactError; a finished `out` of the same inputs is returned as it is.
    """
    out, parents = Path(out), dict(parents or {})
    if artifacts.finished(out, "data", config, parents):
        with contextlib.suppress(SourceError):  # text that has gone since does not make a finished result wrong
            same = artifacts.read_manifest(out)["info"]["inputs"] == _inputs(config, tokenizer, vocab)
            message = f"out={out} was made with another tokenizer or from files changed since; choose another folder"
            require(same, message, ArtifactError)
        return out
    for name, domain in config.domains.items():
        source_files(name, domain)
    inputs = _inputs(config, tokenizer, vocab)
    with artifacts.building(out, "data", config, parents, resolved=resolved) as work:
        mark = work.path / "inputs.json"
        if mark.is_file() and json.loads(mark.read_text()) != inputs:
            for stale in work.path.glob("*.*"):
                stale.unlink()
        artifacts.write_text(mark, json.dumps(inputs))
        work.info["inputs"] = inputs
        work.info["domains"] = {
            name: _prepare_domain(work.path, name, config, tokenizer, vocab) for name in config.domains
        }
    return out


def _inputs(config: DataConfig, tokenizer: "PreTrainedTokenizerFast", vocab: int) -> dict:
    """What the records depend on beside the config. Fallback text is pinned by hash where it is fetched."""
    named = {name: source_files(name, d) for name, d in config.domains.items() if d.source == "files"}
    return {
        "vocab": vocab,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "files": {name: [[p.name, p.stat().st_size] for p in paths] for name, paths in named.items()},
    }


def _prepare_domain(
    folder: Path, name: str, config: DataConfig, tokenizer: "PreTrainedTokenizerFast", vocab: int
) -> dict[str, dict[str, int]]:
    done = folder / f"{name}.info.json"
    if done.is_file():
        return json.loads(done.read_text())
    info = {}
    plan: tuple[tuple[Literal["train", "test"], tuple[str, ...]], ...]
    plan = (("train", ("train", "calibration")), ("test", ("test",)))
    for split, kept in plan:
        asked = {which: config.tokens[which] for which in kept if config.tokens[which]}
        if not asked:
            continue
        docs = documents(name, config.domains[name], split, piece=8 * config.seq)
        where = f"domain {name} ({split})"
        ids_NT, segments_NT = pack(docs, tokenizer, config.seq, max(asked.values()), where=where, vocab=vocab)
        for which, tokens in asked.items():
            count = math.ceil(tokens / config.seq)
            _save(folder / f"{name}.{which}.ids.npy", ids_NT[:count])
            _save(folder / f"{name}.{which}.segments.npy", segments_NT[:count])
            info[which] = {"records": count, "tokens": int(np.count_nonzero(segments_NT[:count]))}
    artifacts.write_text(done, json.dumps(info))
    return info


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)  # np.save loses the error number of a full disk
    os.replace(temporary, path)


def open_records(
    folder: str | Path, split: Literal["train", "calibration", "test"], vocab: int | None = None
) -> dict[str, Records]:
    """Memory-mapped records of one split by domain, in the config's order. ArtifactError or DataError (none there).

    vocab: rows of the embedding they will be read with; records made for more are a DataError.
    """
    folder = Path(folder)
    require(split in ("train", "calibration", "test"), f"split={split!r} is not one of train, calibration, test")
    manifest = artifacts.verify(folder)
    require(manifest["stage"] == "data", f"{folder}: stage {manifest['stage']!r}, not 'data'", ArtifactError)
    made_for = manifest["info"]["inputs"]["vocab"]
    require(
        vocab is None or made_for <= vocab,
        f"{folder}: its tokens are of a vocabulary of {made_for}, the model has vocab_size={vocab}",
        DataError,
    )
    found = {}
    for name in manifest["config"]["domains"]:
        paths = [folder / f"{name}.{split}.{kind}.npy" for kind in ("ids", "segments")]
        asked = {"train": "train_tokens", "test": "eval_tokens", "calibration": "calibration_tokens"}[split]
        require(paths[0].is_file(), f"{folder}: no {split} records; it was prepared with {asked}=0", DataError)
        found[name] = Records(*(np.load(path, mmap_mode="r") for path in paths))
    return found


# ---- batches ----------------------------------------------------------------------------------


class Batches:
    """Training batches as a pure function of the step: `batches[step]` is the same on any process, at any time.

    Each domain's records are shuffled anew in every epoch (all of them once before any twice), domains are mixed in
    the proportion of `weights`, and accum * batch records make a step. One step is a dict of int32 arrays:
    ids and segments [A, B, T] (A microbatches of B = batch records, segment 0 = padding), domains [A, B] (place of
    the domain in `records`) and index [A, B], a record's number over all domains, to look up what was cached for it.
    """

    def __init__(
        self,
        records: Mapping[str, Records],
        weights: Mapping[str, float],
        *,
        batch: int,
        accum: int = 1,
        seed: int = 0,
        seq: int | None = None,
    ):
        require(bool(records), "records: no domain", DataError)
        require(set(weights) == set(records), f"weights name {sorted(weights)}, the records {sorted(records)}")
        require(batch >= 1 and accum >= 1, f"batch={batch} and accum={accum} must be at least 1")
        require(0 <= seed < 2**32, f"seed={seed} must be in 0 .. 2**32 - 1")
        used = {name: weight for name, weight in weights.items() if weight > 0}
        require(bool(used) and min(weights.values()) >= 0, f"weights={dict(weights)} must be 0 or more, one above 0")
        lengths = {r.ids.shape[1] for r in records.values()}
        require(len(lengths) == 1, f"records of different lengths: {sorted(lengths)}", DataError)
        self.names, self.records, self.shape = tuple(records), tuple(records.values()), (accum, batch)
        self.seq = lengths.pop()
        require(seq in (None, self.seq), f"seq={seq}, the records were packed with {self.seq}")
        self.offsets = np.cumsum([0, *(len(r) for r in self.records)])
        self._steps = self._order(used, seed)

    def _order(self, weights: dict[str, float], seed: int):
        import grain

        parts = []
        for name in weights:
            at = self.names.index(name)
            require(len(self.records[at]) > 0, f"domain {name}: no records", DataError)
            # Seeded by name, so that one more domain leaves the others' order as it was.
            own = int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])
            numbers = grain.MapDataset.range(int(self.offsets[at]), int(self.offsets[at + 1]))
            parts.append(numbers.shuffle(seed=own).repeat())
        return grain.MapDataset.mix(parts, list(weights.values())).batch(math.prod(self.shape))

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        if step < 0:
            raise IndexError(f"step={step} must be 0 or more")
        index_M = np.asarray(self._steps[int(step)])
        domain_M = np.searchsorted(self.offsets, index_M, side="right") - 1
        ids_MT, segments_MT = (np.zeros((len(index_M), self.seq), np.int32) for _ in range(2))
        for at in np.unique(domain_M):
            here_M = domain_M == at
            rows = index_M[here_M] - self.offsets[at]
            ids_MT[here_M] = self.records[at].ids[rows]
            segments_MT[here_M] = self.records[at].segments[rows]
        return {
            "ids": ids_MT.reshape(*self.shape, self.seq),
            "segments": segments_MT.reshape(*self.shape, self.seq),
            "domains": domain_M.astype(np.int32).reshape(self.shape),
            "index": index_M.astype(np.int32).reshape(self.shape),
        }


def eval_batches(records: Mapping[str, Records], batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Every record once, in order, domain after domain: int32 ids, segments [B, T] and domains, index [B].

    A batch holds one domain. The last one of a domain is filled up with rows of segment 0, whose index is -1.
    """
    require(batch >= 1, f"batch={batch} must be at least 1")
    offset = 0
    for at, own in enumerate(records.values()):
        for start in range(0, len(own), batch):
            count = min(batch, len(own) - start)
            ids_BT, segments_BT = (np.zeros((batch, own.ids.shape[1]), np.int32) for _ in range(2))
            ids_BT[:count], segments_BT[:count] = own.ids[start : start + count], own.segments[start : start + count]
            index_B = np.full(batch, -1, np.int32)
            index_B[:count] = np.arange(offset + start, offset + start + count)
            domains_B = np.full(batch, at, np.int32)
            yield {"ids": ids_BT, "segments": segments_BT, "domains": domains_B, "index": index_B}
        offset += len(own)
