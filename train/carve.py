"""Cut a dense model into experts: activation statistics -> expert table -> permuted model. Runs on the CPU.

readme-jax carve --model runs/dense --statistics runs/statistics --out runs/carved --fraction 0.5

In: a dense model folder (`import`) and its statistics (`calibrate`). Out: a folder that is still a valid dense
checkpoint (FFN channels permuted; not with `--storage separate`) and holds the expert table.
"""

from readme_jax import cli
from readme_jax.carve import CarveConfig, carve, describe
from readme_jax.metrics import layers


def main(argv: list[str] | None = None) -> None:
    """Carve once; a finished folder of the same config and inputs is only described again."""
    config: CarveConfig = cli.parse(CarveConfig, argv, __doc__ or "", prog="readme-jax carve")
    info = carve(config, progress=lambda items: layers(items, "carve"))
    print(describe(info))
    print(f"carved model: {config.out}")


if __name__ == "__main__":
    cli.run(main)
