"""Training checkpoints: `{name: pure tree}` at an integer step, written while training goes on. The only file that
knows Orbax (v1).

Every process writes its own shards into `<root>/<step>`, reads back what it wrote and tells process 0 the size and
CRC-32 of each file. When it has those of all, process 0 adds `whole.json` with them: a folder without it, or that
differs from it, does not count. Whoever goes on from it shares the reading out anew, however many processes there were.
Root must be on a file system that all processes share.
"""

import concurrent.futures
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from orbax.checkpoint import v1 as ocp

from readme_jax import artifacts, distributed
from readme_jax.config import UNEXPECTED, CheckpointError, ReadMeError, require

MARK = "whole.json"
RETURNED = "returned.json"  # in the root: the run has gone back to its best checkpoint
# Orbax's names for what each process writes. Process 0 writes the rest: an index of arrays, and notes of a few bytes.
OWNED = re.compile(r"(?:^|/)(?:ocdbt\.|array_metadatas/)process_(\d+)(?:/|$)")
LASTING = (*artifacts.FULL, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EFBIG)
Sums = dict[str, list[int]]  # [bytes, CRC-32] of files, by relative name

# Its threads log a traceback of what is raised to us anyway, and that we say in one line.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread" not in record.getMessage())


class SaveError(ReadMeError):
    """A checkpoint that could not be written. The ones before it are whole. Without room or rights it is bad input
    (exit code 2); else it may pass, like a file system that does not answer, or a process is lost that writes too."""

    exit_code = UNEXPECTED


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When an unfinished run saves itself, and what it keeps. The end of each phase is always saved."""

    minutes: float = 5.0
    """Minutes between two checkpoints; 0: none by time."""
    steps: int = 0
    """Steps between two checkpoints; 0: none by steps."""
    keep: int = 2
    """The newest checkpoints that are kept. With 2 a damaged one costs the time between two."""
    keep_best: int = 0
    """Checkpoints kept beside them: those with the lowest expert loss, a mean over `window` expert steps."""
    window: int = 20
    """Expert steps whose mean loss stands for a checkpoint."""
    resume: Literal["newest", "best"] = "newest"
    """Which whole checkpoint an interrupted run goes on from. `best` (needs keep_best) drops the newer ones, once:
    later starts go on from the newest, or a run that is restarted over and over would never end. A start with
    `newest` lets the next one with `best` go back again."""

    def __post_init__(self):
        require(self.minutes >= 0, f"checkpoint.minutes={self.minutes} must not be negative")
        require(self.steps >= 0, f"checkpoint.steps={self.steps} must not be negative")
        require(self.keep >= 1, f"checkpoint.keep={self.keep} must be at least 1")
        require(self.keep_best >= 0, f"checkpoint.keep_best={self.keep_best} must not be negative")
        require(self.window >= 1, f"checkpoint.window={self.window} must be at least 1")
        best = self.resume == "newest" or self.keep_best > 0
        require(best, "checkpoint.resume=best needs checkpoint.keep_best of at least 1")


class Checkpoints:
    """Checkpoints of one run below `root`. Every process of the run makes the same calls in the same order."""

    def __init__(self, root: Path, keep: int = 2, keep_best: int = 0):
        self._root, self._keep, self._keep_best = Path(root).absolute(), keep, keep_best
        self._finishing: threading.Thread | None = None
        self._error: Exception | None = None
        self._last: int | None = None
        self._damaged: set[int] = set()

    def find(self, resume: Literal["newest", "best"] = "newest") -> int | None:
        """Step of the newest (or best) whole checkpoint, None when there is none; a warning names those skipped.

        Left-overs of a kill are cleared. With `best`, checkpoints after it are dropped: the run goes back to it, and
        that is noted. From then on `best` is the newest too, until a call with `newest` forgets the note.
        """
        return self._first(resume, lambda step: damage(self._root / str(step)))

    def resume(self, resume: Literal["newest", "best"], like: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Step and content of the checkpoint that `find` takes, or of the next one where that cannot be read; 0 and
        `like` when there is none. CheckpointError when there are whole ones and none can be read as `like`."""
        found: list[dict[str, Any]] = []
        unread: list[str] = []

        def wrong(step: int) -> str:
            why = damage(self._root / str(step))
            if not why:
                try:
                    found[:] = [self.restore(step, like)]
                except CheckpointError as error:
                    why = f"{error}"
                why = next(filter(None, distributed.everyone(why)), "")
                unread.extend([why] if why else [])
            return why

        step = self._first(resume, wrong)
        if step is not None:
            return step, found[0]
        require(not unread, f"{self._root}: no checkpoint can be read: {unread[:1]}", CheckpointError)
        return 0, like

    def _first(self, resume: str, wrong: Callable[[int], str]) -> int | None:
        self._last = None
        candidates, back = distributed.on_main(lambda: self._candidates(resume))
        for step in candidates:
            why = wrong(step)
            if not why:
                self._last = step
                break
            self._damaged.add(step)
            if distributed.is_main():
                print(f"warning: checkpoint {step} is skipped: {why}", file=sys.stderr, flush=True)
        if back and self._last is not None:
            distributed.on_main(lambda: self._go_back(self._last))
        return self._last

    def _candidates(self, resume: str) -> tuple[list[int], bool]:
        """Steps to try, the first first, and whether the run then goes back to the one it takes."""
        if not self._root.is_dir():
            return [], False
        for path in self._root.iterdir():
            if not path.name.isdigit() and path.is_dir():  # what Orbax or `_remove` had in hand
                shutil.rmtree(path, ignore_errors=True)
        note = self._root / RETURNED
        if resume == "newest":
            note.unlink(missing_ok=True)
        back = resume == "best" and not note.is_file()
        candidates = sorted(self._steps(), reverse=True)
        if back:
            scores = {step: score for step in candidates if (score := self._score(step)) is not None}
            best = sorted(scores, key=lambda step: (scores[step], -step))
            candidates = [*best, *(step for step in candidates if step not in scores)]
            back = bool(scores)
        return candidates, back

    def save(self, step: int, trees: dict[str, Any], score: float | None = None) -> None:
        """Begin to write a checkpoint; waits for the one before it and for a copy of the arrays on the host.

        The caller may donate the arrays at once. score: what `keep_best` ranks by, lower is better. SaveError when the
        one before could not be written.
        """
        self.wait()
        if step == self._last:
            return
        path, probe = self._root / str(step), self._root / f".probe-{jax.process_index()}"
        try:
            # Tried here first: where Orbax cannot make its folder, threads of it keep the process alive for 300 s.
            probe.mkdir(parents=True, exist_ok=True)
            probe.rmdir()
            with _options(), jax.transfer_guard("allow"):  # its processes agree by way of the devices
                response = ocp.save_checkpointables_async(path, trees, overwrite=True)
        except Exception as error:  # a full disk raises what TensorStore makes of it
            raise _unsaved(step, error) from None
        self._last = step
        self._finishing = threading.Thread(target=self._finish, args=(response, step, score))
        self._finishing.start()

    def _finish(self, response: Any, step: int, score: float | None) -> None:
        folder = self._root / str(step)
        try:
            response.result()  # of all processes: the folder has its name
            told = distributed.aside(own_sums(folder))
            if told is not None:
                seal(folder, told, score)
                self._damaged.discard(step)
                self._prune()
        except Exception as error:
            self._error = _unsaved(step, error)

    def wait(self) -> None:
        """Until the last `save` is on disk, whole. SaveError when it could not be written."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        if self._error is not None:
            error, self._error, self._last = self._error, None, None
            raise error

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Read a checkpoint with the shapes, dtypes and shardings of `like` (arrays already placed).

        CheckpointError when it is not there or holds something else.
        """

        def abstract(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        try:
            return ocp.load_checkpointables(self._root / str(step), jax.tree.map(abstract, like))
        except (ValueError, KeyError, FileNotFoundError, ocp.errors.InvalidLayoutError) as error:
            raise CheckpointError(f"checkpoint {step}: {_short(error)}") from None

    def close(self) -> None:
        """Wait for what is being written."""
        self.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # When one process of several fails, the others do not come to finish a checkpoint with it.
        if kind is None or jax.process_count() == 1:
            self.close()

    # ---- process 0 only

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self._root.iterdir() if path.name.isdigit() and path.is_dir()]

    def _go_back(self, step: int | None) -> None:
        for later in self._steps():
            if step is not None and later > step:
                self._remove(later)
        # last: a kill before it repeats the above
        artifacts.write_text(self._root / RETURNED, json.dumps({"step": step}))

    def _score(self, step: int) -> float | None:
        mark = _read_mark(self._root / str(step))
        return None if mark is None else mark["score"]

    def _prune(self) -> None:
        whole = sorted(
            step for step in self._steps() if step not in self._damaged and _read_mark(self._root / str(step))
        )
        scores = {step: score for step in whole if (score := self._score(step)) is not None}
        kept = {*whole[-self._keep :], *sorted(scores, key=lambda step: (scores[step], -step))[: self._keep_best]}
        for step in self._steps():
            if step not in kept:
                self._remove(step)

    def _remove(self, step: int) -> None:
        # Renamed first: a kill half-way through leaves nothing that looks like a damaged checkpoint.
        path, gone = self._root / str(step), self._root / f".removed-{step}"
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _options() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_compression = False  # trained floats do not shrink: three times faster without
    return context


def _unsaved(step: int, error: Exception) -> SaveError:
    unsaved = SaveError(f"checkpoint {step} cannot be written: {_short(error)}")
    if any(os.strerror(number) in str(error) for number in LASTING):
        unsaved.exit_code = ReadMeError.exit_code
    return unsaved


def _short(error: Exception, most: int = 300) -> str:
    """An error's text in one line; of a long one the beginning and the end, where the cause stands."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def checksums(folder: Path, names: Iterable[str]) -> Sums:
    """[bytes, CRC-32] of the named files below a folder."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: _checksum(folder / name), names)))


def _checksum(path: Path) -> list[int]:
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return [path.stat().st_size, value]


def _names(folder: Path) -> list[str]:
    names = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return [name for name in names if name != MARK]


def written_by(folder: Path, process: int, processes: int) -> list[str]:
    """Relative names of the files of a checkpoint that one process of the run wrote, the mark left out."""

    def owner(name: str) -> int:
        found = OWNED.search(name)
        return int(found[1]) if found and int(found[1]) < processes else 0

    return [name for name in _names(folder) if owner(name) == process]


def own_sums(folder: Path) -> Sums | str:
    """Of the files that this process wrote, or why there are none: process 0 learns of that too, and does not wait."""
    try:
        return checksums(folder, written_by(folder, distributed.rank(), distributed.count()))
    except OSError as error:
        return f"{error}"


def seal(folder: Path, told: Sequence[Sums | str], score: float | None = None) -> None:
    """Declare a checkpoint whole, of which each process has told `own_sums`. OSError when one could not."""
    files: Sums = {}
    for process, sums in enumerate(told):
        if isinstance(sums, str):
            raise OSError(f"process {process}: {sums}")
        files |= sums
    files |= checksums(folder, [name for name in _names(folder) if name not in files])  # none, but nothing is left out
    artifacts.write_text(folder / MARK, json.dumps({"score": score, "files": files}))


def _read_mark(folder: Path) -> dict[str, Any] | None:
    """The mark of a checkpoint; None when it is missing or no mark."""
    try:
        mark = json.loads((folder / MARK).read_text())
        good = isinstance(mark["score"], float | int | None) and bool(mark["files"])
        good = good and all(len(entry) == 2 for entry in mark["files"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return mark if good else None


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in a few words with the name of the file; empty when it is whole.

    All processes call it, each reads a share of the files, and all get the same answer.
    """
    files, why = distributed.on_main(lambda: _listed(folder))
    if why:
        return why
    mine = shares(files, distributed.count())[distributed.rank()]
    found = distributed.everyone(_differs(folder, {name: files[name] for name in mine}))
    return next(filter(None, found), "")


def _listed(folder: Path) -> tuple[Sums, str]:
    """The files of a checkpoint as its mark lists them, and what is wrong as far as is seen without reading them."""
    mark = _read_mark(folder)
    if mark is None:
        return {}, f"{folder}: it was not written to its end ({MARK} is missing)"
    for name, (size, _) in mark["files"].items():
        path = folder / name
        if not path.is_file():
            return {}, f"{path}: missing"
        if path.stat().st_size != size:
            return {}, f"{path}: {path.stat().st_size} bytes, {size} were written"
    return mark["files"], ""


def shares(files: Sums, processes: int) -> list[list[str]]:
    """Names of the files that each process reads: about equal bytes, and every file once."""
    parts: list[list[str]] = [[] for _ in range(processes)]
    taken = [0] * processes
    for name in sorted(files, key=lambda name: (-files[name][0], name)):
        least = taken.index(min(taken))
        parts[least].append(name)
        taken[least] += files[name][0]
    return parts


def _differs(folder: Path, files: Sums) -> str:
    """The first of some files that is not as it was written, in words; empty for none."""
    try:
        found = checksums(folder, files)
    except OSError as error:
        return f"{folder}: it cannot be read: {error}"
    wrong = next((name for name in files if found[name] != files[name]), None)
    return "" if wrong is None else f"{folder / wrong}: its checksum differs from when it was written"
