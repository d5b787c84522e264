"""A carved or tuned model with tied experts as one whose experts own their rows (the paper's export form).

readme-jax separate --model runs/tuned --out runs/separate

In: a model folder with tied experts. Out: the same model with an FFN of experts * channels rows, expert-major: what
sharding over the mesh's `expert` axis wants. It has no dense form any more.
"""

import dataclasses
from pathlib import Path

from readme_jax import cli
from readme_jax.carve import to_separate
from readme_jax.metrics import layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeparateConfig:
    """One conversion."""

    model: Path
    """Carved or tuned model folder with tied experts."""
    out: Path
    """Folder to write the model to."""


def main(argv: list[str] | None = None) -> None:
    """Convert once; a finished folder of the same model is left as it is."""
    config: SeparateConfig = cli.parse(SeparateConfig, argv, __doc__ or "", prog="readme-jax separate")
    to_separate(config.model, config.out, progress=lambda items: layers(items, "separate"))
    print(f"model with separate experts: {config.out}")


if __name__ == "__main__":
    cli.run(main)
