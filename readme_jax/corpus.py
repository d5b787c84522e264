"""Raw text of one domain: hub data sets (streamed), local files or the fallback domains -> documents by split.

The split is decided by the hash of the text, never by its place in the source, so train, valid and test cannot share
a document and a rerun of any stage sees the same division.
"""

import dataclasses
import glob
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from readme_jax.config import DataError, SourceError, require

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".md")
MANY = 100  # documents: from here on whole documents are split, below it pieces (5 % of fewer may well be none)
PIECE = 4096  # characters of a piece where pieces are split; fixed, so that the split is the same for every run
WINDOW = {"files": 64_000_000, "fallback": 64_000_000, "hub": 4_000_000}  # characters ordered by hash at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """Where one domain's text comes from. Train, valid and test are made here, by document hash."""

    source: Literal["fallback", "hub", "files"]
    """`files` on this machine, a `hub` data set (streamed), or the `fallback` text of packages."""
    path: str = ""
    """files: a .json, .jsonl, .parquet, .txt or .md file (.txt and .md are one document), a folder of them, or a glob;
    hub: a `datasets` name; fallback: a domain of the quickstart, by default the one of this name."""
    name: str | None = None
    """Configuration of the hub data set."""
    split: str = "train"
    """Split of the hub data set that is read."""
    field: str = "text"
    """Column that holds the text."""
    weight: float = 1.0
    """Share of the domain in training; shares need not sum to 1."""

    def __post_init__(self):
        require(self.source in WINDOW, f"source={self.source!r} is not one of {', '.join(sorted(WINDOW))}")
        require(bool(self.path) or self.source == "fallback", f"path is empty; source={self.source} needs one")
        require(math.isfinite(self.weight) and self.weight >= 0, f"weight={self.weight} must be 0 or more")
        require(bool(self.field), "field is empty; it names the column that holds the text")


def documents(
    domain_name: str, domain: DomainConfig, split: Literal["train", "valid", "test"], *, piece: int = PIECE
) -> Iterator[str]:
    """Text of one split of a domain, in an order that mixes the whole corpus. Strings of at most `piece` characters.

    The sha1 of a document's text puts it into train (90 %), valid (5 %) or test (5 %), whatever its place in the
    source. A domain of fewer than MANY documents (a few books) is first cut at paragraphs into pieces of PIECE
    characters, and each piece is split like a document. Otherwise documents are split whole and cut afterwards, so
    that a long one does not fill a small sample alone. Pieces come in the order of their hash within a WINDOW of the
    source, so a corpus below that size gives the same sequence in any order of its documents.
    Raises SourceError or DataError, naming the domain.
    """
    require(split in ("train", "valid", "test"), f"split={split!r} is not one of train, valid, test")
    texts = (text for text in _texts(domain_name, domain) if text.strip())
    head = list(itertools.islice(texts, MANY))
    few = len(head) < MANY
    units = (part for text in head for part in cut(text, PIECE)) if few else itertools.chain(head, texts)
    yield from _by_hash(units, split, WINDOW[domain.source], piece)


def _by_hash(units: Iterable[str], split: str, window: int, piece: int) -> Iterator[str]:
    pending, read = [], 0
    for text in units:
        if _split_of(text) == split:
            pending += [(_digest(part), part) for part in cut(text, piece)]
        read += len(text)
        if read >= window:
            yield from (part for _, part in sorted(pending))
            pending, read = [], 0
    yield from (part for _, part in sorted(pending))


def _digest(text: str) -> bytes:
    return hashlib.sha1(text.encode("utf-8", "replace")).digest()


def _split_of(text: str) -> str:
    # The last bytes: documents are put in order by the first ones, which then say nothing of the split.
    bucket = int.from_bytes(_digest(text)[-4:], "big") % 100
    return "train" if bucket < 90 else "valid" if bucket < 95 else "test"


def cut(text: str, size: int) -> list[str]:
    """Cut text into pieces of at most `size` characters that join to it again.

    Each piece ends at the last paragraph break of its second half; failing that at a line break, a space, or anywhere.
    """
    pieces, start = [], 0
    while len(text) - start > size:
        for mark in ("\n\n", "\n", " "):
            at = text.rfind(mark, start + size // 2, start + size)
            if at >= 0:
                end = at + len(mark)
                break
        else:
            end = start + size
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _texts(domain_name: str, domain: DomainConfig) -> Iterator[str]:
    rows = _hub_rows(domain_name, domain) if domain.source == "hub" else _file_rows(domain_name, domain)
    for place, row in rows:
        require(
            isinstance(row, dict) and domain.field in row,
            f"domain {domain_name}: {place}: field {domain.field!r} is missing"
            + (f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) else ""),
            DataError,
        )
        text = row[domain.field]
        if text is not None:
            message = f"domain {domain_name}: {place}: field {domain.field!r} is {type(text).__name__}, not text"
            require(isinstance(text, str), message, DataError)
            yield text


def source_files(domain_name: str, domain: DomainConfig) -> list[Path]:
    """The local files of a domain, sorted: fetched for `fallback`, none for `hub`. SourceError or ConfigError."""
    if domain.source == "hub":
        return []
    if domain.source == "fallback":
        from readme_jax import sources

        key = domain.path or domain_name
        found = sources.fetch_domains([key])
        require(key in found, f"domain {domain_name}: no fallback domain {key!r}", SourceError)
        return [found[key]]
    root = Path(domain.path).expanduser()
    if root.is_dir():
        files = [p for p in root.rglob("*") if p.is_file() and p.suffix in SUFFIXES]
    else:
        files = [p for p in map(Path, glob.glob(str(root), recursive=True)) if p.is_file()]
    require(bool(files), f"domain {domain_name}: path={domain.path} matches no file", SourceError)
    for path in files:
        require(
            path.suffix in SUFFIXES,
            f"domain {domain_name}: {path}: unsupported suffix {path.suffix!r}; use one of {', '.join(SUFFIXES)}",
        )
    return sorted(files)


def _file_rows(domain_name: str, domain: DomainConfig) -> Iterator[tuple[str, Any]]:
    for path in source_files(domain_name, domain):
        place = str(path)
        try:
            if path.suffix == ".parquet":
                yield from ((place, row) for row in _parquet_rows(domain_name, path, domain.field))
            elif path.suffix in (".txt", ".md"):
                yield place, {domain.field: path.read_text("utf-8")}
            elif path.suffix == ".json" and (whole := _whole_json(path)) is not None:
                yield from ((f"{place} item {i}", row) for i, row in enumerate(whole))
            else:
                with open(path, encoding="utf-8") as file:
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            place = f"{path} line {number}"
                            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"domain {domain_name}: {place}: not JSON: {error.msg}") from None
        except UnicodeDecodeError:
            raise DataError(f"domain {domain_name}: {path}: not UTF-8 text") from None
        except OSError as error:
            raise SourceError(f"domain {domain_name}: {path}: cannot be read: {error.strerror or error}") from None


def _whole_json(path: Path) -> list | None:
    """The list (or the one object) a .json file holds; None when it holds one object a line."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise
    return data if isinstance(data, list) else [data]


def _parquet_rows(domain_name: str, path: Path, field: str) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                yield dict.fromkeys(columns)
                return
            for rows in file.iter_batches(batch_size=1024, columns=[field]):
                yield from rows.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"domain {domain_name}: {path}: not a readable parquet file: {first_line(error)}") from None


def _hub_rows(domain_name: str, domain: DomainConfig) -> Iterator[tuple[str, Any]]:
    import datasets

    place = f"hub data set {domain.path} ({domain.name + ', ' if domain.name else ''}{domain.split})"
    try:
        rows = datasets.load_dataset(domain.path, domain.name, split=domain.split, streaming=True)
        for row in rows:
            yield place, row
    except Exception as error:  # network, authentication and format errors share no base class there
        raise SourceError(f"domain {domain_name}: {place} cannot be read: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """The first line of an error's message: what a one-line error of ours can quote."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
