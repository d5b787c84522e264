"""Every stage from the command line on a tiny model and local text, each a process, with a kill -9 in training.

python tests/end_to_end.py FOLDER [SITE]

FOLDER: where to work. SITE: the folder that readme_jax must come from (an installed wheel). Prints each figure checked
and ends with the number of checks; exit code 1 when one fails.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tiny
import yaml

ENV = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
COMMAND = [sys.executable, "-c", "from readme_jax.cli import main; main()"]
passed = 0


def check(ok: bool, what: str) -> None:
    """Count a check, or stop."""
    global passed
    if not ok:
        sys.exit(f"FAILED: {what}")
    passed += 1
    print(f"ok: {what}", flush=True)


def stage(*words: object) -> str:
    """Run one stage to its end; its standard output."""
    done = subprocess.run([*COMMAND, *map(str, words)], env=ENV, capture_output=True, text=True)
    check(done.returncode == 0, f"readme-jax {words[0]}" + (f": {done.stderr[-800:]}" if done.returncode else ""))
    return done.stdout


def killed(after: Path, *words: object) -> None:
    """Start a stage and kill it (SIGKILL) once the file or folder `after` has appeared."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, words)], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not after.exists():
        time.sleep(0.02)
    check(process.poll() is None, f"{words[0]} was still running when it was killed")
    process.send_signal(signal.SIGKILL)
    process.wait()


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a model folder."""
    from readme_jax import hf

    reader = hf.Reader(folder)
    return {name: np.array(reader.get(name)) for name in reader.names()}


def main(root: Path, site: Path | None) -> None:
    """The run."""
    import readme_jax

    where = Path(readme_jax.__file__).resolve()
    check(site is None or site.resolve() in where.parents, f"readme_jax comes from {where.parents[1]}")
    root.mkdir(parents=True, exist_ok=True)
    tiny.write_model(root / "source")
    texts = tiny.write_text(root / "text")
    domains = {name: {"source": "files", "path": str(path)} for name, path in texts.items()}
    data = {"seq": 64, "train_tokens": 2000, "eval_tokens": 300, "calibration_tokens": 600, "domains": domains}
    runs = {
        "data": {"model": root / "dense", "out": root / "data", "data": data},
        "alternate": {
            "model": root / "carved",
            "data": root / "data",
            "out": root / "tuned",
            "rounds": 3,
            "router": {"steps": 6, "batch": 4, "shape": {"width": 32, "heads": 2}, "optim": {"lr": 2e-3}},
            "experts": {"steps": 6, "batch": 2, "optim": {"lr": 2e-3}},
        },
    }
    for name, config in runs.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str))))

    stage("import", "--source", root / "source", "--out", root / "dense")
    before, after = weights(root / "source"), weights(root / "dense")
    check(all(before[n].tobytes() == after[n].tobytes() for n in before), "imported tensors are byte-equal")
    stage("data", "--config", root / "data.yaml")
    stage("calibrate", "--model", root / "dense", "--data", root / "data", "--out", root / "statistics")
    stage("carve", "--model", root / "dense", "--statistics", root / "statistics", "--out", root / "carved")

    whole = ["alternate", "--config", root / "alternate.yaml", "--out", root / "uninterrupted"]
    stage(*whole)
    killed(root / ".tuned.partial" / "checkpoints" / "12", "alternate", "--config", root / "alternate.yaml")
    printed = stage("alternate", "--config", root / "alternate.yaml")
    check("resumed at step" in printed, printed.splitlines()[0])
    first, second = weights(root / "uninterrupted"), weights(root / "tuned")
    check(first.keys() == second.keys(), "the same tensors")
    check(all(np.array_equal(first[n], second[n]) for n in first), "killed and resumed ends bit-equal to uninterrupted")

    evaluate = ["evaluate", "--model", root / "tuned", "--data", root / "data", "--out", root / "evaluation"]
    stage(*evaluate, "--arms", "dense", "own_domain", "routed")
    result = json.loads((root / "evaluation" / "evaluation.json").read_text())
    check(all(np.isfinite(v) for v in result["mean_loss"].values()), f"mean loss {result['mean_loss']}")
    printed = stage("generate", "--model", root / "tuned", "--prompts", "one two three", "red", "--max-new-tokens", 8)
    check(printed.count("> ") == 2, "two prompts of different lengths generate")
    printed = stage("export", "--model", root / "tuned", "--out", root / "exported")
    check('"expert_mismatches": 0' in printed and '"greedy_mismatches": 0' in printed, "export equals PyTorch")
    print(f"{passed} passed, 0 failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
