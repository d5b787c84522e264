"""Text by domain -> tokenised, packed records -> batch(step).

In: a `DataConfig` and a fast tokenizer. Out: an artifact with `<domain>.<split>.ids.npy` and `.segments.npy`
([records, seq]), opened as memory maps, and `Batches`, a pure function of the step number. Splits on disk are `train`,
`calibration` (the first records of the same train text) and `test`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import mmap
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from readme_jax import artifacts
from readme_jax.config import ArtifactError, CheckpointError, DataError, SourceError, require
from readme_jax.corpus import DomainConfig, documents, first_line, source_files, windows
from readme_jax.packing import KINDS, Records, copy_first, fill, forget_mark, pack, record_paths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "Batches",
    "DataConfig",
    "DomainConfig",
    "Records",
    "documents",
    "eval_batches",
    "load_tokenizer",
    "open_records",
    "pack",
    "prepare",
]

FORGET = 1 << 27  # bytes of records read at random that stay mapped, and count as this process's memory


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
                if stale.name not in (artifacts.MARK, artifacts.LOCK):
                    stale.unlink()
        artifacts.write_text(mark, json.dumps(inputs))
        work.info["inputs"] = inputs
        made = work.info["domains"] = {}
        try:
            for name in config.domains:
                made[name] = _prepare_domain(work.path, name, config, tokenizer, vocab)
        except (OSError, SourceError):
            work.kept |= bool(made)  # the text is not to blame: what is there serves the next start
            raise
    return out


def _inputs(config: DataConfig, tokenizer: "PreTrainedTokenizerFast", vocab: int) -> dict:
    """What the records depend on beside the config. Fallback text is pinned by hash where it is fetched."""
    named = {name: source_files(name, d) for name, d in config.domains.items() if d.source == "files"}

    def stamp(path: Path) -> list:
        return [path.name, path.stat().st_size, path.stat().st_mtime_ns]

    return {
        "vocab": vocab,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "files": {
            name: [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in paths] for name, paths in named.items()
        },
    }


def _prepare_domain(
    folder: Path, name: str, config: DataConfig, tokenizer: "PreTrainedTokenizerFast", vocab: int
) -> dict[str, dict[str, int]]:
    done, info = folder / f"{name}.info.json", {}
    domain, seq = config.domains[name], config.seq
    plan: tuple[tuple[Literal["train", "test"], tuple[str, ...]], ...]
    plan = (("train", ("train", "calibration")), ("test", ("test",)))
    streamed = []
    for split, kept in plan:
        asked = {which: config.tokens[which] for which in kept if config.tokens[which]}
        if not asked:
            continue
        widest = max(asked, key=lambda which: asked[which])
        paths = record_paths(folder, name, widest)
        streamed.append(paths)
        if done.is_file():
            continue
        source = functools.partial(windows, name, domain, split, piece=8 * seq)
        where = f"domain {name} ({split})"
        tokens = fill(lambda after, w=source: w(after=after), tokenizer, paths, seq, asked[widest], vocab, where=where)
        for which in asked:
            count = math.ceil(asked[which] / seq)
            if which != widest:
                for source_path, path in zip(paths, record_paths(folder, name, which)):
                    copy_first(source_path, path, count)
            info[which] = {"records": count, "tokens": min(tokens, count * seq)}
    if not done.is_file():
        artifacts.write_text(done, json.dumps(info))
    for paths in streamed:
        forget_mark(paths)
    return json.loads(done.read_text())


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
        paths = record_paths(folder, name, split)
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
    No list of records is held: memory does not depend on how many there are.
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
        require(self.offsets[-1] < 2**31, f"{self.offsets[-1]} records do not fit into int32 numbers", DataError)
        self._order = self._mix(used, seed)
        self._mapped = 0  # bytes of pages read since they were last let go
        for own in self.records:
            own.advise("MADV_RANDOM")

    def _mix(self, weights: dict[str, float], seed: int):
        import grain

        parts = []
        for name in weights:
            at = self.names.index(name)
            require(len(self.records[at]) > 0, f"domain {name}: no records", DataError)
            # Seeded by name, so that one more domain leaves the others' order as it was.
            own = int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])
            numbers = grain.MapDataset.range(int(self.offsets[at]), int(self.offsets[at + 1]))
            parts.append(numbers.shuffle(seed=own).repeat())
        return grain.MapDataset.mix(parts, list(weights.values()))

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.rows(step, 0, self.shape[1])

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start .. stop - 1 of every microbatch of a step, as `batches[step]` has them; no other row is read."""
        index_AB = self.index(step, start, stop)
        domains_AB = np.searchsorted(self.offsets, index_AB, side="right") - 1
        return self.take(index_AB) | {"domains": domains_AB.astype(np.int32), "index": index_AB}

    def index(self, step: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int32 [A, stop - start]: the numbers of a step's records (stop None: all rows); nothing of them is read."""
        accum, batch = self.shape
        stop = batch if stop is None else stop
        if step < 0 or not 0 <= start < stop <= batch:
            raise IndexError(f"step={step} must be 0 or more, rows {start} .. {stop} lie in 0 .. {batch}")
        places_AB = (int(step) * accum + np.arange(accum)[:, None]) * batch + np.arange(start, stop)
        return np.array([self._order[int(place)] for place in places_AB.flat], np.int32).reshape(places_AB.shape)

    def take(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """ids and segments, int32 [..., T], of records by their number over all domains, int [...]."""
        index_M = np.asarray(index).reshape(-1)
        at_M = np.searchsorted(self.offsets, index_M, side="right") - 1
        ids_MT, segments_MT = (np.zeros((len(index_M), self.seq), np.int32) for _ in KINDS)
        for at in np.unique(at_M):
            here_M = at_M == at
            ids_MT[here_M], segments_MT[here_M] = self.records[at].take(index_M[here_M] - self.offsets[at])
        own = self.records[0]
        self._mapped += len(index_M) * sum(a.itemsize * self.seq + mmap.PAGESIZE for a in (own.ids, own.segments))
        if self._mapped > FORGET:
            for own in self.records:
                own.advise("MADV_DONTNEED")
            self._mapped = 0
        shape = (*np.shape(index), self.seq)
        return {"ids": ids_MT.reshape(shape), "segments": segments_MT.reshape(shape)}


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
            ids_BT[:count], segments_BT[:count] = own.take(slice(start, start + count))
            index_B = np.full(batch, -1, np.int32)
            index_B[:count] = np.arange(offset + start, offset + start + count)
            domains_B = np.full(batch, at, np.int32)
            yield {"ids": ids_BT, "segments": segments_BT, "domains": domains_B, "index": index_B}
        offset += len(own)
