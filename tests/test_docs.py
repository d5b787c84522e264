"""What the documents tell people to type: every command parses, every script is sound, every file named is there."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from readme_jax import cli

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "train" / "launch").iterdir())]
TEXTS += sorted((ROOT / "configs").rglob("*.yaml"))


def commands():
    """(file, words) of every `readme-jax STAGE ...` that is written to be typed, at the start of a line or a phrase,
    and of every stage that tpu_vm.sh is told to start."""
    for path in TEXTS:
        text = path.read_text().replace("\\\n", " ")
        stages = "|".join(cli.STAGES)
        before = r"(?:^|`|&& |# +)readme-jax|tpu_vm\.sh (?:one|run)"
        for found in re.finditer(rf"(?:{before}) ((?:{stages}) [^`\n]+)", text, re.M):
            line = re.split(r"  +\(|\s+#|\s\"\$", found[1])[0]
            yield pytest.param(shlex.split(line), id=f"{path.relative_to(ROOT)}: {line}"[:90])


class Parsed(Exception):
    """The options were good."""


@pytest.mark.parametrize("words", commands())
def test_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    named = [word for word in words if word.endswith(".yaml")]
    if any(not Path(name).exists() and not name.startswith("configs/") for name in named):
        words = [words[0], "--help"]  # of a file that the reader is to write
    parse = cli.parse

    def parsed(*args, **options):
        parse(*args, **options)
        raise Parsed

    monkeypatch.setattr(cli, "parse", parsed)
    if any(word in ("...", "--help") for word in words):
        words = [words[0], "--help"]
    with pytest.raises((Parsed, SystemExit)) as ended:
        cli.dispatch(words)
    assert ended.type is Parsed or ended.value.code == 0


def test_commands_are_found():
    assert len(list(commands())) > 20, "a test of nothing"


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sbatch", "restart.sh"])
def test_scripts_are_sound(name):
    path = ROOT / "train" / "launch" / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    told = subprocess.run(["bash", str(path)], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert told.returncode != 0, "nothing is started by accident"


def test_jobset_agrees_with_itself():
    jobset = yaml.safe_load((ROOT / "train" / "launch" / "gke-jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    chips = container["resources"]["limits"]["google.com/tpu"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert job["parallelism"] == job["completions"]
    assert job["completions"] * chips == int(sides[0]) * int(sides[1]) * int(sides[2])
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    mesh = yaml.safe_load((ROOT / container["command"][-1]).read_text())["mesh"]
    assert mesh["data"] * mesh["expert"] * mesh["model"] == job["completions"] * chips


def test_files_that_are_named_are_there():
    for path in TEXTS[:3]:
        for name in re.findall(r"(?:configs|benchmarks|train|tests|docs)/[\w./-]*\w", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name} names {name}"
