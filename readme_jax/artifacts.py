"""A stage's output folder: built beside its final name, closed by a manifest, renamed whole.

A folder with `manifest.json` is finished; without one it does not exist. The manifest holds what made the folder
(stage, config, versions, parents) and the size and sha256 of every file in it.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from readme_jax.config import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    DataError,
    SourceError,
    require,
    save_yaml,
    to_dict,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MANIFEST = "manifest.json"
MARK = "run.json"  # in an unfinished folder: whose it is
LOCK = "run.lock"  # in an unfinished folder: held by the process that works in it
FULL = (errno.ENOSPC, errno.EDQUOT)
MEASURED = ("timing.jsonl", "profile", "tensorboard", "wandb")  # never twice the same, so no part of an identity
BIG = 64 << 20  # bytes: a file from here on is not read again while its times are those of when it was hashed


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _sha256_all(paths: Sequence[Path]) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the lock
        return list(pool.map(sha256, paths))


def _times(path: Path) -> list[int]:
    """When a file's bytes and its entry last changed (ns). Whoever sets the first back changes the second."""
    stat = path.stat()
    return [stat.st_mtime_ns, stat.st_ctime_ns]


def content(folder: Path) -> dict[str, list]:
    """Size, time of change (ns) and sha256 of the files of a model folder that an import reads, by name."""
    paths = list(_model_files(folder).values())
    stats = [path.stat() for path in paths]
    return {p.name: [s.st_size, s.st_mtime_ns, digest] for p, s, digest in zip(paths, stats, _sha256_all(paths))}


def _model_files(folder: Path) -> dict[str, Path]:
    kinds = (".safetensors", ".json", ".model", ".txt", ".jinja")
    return {p.name: p for p in sorted(Path(folder).iterdir()) if p.is_file() and p.suffix in kinds}


def changed(folder: Path, then: dict[str, list]) -> str:
    """Name of the first file that is not as `content` saw it, "" for none. A new time alone is no change: only then
    is the file read."""
    now = _model_files(folder)
    for name in sorted(now.keys() | then.keys()):
        if name not in now or name not in then:
            return name
        stat, (size, time, digest) = now[name].stat(), then[name]
        if stat.st_size != size or (stat.st_mtime_ns != time and sha256(now[name]) != digest):
            return name
    return ""


def fingerprint(config: Any, parents: dict[str, Path]) -> str:
    """Identity of a result: its config and the content of its parents. Where they lie and where it goes is left out."""
    heads = {name: parent_identity(path) for name, path in sorted(parents.items())}
    fields = {key: value for key, value in result_fields(config).items() if key not in parents}
    text = json.dumps({"config": fields, "parents": heads}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parent_identity(path: Path) -> str:
    """What stands for a parent folder in a fingerprint: its files' hashes, so a copy elsewhere is the same parent."""
    files = {n: entry for n, entry in read_manifest(path)["files"].items() if Path(n).parts[0] not in MEASURED}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def result_fields(config: Any) -> dict[str, Any]:
    """The fields that decide the result, by name: not where it goes, nor what `config.free` marks."""
    spare = {"out"}
    if dataclasses.is_dataclass(config):
        spare |= {field.name for field in dataclasses.fields(config) if field.metadata.get("free")}
    return {key: value for key, value in to_dict(config).items() if key not in spare}


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "readme-jax", "torch")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a finished folder; ArtifactError when there is none or it cannot be read."""
    path = Path(folder) / MANIFEST
    require(path.is_file(), f"{folder}: not a finished result ({MANIFEST} is missing)", ArtifactError)
    return _read_json(path, "files")  # cached text has a manifest too, of fewer keys


def _read_json(path: Path, *keys: str) -> dict:
    """A JSON object with these keys at least; ArtifactError for anything else."""
    try:
        data = json.loads(path.read_text())
    except ValueError:  # not JSON, not UTF-8
        raise ArtifactError(f"{path}: not valid JSON; the result was damaged") from None
    whole = isinstance(data, dict) and all(key in data for key in keys)
    whole = whole and all(isinstance(data.get(key, {}), dict) for key in ("config", "files", "info"))
    require(whole, f"{path}: must be an object with {', '.join(keys)}; the result was damaged", ArtifactError)
    return data


def verify(folder: str | Path, *, hashes: bool | Literal["changed"] = False) -> dict:
    """Check that every file of the manifest is there with its size. Returns the manifest; ArtifactError names the file.

    hashes True: every file is read and its sha256 compared. "changed": a file of BIG or more bytes is read only when
    its times are not those the manifest noted, so that each stage after a 140 GB model does not read it once more.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    noted = manifest.get("times", {}) if hashes == "changed" else {}
    doubtful = []
    for name, entry in manifest["files"].items():
        path = folder / name
        require(path.is_file(), f"{path}: listed in {MANIFEST} but missing", ArtifactError)
        size = path.stat().st_size
        require(size == entry["bytes"], f"{path}: {size} bytes, the manifest says {entry['bytes']}", ArtifactError)
        if hashes and (name not in noted or noted[name] != _times(path)):
            doubtful.append(name)
    for name, digest in zip(doubtful, _sha256_all([folder / name for name in doubtful])):
        same = digest == manifest["files"][name]["sha256"]
        require(same, f"{folder / name}: sha256 differs from the manifest", ArtifactError)
    return manifest


def finished(folder: str | Path, stage: str, config: Any, parents: dict[str, Path]) -> bool:
    """True when `folder` holds the whole result of this stage, config and parents; False when it does not exist.

    A folder that is there but belongs to another run raises ArtifactError: nothing is ever overwritten.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    require(folder.is_dir(), f"out={folder} is a file, a folder is needed", ArtifactError)
    require(
        (folder / MANIFEST).is_file(),
        f"out={folder} is not empty and was not made by readme-jax; choose another folder",
        ArtifactError,
    )
    _read_json(folder / MANIFEST, "stage", "fingerprint", "config", "info", "files")
    manifest = verify(folder)
    mine = {"stage": stage, "fingerprint": fingerprint(config, parents), "config": result_fields(config)}
    other = _difference(manifest, mine, parents)
    require(not other, f"out={folder} belongs to another run ({other}); choose another folder", ArtifactError)
    kept = {Path(name).parts[0] for name in manifest["files"]} | {MANIFEST}
    _remove(folder, [p.name for p in folder.iterdir() if p.name in manifest.get("scratch", ()) and p.name not in kept])
    return True


def _difference(made: dict, mine: dict, parents: dict[str, Path]) -> str:
    """What sets a run (its stage, config, fingerprint) apart from this one, `mine`; "" for nothing."""
    if made["stage"] == mine["stage"] and made["fingerprint"] == mine["fingerprint"]:
        return ""
    old, new, stage = made["config"], mine["config"], mine["stage"]
    for key in sorted(new, key=lambda key: key in parents):  # paths of inputs last: they may differ and not matter
        if made["stage"] == stage and old.get(key) != new[key]:
            name, there, here = innermost(key, old.get(key), new[key])
            return f"stage {stage}, {name}={there!r} there, {here!r} here"
    return f"stage {made['stage']}, other inputs"


def innermost(name: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    """Dotted name and values of the first field in which two values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *there]:
            if there.get(key) != here.get(key):
                return innermost(f"{name}.{key}".strip("."), there.get(key), here.get(key))
    return name, there, here


@dataclasses.dataclass
class Work:
    """A result under construction. `path` is where files go; `info` ends up in the manifest.

    `scratch` names files and folders in `path` that only the work itself needs: they are no part of the result, and
    are removed once it is whole, so that a kill while it is being finished loses nothing (`finished` removes the rest).
    `kept`: set when something is done that a later start can go on from; from then on no error removes it.
    """

    path: Path
    info: dict[str, Any]
    scratch: list[str] = dataclasses.field(default_factory=list)
    kept: bool = False


@contextlib.contextmanager
def building(
    folder: str | Path, stage: str, config: Any, parents: dict[str, Path], *, resolved: Any = None
) -> Iterator[Work]:
    """Build `folder` beside itself (`.<name>.partial`); on a clean exit hash, write the manifest, rename whole.

    The parents' hashes are checked first. The partial folder survives a kill, and the same run goes on from what it
    finds there; one of another run raises ArtifactError, since hours of work may lie in it. Bad input leaves nothing
    of a folder begun here, unless work of it is `kept`. A full disk leaves no result, but what was kept, and raises
    ArtifactError. So does a second process that would work in the same folder.
    `resolved`: what config.yaml holds, where a program's whole config is more than `config`.
    """
    for parent in parents.values():
        verify(parent, hashes="changed")
    folder = Path(folder)
    partial = folder.parent / f".{folder.name}.partial"
    mine = {"stage": stage, "fingerprint": fingerprint(config, parents), "config": result_fields(config)}
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial)
    except OSError as error:
        raise _refusal(folder, error, "nothing was written") from None
    try:
        yield from _build(folder, partial, mine, config if resolved is None else resolved, parents)
    finally:
        lock.close()


def _build(folder: Path, partial: Path, mine: dict, config: Any, parents: dict[str, Path]) -> Iterator[Work]:
    mark = partial / MARK
    fresh = not mark.is_file()  # killed before its mark was written: nothing else is there yet
    if not fresh:
        other = _difference(_read_json(mark, "stage", "fingerprint", "config"), mine, parents)
        advice = f"an unfinished result of another run is in {partial}; choose another out, or remove that folder"
        require(not other, f"{advice} ({other})", ArtifactError)
    work = Work(partial, {}, kept=not fresh)
    try:
        if fresh:
            write_text(mark, json.dumps(mine))
        yield work
        save_yaml(config, partial / "config.yaml")
        scratch = [MARK, LOCK, *work.scratch]
        names = [str(p.relative_to(partial)) for p in sorted(partial.rglob("*")) if p.is_file() and p.name != MANIFEST]
        found = {name: partial / name for name in names if Path(name).parts[0] not in scratch}
        times = {name: _times(path) for name, path in found.items() if path.stat().st_size >= BIG}
        digests = _sha256_all(list(found.values()))
        files = {n: {"bytes": p.stat().st_size, "sha256": d} for (n, p), d in zip(found.items(), digests)}
        manifest = {
            **mine,
            "parents": {name: str(path) for name, path in parents.items()},
            "versions": versions(),
            "info": work.info,
            "files": files,
            "times": times,
            "scratch": scratch,
        }
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
        if folder.exists():
            folder.rmdir()
        os.rename(partial, folder)
        _remove(folder, scratch)
    except (ConfigError, SourceError, CheckpointError, DataError, ArtifactError):
        if not work.kept:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        if not work.kept and error.errno in FULL:
            shutil.rmtree(partial, ignore_errors=True)
        state = f"what is done so far is kept in {partial}" if work.kept else "nothing was written"
        raise _refusal(folder, error, state) from None


def _lock(partial: Path) -> IO:
    """The lock of a folder under construction, to be closed; ArtifactError while another process holds it.

    The system lets go of it when the process ends, however it ends. A file system without locks protects nothing.
    """
    file = open(partial / LOCK, "w")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ArtifactError(f"{partial}: another process is working in it") from None
        except OSError:
            pass
    return file


def _refusal(folder: Path, error: OSError, state: str) -> Exception:
    """The error to raise when the system does not let a result be written."""
    if error.errno in FULL:
        return ArtifactError(f"out={folder}: the disk is full; {state}")
    if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
        return ArtifactError(f"out={folder}: cannot be written ({os.strerror(error.errno)})")
    return error


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files and folders in a folder, those that are there."""
    for path in (folder / name for name in names):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all: temporary name, flush to disk, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
