"""The launch scripts with stand-ins for gcloud and SLURM: what is started, with which arguments, and how often."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "train" / "launch"
WORDS = ["--wandb", "two words", "it's", '$HOME "x"']
# A run whose starts end with the codes in `codes`, one a line; a code with a star finishes a checkpoint before.
PROGRAM = """#!/usr/bin/env bash
printf '%s\\n' "$@" > arguments
echo start >> starts
code=$(sed -n "$(wc -l < starts)p" codes)
if [[ $code == *\\* ]]; then
  mkdir -p "runs/.tuned.partial/checkpoints/$(wc -l < starts)"
  echo {} > "runs/.tuned.partial/checkpoints/$(wc -l < starts)/whole.json"
fi
echo said
exit ${code%\\*}
"""
# gcloud: a command that is meant for a worker runs here; the machine has HOSTS hosts.
GCLOUD = """#!/usr/bin/env bash
case "$*" in
*describe*) for i in $(seq "$HOSTS"); do echo "  \\"ipAddress\\": \\"10.0.0.$i\\","; done ;;
*) cd ~ && while [ "$1" != --command ]; do shift; done && exec bash -c "$2" ;;
esac
"""


@pytest.fixture
def place(tmp_path):
    """A home with the stand-ins, and the environment that finds them."""
    home, bin = tmp_path / "home", tmp_path / "bin"
    work = home / "work"
    for folder in (bin, work, home / "venv" / "bin", home / "readme-jax" / "train"):
        folder.mkdir(parents=True)
    (home / "readme-jax" / "train" / "launch").symlink_to(LAUNCH)
    scripts = {
        home / "venv" / "bin" / "readme-jax": PROGRAM,
        bin / "gcloud": GCLOUD,
        bin / "srun": '#!/usr/bin/env bash\nshift 2\nexec ~/venv/bin/readme-jax "$@"\n',
        bin / "scontrol": "#!/usr/bin/env bash\necho queued >> queued\n",
    }
    for path, text in scripts.items():
        path.write_text(text)
        path.chmod(0o755)
    env = {"PATH": f"{bin}:{os.environ['PATH']}", "HOME": str(home), "NAME": "n", "ZONE": "z", "WORK": str(work)}
    return work, env | {"HOSTS": "1", "WAIT": "0", "SLURM_JOB_ID": "7"}


def launch(script: str, *words: str, place, cwd: Path | None = None, **more: str):
    work, env = place
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words], env=env | more, cwd=cwd, capture_output=True, text=True, timeout=60
    )


def starts(work: Path) -> int:
    return len((work / "starts").read_text().splitlines())


@pytest.mark.parametrize(
    ("codes", "code", "count"),
    [
        ("0", 0, 1),
        ("2", 2, 1),
        ("75", 75, 1),
        ("76 137 0", 0, 3),
        ("70 70 70 70 70 0", 70, 5),
        ("70 70 70 70 76* 70 70 70 70 0", 0, 10),
        ("1 1 1 1* 1 1 1 1 1 1", 1, 9),
    ],
)
def test_restarts_are_bounded(place, codes, code, count):
    work, _ = place
    (work / "codes").write_text("\n".join(codes.split()) + "\n")
    ended = launch("restart.sh", "../venv/bin/readme-jax", *WORDS, place=place, cwd=work)
    assert (ended.returncode, starts(work)) == (code, count)
    assert (work / "arguments").read_text().splitlines() == WORDS
    assert ("finished no checkpoint" in ended.stderr) == (code in (70, 1))


def test_stopped_ends_restarts(place):
    work, env = place
    (work / "codes").write_text("76\n0\n")
    (Path(env["HOME"]) / "stopped").touch()
    ended = launch("restart.sh", "../venv/bin/readme-jax", place=place, cwd=work)
    assert (ended.returncode, starts(work)) == (75, 1)


def test_one_stage_on_a_machine_of_one_host(place):
    work, _ = place
    (work / "codes").write_text("3\n")
    ended = launch("tpu_vm.sh", "one", "calibrate", *WORDS, place=place)
    assert ended.returncode == 3 and "said" in ended.stdout
    assert (work / "arguments").read_text().splitlines() == ["calibrate", *WORDS]


def test_run_keeps_words_and_restarts(place):
    work, env = place
    (work / "codes").write_text("76\n0\n")
    os.mkfifo(work / "done")  # `run` returns at once: the program's last start tells that it is there
    program = Path(env["HOME"]) / "venv" / "bin" / "readme-jax"
    program.write_text(PROGRAM.replace("exit ", '[ "$code" != 0 ] || echo done > done\nexit '))
    ended = launch("tpu_vm.sh", "run", "alternate", *WORDS, place=place, HOSTS="4")
    assert ended.returncode == 0, ended.stderr
    assert (work / "done").read_text() == "done\n" and starts(work) == 2
    assert (work / "arguments").read_text().splitlines() == ["alternate", *WORDS]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "calibrate"], "run starts alternate on every host; calibrate is one process: use one"),
        (["one", "calibrate"], "n has 4 hosts, calibrate is one process: take a machine of one host"),
        (["one", "alternate"], "alternate is started by run"),
    ],
    ids=str,
)
def test_what_cannot_work_is_not_started(place, words, message):
    ended = launch("tpu_vm.sh", *words, place=place, HOSTS="4")
    assert ended.returncode == 2 and message in ended.stderr and not (place[0] / "starts").exists()


def test_slurm_queues_again_within_bounds(place):
    work, _ = place
    (work / "codes").write_text("75\n70\n76\n70*\n75\n70\n137\n70\n76\n70\n2\n")
    queued = []
    for _ in range(11):
        launch("slurm.sbatch", "a b.yaml", place=place, cwd=work)
        queued.append((work / "queued").exists())
        (work / "queued").unlink(missing_ok=True)
    assert queued == [True] * 9 + [False] * 2
    assert (work / "arguments").read_text().splitlines() == ["alternate", "--config", "a b.yaml"]
    assert not list(work.glob(".slurm*"))
