"""Every stage run once on the tiny checkpoint, in process, for all tests of a session (both workers of `-n 2`)."""

import dataclasses
import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
import yaml
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache

from readme_jax import hf
from readme_jax.train import alternate, calibrate, carve, import_hf, prepare

SEQ = 32
ONE = ["--mesh.data", "1"]


@dataclasses.dataclass(frozen=True)
class Stages:
    """Folders of the stages: results are read by many tests and changed by none."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    def yaml(self, name: str, out: Path, **changes) -> str:
        """Path of a new YAML for `data` or `alternate` that writes to `out`; changes by dotted key, `a__b` for a.b."""
        files = sorted((self.root / "text").glob("*.jsonl"))
        config = {
            "data": {
                "model": self.dense,
                "data": {
                    "seq": SEQ,
                    "train_tokens": 1200,
                    "eval_tokens": 160,
                    "calibration_tokens": 320,
                    "domains": {p.stem: {"source": "files", "path": str(p)} for p in files},
                },
            },
            "alternate": {
                "model": self.carved,
                "data": self.data,
                "rounds": 2,
                "router": {"steps": 2, "batch": 2, "shape": {"width": 16, "heads": 2}, "optim": {"lr": 1e-2}},
                "experts": {"steps": 2, "batch": 2, "optim": {"lr": 2e-3}},
                "mesh": {"data": 1},
            },
        }[name] | {"out": out}
        for dotted, value in changes.items():
            *path, last = dotted.split("__")
            inner = functools.reduce(lambda d, key: d.setdefault(key, {}), path, config)
            inner[last] = value
        path = Path(out).with_suffix(f".{name}.yaml")
        path.write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str))))
        return str(path)

    def alternate(self, out: Path, **changes) -> Path:
        """Run `alternate` with changes to the run of `tuned`."""
        alternate.main(["--config", self.yaml("alternate", out, **changes)])
        return out


def _build(s: Stages) -> None:
    tiny.write_model(s.source)
    tiny.write_text(s.text)
    import_hf.main(["--source", str(s.source), "--out", str(s.dense)])
    prepare.main(["--config", s.yaml("data", s.data)])
    calibrate.main(["--model", str(s.dense), "--data", str(s.data), "--out", str(s.statistics), *ONE])
    cut = ["--model", str(s.dense), "--statistics", str(s.statistics)]
    carve.main([*cut, "--out", str(s.carved)])
    carve.main([*cut, "--out", str(s.static), "--carving", "static", "--importance", "energy"])
    s.alternate(s.tuned)


@pytest.fixture(scope="session")
def stages(tmp_path_factory) -> Stages:
    """The shared run."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    # Programs make their jitted functions anew: what one run compiled, the next one reads.
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", 1 << 30)  # only with a limit the cache locks its files
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        compilation_cache.reset_cache()
    found = Stages(root / "stages")
    with FileLock(root / "stages.lock"):
        if not (found.root / "done").exists():
            _build(found)
            (found.root / "done").touch()
    return found


def jitted(function, like=None):
    """A plain function in the place of a jitted one: compiled ahead as `like`, or, for nothing, not at all."""
    function.lower = getattr(like, "lower", lambda *_: SimpleNamespace(compile=lambda: None))
    return function


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a model folder by its Hugging Face name."""
    reader = hf.Reader(folder)
    return {name: np.array(reader.get(name)) for name in reader.names()}


def differing(first: Path, second: Path) -> set[str]:
    """Names of the tensors that two folders do not have bit-equal."""
    a, b = weights(first), weights(second)
    return {n for n in a.keys() | b.keys() if n not in a or n not in b or not np.array_equal(a[n], b[n])}


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder: path to content, None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
