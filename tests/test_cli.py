"""The command line: YAML below options, one line and exit code 2 on any user error, help for every option."""

import dataclasses
import errno
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from readme_jax import cli
from readme_jax.carve import CarveConfig
from readme_jax.config import ConfigError, DataError, PeerError, Stopped, require, save_yaml


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """Learning settings."""

    lr: float = 1.0e-4
    """Learning rate at step 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    model: Path
    """Folder of the model."""
    steps: int = 5
    """Optimizer steps."""
    kind: Literal["a", "b"] = "a"
    """Which of two ways."""
    optim: Inner = Inner()

    def __post_init__(self):
        require(self.steps >= 1, f"steps={self.steps} must be at least 1")


def test_options_override_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    save_yaml(Config(model=Path("m"), steps=7, optim=Inner(lr=3e-4)), path)
    for argv in (["--config", str(path)], [f"--config={path}"]):
        config = cli.parse(Config, [*argv, "--optim.lr", "2e-5", "--kind", "b"], "A run.")
        assert config == Config(model=Path("m"), steps=7, kind="b", optim=Inner(lr=2e-5))
    assert cli.parse(Config, ["--model", "x"], "A run.") == Config(model=Path("x"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "m", "--step", "3"], "Unrecognized options: --step"),
        (["--model", "m", "--steps", "many"], "Error parsing --steps: .*'many'"),
        (["--model", "m", "--kind", "c"], "invalid choice 'c' for argument '--kind'"),
        (["--model", "m", "--steps", "0"], "steps=0 must be at least 1"),
        ([], "--model"),
        (["--config"], "--config: needs a file"),
        (["--config", "a", "--config=b"], r"--config: given twice \(a, b\)"),
        (["--config", "/does/not/exist.yaml"], "/does/not/exist.yaml: no such config file"),
    ],
)
def test_bad_options_raise_one_line(argv, message, capsys):
    with pytest.raises(ConfigError, match=message) as caught:
        cli.parse(Config, argv, "A run.")
    assert "\n" not in str(caught.value) and "│" not in str(caught.value)
    assert capsys.readouterr().err == ""


def test_unknown_yaml_key_names_file_and_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nstepz: 3\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: stepz: no such key; known keys: model, steps, kind, optim"):
        cli.parse(Config, ["--config", str(path)], "A run.")


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(CarveConfig, ["--help"], "Carve experts.", prog="readme-jax carve")
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert out.startswith("usage: readme-jax carve") and "--config FILE" in out
    for field in dataclasses.fields(CarveConfig):
        assert f"--{field.name}" in out
    for text in ("Share of the FFN channels", "Folder of the activation statistics", "Weight of a domain"):
        assert text in out


def test_run_prints_one_line_and_exits_2(capsys):
    def main(argv):
        raise DataError(f"domain {argv[0]}:\n  812 tokens, 4096 asked")

    with pytest.raises(SystemExit) as stop:
        cli.run(main, ["news"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: domain news: 812 tokens, 4096 asked\n"
    assert cli.run(lambda argv: 3, []) is None


@pytest.mark.parametrize("kind, code, head", [(PeerError, 76, "error: "), (Stopped, 75, "")])
def test_ends_with_a_code_of_their_own(kind, code, head, capsys):
    def main(argv):
        raise kind("words")

    with pytest.raises(SystemExit) as stop:
        cli.run(main, [])
    assert stop.value.code == code and capsys.readouterr().err == f"{head}words\n"


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KeyError("w_up"), 70, "KeyError: 'w_up'"),
        (OSError(errno.EIO, "Input/output error", "records.bin"), 70, "records.bin: Input/output error"),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 2, "out: No space left on device"),
        (OSError("no tokenizer"), 2, "no tokenizer"),
        (MemoryError("800 GB"), 2, "out of memory: 800 GB"),
    ],
)
def test_what_may_pass_is_told_from_bad_input(error, code, line, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main, [])
    *before, last = capsys.readouterr().err.splitlines()
    assert stop.value.code == code and last == f"error: {line}"
    assert bool(before) == isinstance(error, KeyError), "only of what nobody foresaw it is shown where it came from"


def test_stages(monkeypatch, capsys):
    def console(*argv):
        monkeypatch.setattr(sys, "argv", ["readme-jax", *argv])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr()
        return 0, capsys.readouterr()

    code, text = console("--help")
    assert code == 0
    lines = [line.split()[0] for line in text.out.splitlines() if line.startswith("  ")]
    assert lines == [
        "quickstart",
        "import",
        "data",
        "calibrate",
        "carve",
        "masks",
        "separate",
        "plan",
        "alternate",
        "evaluate",
        "study",
        "tasks",
        "generate",
        "bench",
        "simulate",
        "export",
    ]

    code, text = console("--version")
    assert code == 0 and text.out[0].isdigit()

    code, text = console("carv")
    assert code == 2 and text.err.startswith("error: carv: no such stage; one of quickstart, import")
    assert text.err.count("\n") == 1

    code, text = console()
    assert code == 2 and text.err.startswith("error: no stage given")

    code, text = console("carve", "--model", "/none", "--statistics", "/none", "--out", "/none", "--fraction", "0")
    assert code == 2 and text.err == "error: fraction=0.0 must be above 0 and at most 1\n"


def test_help_loads_no_jax():
    code = "import sys; from readme_jax import cli; cli.dispatch(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
