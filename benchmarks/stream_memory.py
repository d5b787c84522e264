"""Peak memory of importing and carving a random 1.1 B-parameter Llama, above its own size in bf16.

    python benchmarks/stream_memory.py --json memory.json

Both stages stream, so the figure is interpreter, libraries, one shard and one layer: it must stay under 1.5 GB. Each
runs as the command a user types, in a child process; the peak is the child's largest resident set. Needs 7 GB of disk
under the temporary folder for the time of the run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from readme_jax import artifacts, hf
from readme_jax.carve import Statistics, save_statistics

LIMIT_GB = 1.5
DOMAINS = 7
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def write_model(folder: Path) -> int:
    """A random model of SHAPE in bf16 shards, tensor by tensor; returns its bytes."""
    folder.mkdir()
    artifacts.write_text(folder / "config.json", json.dumps(SHAPE))
    cfg, rng, size = hf.read_config(folder)[0], np.random.default_rng(0), 0
    with hf.Writer(folder, 512 << 20) as writer:
        for entry in hf.table(cfg):
            for name in entry.names():
                values = np.ones(entry.hf_shape) if "norm" in name else rng.normal(0, 0.02, entry.hf_shape)
                writer.add(name, values.astype(ml_dtypes.bfloat16))
                size += 2 * values.size
    return size


def write_statistics(folder: Path) -> None:
    """Random activation statistics of DOMAINS domains, as `calibrate` leaves them."""
    shape = (DOMAINS, SHAPE["num_hidden_layers"], SHAPE["intermediate_size"])
    rng = np.random.default_rng(1)
    arrays = {f"{name}_MLF": rng.random(shape, np.float32) for name in ("abs", "square", "mean", "share")}
    names = tuple(f"domain{i}" for i in range(DOMAINS))
    with artifacts.building(folder, "calibrate", {}, {}) as work:
        save_statistics(Statistics(names=names, **arrays, tokens_M=np.full(DOMAINS, 1000)), work.path)


def peak_gb(*arguments: str) -> float:
    """Peak resident set, in 1e9 bytes, of one stage run as a command; SystemExit when it fails."""
    command = [sys.executable, "-c", "from readme_jax.cli import dispatch, run; run(dispatch)", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(child.pid, 0)  # of this child alone, where RUSAGE_CHILDREN is the largest of all
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"readme-jax {' '.join(arguments)} failed with exit code {child.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def measure() -> dict[str, float]:
    """Size and peaks in 1e9 bytes. `import_peak_over_bf16_gb` is the larger peak less the size: under LIMIT_GB."""
    with tempfile.TemporaryDirectory(prefix="readme-jax-memory-") as room:
        source, dense, statistics, carved = (Path(room) / name for name in ("source", "dense", "statistics", "carved"))
        size = write_model(source) / 1e9
        write_statistics(statistics)
        peaks = {
            "import": peak_gb("import", "--source", str(source), "--out", str(dense)),
            "carve": peak_gb("carve", "--model", str(dense), "--statistics", str(statistics), "--out", str(carved)),
        }
    figures = {"model_bf16_gb": size, **{f"{stage}_peak_gb": peak for stage, peak in peaks.items()}}
    return figures | {"import_peak_over_bf16_gb": max(peaks.values()) - size}


def report(figures: dict[str, float]) -> str:
    """The figures as one line."""
    over = figures["import_peak_over_bf16_gb"]
    return (
        f"random Llama of {figures['model_bf16_gb']:.2f} GB (bf16): peak of import {figures['import_peak_gb']:.2f} GB, "
        f"of carve {figures['carve_peak_gb']:.2f} GB; above the model's size {over:+.2f} GB, limit {LIMIT_GB} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    figures = measure()
    print(report(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
