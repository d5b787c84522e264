"""Speed of tokenising and of batch(step) beside what a training step needs, and memory for a virtual 100 GB of text.

    python benchmarks/data.py --json data.json

Tokenising: documents of the fallback text streamed into record files, as `readme-jax data` does. Batches: random
records of those files, and of files of 50 M records that are holes (no disk), read as a training loop reads them. The
need is that of one host of 8 H100 at 40 % of their peak in bf16 (989 TFLOP/s) with 6 FLOPs a parameter and token, for a
1.1 B model: the smaller the model, the more tokens a step wants.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from readme_jax import corpus, packing, sources
from readme_jax.data import Batches, Records, load_tokenizer
from readme_jax.quickstart import QuickstartConfig

SEQ, BATCH, VOCAB = 512, 128, 49152
NEED = 8 * 989e12 * 0.4 / (6 * 1.1e9)  # tokens/s
VIRTUAL = {"a": 20_000_000, "b": 30_000_000}  # records: 25.6 G tokens, about 100 GB of text


def tokenise(folder: Path, model: str, tokens: int) -> tuple[float, Records]:
    """Tokens/s of streaming the domain `code` into record files, its reading and hashing included; and the records."""
    tokenizer, paths = load_tokenizer(sources.resolve_model(model)), packing.record_paths(folder, "code", "train")
    domain = corpus.DomainConfig(source="fallback")
    corpus.source_files("code", domain)  # fetched before the clock starts
    start = time.perf_counter()
    packing.fill(
        lambda after: corpus.windows("code", domain, "train", piece=8 * SEQ, after=after),
        tokenizer, paths, SEQ, tokens, VOCAB, where="code",
    )  # fmt: skip
    return tokens / (time.perf_counter() - start), Records(*(np.load(path, mmap_mode="r") for path in paths))


def virtual(folder: Path) -> dict[str, Records]:
    """Files of VIRTUAL records that take no disk: reading them costs all but the device's own time."""
    found = {}
    for name, count in VIRTUAL.items():
        paths = packing.record_paths(folder, name, "train")
        for path in paths:
            with open(path, "wb") as file:
                header = {"descr": "<u2", "fortran_order": False, "shape": (count, SEQ)}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + 2 * count * SEQ)
        found[name] = Records(*(np.load(path, mmap_mode="r") for path in paths))
    return found


def batch_seconds(batches: Batches, steps: int, stride: int) -> tuple[float, float]:
    """Median seconds of a step, and of its processor time; `steps` of them, `stride` apart."""
    times = []
    for step in range(steps):
        start = time.perf_counter(), time.process_time()
        batches[step * stride]
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    wall, busy = (statistics.median(column) for column in zip(*times))
    return wall, busy


def resident_mb() -> float:
    """Memory of this process now, mapped files included, in 1e6 bytes; not a number where there is no /proc."""
    if not sys.platform.startswith("linux"):
        return float("nan")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024 / 1e6


def measure(model: str, tokens: int, steps: int) -> dict[str, float]:
    """All figures. `headroom` is batch tokens/s over the need, on the virtual set: every record a page of its own."""
    with tempfile.TemporaryDirectory(prefix="readme-jax-data-") as room:
        speed, records = tokenise(Path(room), model, tokens)
        real, busy = batch_seconds(Batches({"code": records}, {"code": 1.0}, batch=BATCH), steps, 1)
        opened, before = virtual(Path(room)), resident_mb()
        start = time.perf_counter()
        batches = Batches(opened, dict.fromkeys(opened, 1.0), batch=BATCH, seed=1)
        made = time.perf_counter() - start
        seconds, virtual_busy = batch_seconds(batches, steps, 100_003)
        grown = resident_mb() - before
        size = sum(path.stat().st_size for name in VIRTUAL for path in packing.record_paths(Path(room), name, "train"))
    return {
        "tokenise_tokens_per_s": speed,
        "batch_ms": 1e3 * real,
        "batch_cpu_ms": 1e3 * busy,
        "batch_tokens_per_s": BATCH * SEQ / real,
        "virtual_files_gb": size / 1e9,
        "virtual_construct_ms": 1e3 * made,
        "virtual_batch_ms": 1e3 * seconds,
        "virtual_batch_cpu_ms": 1e3 * virtual_busy,
        "virtual_batch_tokens_per_s": BATCH * SEQ / seconds,
        "virtual_memory_mb": grown,
        "need_tokens_per_s": NEED,
        "headroom": BATCH * SEQ / seconds / NEED,
    }


def report(figures: dict[str, float]) -> str:
    """The figures as lines."""
    lines = [f"tokenising and packing: {figures['tokenise_tokens_per_s']:,.0f} tokens/s"]
    for key, what in (("", "records just written"), ("virtual_", f"{figures['virtual_files_gb']:.0f} GB of records")):
        lines.append(
            f"batch of {BATCH} x {SEQ} from {what}: {figures[f'{key}batch_ms']:.2f} ms, of the processor "
            f"{figures[f'{key}batch_cpu_ms']:.2f}; {figures[f'{key}batch_tokens_per_s']:,.0f} tokens/s"
        )
    lines.append(
        f"{figures['headroom']:.0f} x the {figures['need_tokens_per_s']:,.0f} tokens/s of 8 H100 and a 1.1 B model; "
        f"made in {figures['virtual_construct_ms']:.1f} ms, {figures['virtual_memory_mb']:.0f} MB of memory"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--model", default=str(QuickstartConfig().model), help="folder or name with the tokenizer")
    parser.add_argument("--tokens", type=int, default=500_000, help="tokens to tokenise")
    parser.add_argument("--steps", type=int, default=200, help="batches timed")
    args = parser.parse_args()
    figures = measure(args.model, args.tokens, args.steps)
    print(report(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
