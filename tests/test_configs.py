"""Every option of every program is explained by its --help."""

import dataclasses
import importlib
import re
import typing

import pytest

from readme_jax.cli import STAGES

CLASSES = {"import": "Import", "data": "Prepare"} | {s: s.capitalize() for s in STAGES if s not in ("import", "data")}


def options(cls, prefix=""):
    """Dotted names of the fields of a config class, nested ones opened; domains and optional parts left out."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from options(hint, f"{name}.")
        elif not any(map(dataclasses.is_dataclass, typing.get_args(hint))):
            yield name


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_every_field(stage, capsys):
    program = importlib.import_module(STAGES[stage][0])
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    assert stop.value.code == 0
    # one line: tyro draws boxes and breaks lines
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert program.__doc__.splitlines()[0][:60] in shown and "--config FILE" in shown
    boxes = shown.split("show this help message and exit", 1)[1]
    names = list(options(getattr(program, f"{CLASSES[stage]}Config")))
    names += sorted(set(re.findall(r" --(data\.domains\.\S+)", boxes)))
    assert len(names) > 1
    for name in names:
        option = "--" + name.replace("_", "-")
        found = re.search(rf" {re.escape(option)}[ ,](.*?)\((?:default|required|optional)", boxes)
        assert found, f"{option} is not shown"
        # without the form of its value there must be words
        words = re.sub(r"^\[.*\]|\{\S+\}(\|\S+)?|\b[A-Z]{3,5}\b|--\S+", "", found[1])
        assert re.search("[a-z]{3,}", words), f"{option} is not explained"
