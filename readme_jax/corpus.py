"""Raw text of one domain: hub data sets (streamed), local files or the fallback domains -> documents by split.

The split is decided by the hash of the text, never by its place in the source, so train, valid and test cannot share
a document and a rerun of any stage sees the same division.
"""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from readme_jax.config import DataError, SourceError, require

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".txt", ".md")
MANY = 100  # documents: from here on whole documents are split, below it pieces (5 % of fewer may well be none)
PIECE = 4096  # characters of a piece where pieces are split; fixed, so that the split is the same for every run
WINDOW = {"files": 64_000_000, "fallback": 64_000_000, "hub": 4_000_000}  # characters ordered by hash at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """Where one domain's text comes from. Train, valid and test are made here, by document hash."""

    source: Literal["fallback", "hub", "files"]
    """`files` on this machine, a `hub` data set (streamed), or the `fallback` text of packages."""
    path: str = ""
    """files: a .json, .jsonl, .parquet, .arrow, .txt or .md file (.txt and .md are one document), a folder of them, a
    glob, or a folder of `Dataset.save_to_disk`; hub: a `datasets` name, streamed; fallback: a domain of the quickstart,
    by default the one of this name."""
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
    for texts, _ in windows(domain_name, domain, split, piece=piece):
        yield from texts


def windows(
    domain_name: str,
    domain: DomainConfig,
    split: Literal["train", "valid", "test"],
    *,
    piece: int = PIECE,
    after: dict[str, Any] | None = None,
) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """`documents`, one WINDOW of the source at a time, each with the place in the source where the next one begins.

    after: such a place (plain JSON): the windows that follow it. What lies before is skipped without being split,
    put in order or, where the source can seek (streams of `datasets`), read. Memory: one window.
    """
    require(split in ("train", "valid", "test"), f"split={split!r} is not one of train, valid, test")
    after = after or {"few": None, "rows": 0, "windows": 0}
    source = _Source(domain_name, domain, after)
    units: Iterator[tuple[int, str]] = iter(source)
    few, number = after["few"], 0
    if few is not False:  # where is not known, or all of it is read again: it is small
        head = list(itertools.islice(units, MANY))
        few = len(head) < MANY
        units = (
            ((rows, part) for rows, text in head for part in cut(text, PIECE))
            if few
            else iter(itertools.chain(head, units))
        )
    pending, read, rows = [], 0, 0

    def window(rows: int) -> Iterator[tuple[list[str], dict[str, Any]]]:
        if not few or number > after["windows"]:
            place = {"few": few, "rows": rows, "windows": number}
            yield [part for _, part in sorted(pending)], place | source.state(rows)

    for rows, text in units:
        if _split_of(text) == split:
            pending += [(_digest(part), part) for part in cut(text, piece)]
        read += len(text)
        if read >= WINDOW[domain.source]:
            number += 1
            yield from window(rows)
            pending, read = [], 0
    number += 1
    yield from window(rows if few else source.rows)


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


class _Source:
    """Texts that are not blank, each with the number of rows read so far; begins after the rows of a place."""

    def __init__(self, domain_name: str, domain: DomainConfig, after: dict[str, Any]):
        self.name, self.domain, self.rows, self.skip = domain_name, domain, 0, after["rows"] * (not after["few"])
        self.stream = None
        if domain.source == "hub":
            self.stream = _hub_stream(domain_name, domain)
            if "stream" in after:
                self.stream.load_state_dict(after["stream"])
                self.rows = self.skip

    def __iter__(self) -> Iterator[tuple[int, str]]:
        found = _file_rows(self.name, self.domain) if self.stream is None else _hub_rows(self)
        for place, row in found:
            self.rows += 1
            if self.rows > self.skip:
                text = _text(f"domain {self.name}: {place}", row, self.domain.field)
                if text.strip():
                    yield self.rows, text

    def state(self, rows: int) -> dict[str, Any]:
        """Where a stream goes on after `rows`; nothing for files, or when rows beyond have been read already."""
        state_dict = getattr(self.stream, "state_dict", None)
        return {"stream": state_dict()} if state_dict is not None and self.rows == rows else {}


def _text(where: str, row: Any, field: str) -> str:
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON: {error.msg}") from None
    has = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) else ""
    require(isinstance(row, dict) and field in row, f"{where}: field {field!r} is missing{has}", DataError)
    text = row[field]
    message = f"{where}: field {field!r} is {type(text).__name__}, not text"
    require(text is None or isinstance(text, str), message, DataError)
    return text or ""


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
    several = (root / "dataset_dict.json").is_file()
    require(not several, f"domain {domain_name}: path={domain.path} holds several splits; name one of its folders")
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        files = _saved_files(domain_name, root)
    elif root.is_dir():
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


def _saved_files(domain_name: str, root: Path) -> list[Path]:
    """The arrow files of a folder that `Dataset.save_to_disk` wrote, in their order."""
    try:
        files = [root / entry["filename"] for entry in json.loads((root / "state.json").read_text())["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"domain {domain_name}: {root / 'state.json'}: not of a saved data set") from None
    for path in files:
        require(path.is_file(), f"domain {domain_name}: {path}: listed in state.json but missing", SourceError)
    return files


def _file_rows(domain_name: str, domain: DomainConfig) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row; a line of JSON comes as text, so that skipped ones are not parsed."""
    for path in source_files(domain_name, domain):
        place = str(path)
        try:
            if path.suffix in (".parquet", ".arrow"):
                yield from ((place, row) for row in _table_rows(domain_name, path, domain.field))
            elif path.suffix in (".txt", ".md"):
                yield place, {domain.field: path.read_text("utf-8")}
            elif path.suffix == ".json" and not _is_lines(path):
                data = json.loads(path.read_text("utf-8"))
                whole = data if isinstance(data, list) else [data]
                yield from ((f"{place} item {i}", row) for i, row in enumerate(whole))
            else:
                with open(path, encoding="utf-8") as file:
                    yield from ((f"{path} line {i}", line) for i, line in enumerate(file, 1) if line.strip())
        except json.JSONDecodeError as error:
            raise DataError(f"domain {domain_name}: {place}: not JSON: {error.msg}") from None
        except UnicodeDecodeError:
            raise DataError(f"domain {domain_name}: {path}: not UTF-8 text") from None
        except OSError as error:
            raise SourceError(f"domain {domain_name}: {path}: cannot be read: {error.strerror or error}") from None


def _is_lines(path: Path) -> bool:
    """True when a .json file holds one object a line (it is then read line by line), False for a list or one object."""
    with open(path, encoding="utf-8") as file:
        lines = (line for line in file if line.strip())
        try:
            return isinstance(json.loads(next(lines, "[]")), dict) and next(lines, None) is not None
        except json.JSONDecodeError:
            return False


def _table_rows(domain_name: str, path: Path, field: str) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        with contextlib.ExitStack() as stack:
            if path.suffix == ".parquet":
                file = stack.enter_context(pyarrow.parquet.ParquetFile(path))
                columns = file.schema_arrow.names
                batches = file.iter_batches(batch_size=1024, columns=[field] if field in columns else [])
            else:
                mapped = stack.enter_context(pyarrow.memory_map(str(path)))
                batches = stack.enter_context(pyarrow.ipc.open_stream(mapped))
                columns = batches.schema.names
            if field not in columns:
                yield dict.fromkeys(columns)
                return
            for rows in batches:
                yield from rows.select([field]).to_pylist()
    except pyarrow.ArrowException as error:
        kind = path.suffix[1:]
        raise DataError(f"domain {domain_name}: {path}: not a readable {kind} file: {first_line(error)}") from None


def _hub_place(domain: DomainConfig) -> str:
    return f"hub data set {domain.path} ({domain.name + ', ' if domain.name else ''}{domain.split})"


def _hub_stream(domain_name: str, domain: DomainConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(domain.path, domain.name, split=domain.split, streaming=True)
    except Exception as error:  # network, authentication and format errors share no base class there
        message = f"domain {domain_name}: {_hub_place(domain)} cannot be read: {first_line(error)}"
        raise SourceError(message) from None


def _hub_rows(source: _Source) -> Iterator[tuple[str, Any]]:
    place = _hub_place(source.domain)
    try:
        for row in source.stream or ():
            yield place, row
    except Exception as error:
        raise SourceError(f"domain {source.name}: {place} cannot be read: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """The first line of an error's message: what a one-line error of ours can quote."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
