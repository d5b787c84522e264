"""A Hugging Face checkpoint (local folder, .gguf file or hub name) into a checked, hashed model folder.

readme-jax import --source HuggingFaceTB/SmolLM2-135M-Instruct --out runs/dense

In: safetensors or GGUF, any supported family. Out: the same tensors, byte for byte, with a manifest. Streams tensor by
tensor: memory stays at one shard.
"""

import dataclasses
import json
from pathlib import Path

from readme_jax import artifacts, cli, hf, sources
from readme_jax.config import ArtifactError, require
from readme_jax.hf_config import plain_config
from readme_jax.metrics import Stopwatch, peak_memory_gb, progress

SHARD_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """One import."""

    source: str
    """Local model folder, .gguf file, or hub name."""
    out: Path
    """Folder to write the model to."""


def main(argv: list[str] | None = None) -> None:
    """Import once; a finished folder of the same source is left as it is."""
    config: ImportConfig = cli.parse(ImportConfig, argv, __doc__ or "", prog="readme-jax import")
    if artifacts.finished(config.out, "import", config, {}):
        _unchanged(config)
        print(f"model: {config.out} (already there)")
        return
    folder = sources.resolve_model(config.source)
    cfg, experts, router = hf.read_config(folder)
    reader = hf.Reader(folder)
    hf.check(reader, cfg, experts, router)
    with artifacts.building(config.out, "import", config, {}) as work:
        start = Stopwatch()
        total = sum(reader.get(name).nbytes for name in reader.names())
        with hf.Writer(work.path, SHARD_BYTES) as writer, progress(total, "import", unit="B") as bar:
            for name in reader.names():
                tensor = reader.get(name)
                writer.add(name, tensor)
                bar.update(tensor.nbytes)
        hf.copy_side_files(folder, work.path)
        base = plain_config(json.loads((folder / "config.json").read_text()))
        artifacts.write_text(work.path / "config.json", json.dumps(base, indent=2) + "\n")
        work.info |= {
            "source": artifacts.content(folder),
            "bytes": total,
            "seconds": start.seconds,
            "peak_memory_gb": peak_memory_gb(),
        }
    print(f"model: {config.out} ({cfg.family}, {cfg.layer} layers, {total / 1e9:.2f} GB)")


def _unchanged(config: ImportConfig) -> None:
    """ArtifactError when a local source holds other files than those imported; one that has gone does not matter."""
    if Path(config.source).exists():
        folder = sources.resolve_model(config.source)
        then = artifacts.read_manifest(config.out)["info"]["source"]
        changed = artifacts.changed(folder, then)
        advice = "changed since it was imported; choose another folder"
        require(not changed, f"out={config.out}: {folder / changed} {advice}", ArtifactError)


if __name__ == "__main__":
    cli.run(main)
