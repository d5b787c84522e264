"""Text by domain, tokenised and packed into fixed-length records, from the hub, local files or the fallback text.

readme-jax data --config configs/quickstart/data.yaml --model runs/dense --out runs/data

In: a model folder (its tokenizer) and the domains of the YAML. Out: memory-mapped records for calibrate, alternate
and evaluate.
"""

import dataclasses
from pathlib import Path

from readme_jax import cli, hf
from readme_jax.config import require
from readme_jax.data import DataConfig, DomainConfig, load_tokenizer, prepare
from readme_jax.quickstart import DOMAINS

QUICKSTART = DataConfig(
    domains={name: DomainConfig(source="fallback") for name in DOMAINS},
    seq=512,
    train_tokens=20480,
    eval_tokens=1024,
    calibration_tokens=1024,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """One preparation of text."""

    model: Path
    """Model folder whose tokenizer and vocabulary the records are for."""
    out: Path
    """Folder to write the records to."""
    data: DataConfig = QUICKSTART
    """Domains, record length and tokens: the quickstart's seven domains unless the YAML names others."""


def main(argv: list[str] | None = None) -> None:
    """Prepare once; a finished folder of the same config and inputs is left as it is."""
    config: PrepareConfig = cli.parse(PrepareConfig, argv, __doc__ or "", prog="readme-jax data")
    cfg, _, _ = hf.read_config(config.model)
    context = cfg.max_position
    require(config.data.seq <= context, f"data.seq={config.data.seq} exceeds the model's context of {context}")
    tokenizer = load_tokenizer(config.model)
    hf.check_tokenizer(tokenizer, cfg)
    prepare(config.data, tokenizer, config.out, cfg.vocab, resolved=config)
    print(f"records: {config.out}")


if __name__ == "__main__":
    cli.run(main)
