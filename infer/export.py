"""A carved or tuned model as a folder that transformers loads in PyTorch, and the check that it computes the same.

readme-jax export --model runs/tuned --out runs/exported

In: a model folder with experts. Out: a Hugging Face folder (`trust_remote_code=True`); opened as the plain family it
is the dense model. The check needs the extra `torch`.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from readme_jax import api, cli
from readme_jax.export import check_export, export

CHECK_ROWS, CHECK_TOKENS, GREEDY_TOKENS = 2, 512, 64
PROMPT = "The river rises in the mountains and"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """One export."""

    model: Path
    """Carved or tuned model folder."""
    out: Path
    """Folder to write."""
    check: bool = True
    """Load the folder in PyTorch and compare experts, logits and greedy tokens with JAX."""


def main(argv: list[str] | None = None) -> None:
    """Export once, then check."""
    config: ExportConfig = cli.parse(ExportConfig, argv, __doc__ or "", prog="readme-jax export")
    export(config.model, config.out)
    print(f"exported: {config.out}")
    if config.check:
        print(json.dumps(check(config.model, config.out), indent=1))


def check(model_folder: Path, exported: Path, text: str = "") -> dict:
    """Compare the exported folder in PyTorch with the model in JAX: figures of `export.check_export`.

    1,024 tokens of `text` (or the prompt repeated) for experts and logits, 64 greedy tokens.
    """
    model = api.load(model_folder)
    limit = min(CHECK_TOKENS, model.config.max_position)
    prompt = [int(i) for i in model.tokenizer(PROMPT)["input_ids"]]
    ids = model.tokenizer(text)["input_ids"] if text else []
    ids = np.resize(np.array(ids or prompt, np.int32), (CHECK_ROWS, limit))
    room = min(GREEDY_TOKENS, model.config.max_position - len(prompt))
    greedy = model.generate([prompt], max_new_tokens=room, stop_tokens=[])[0].tolist()
    expert_BT = model.route(ids)
    assert expert_BT is not None
    return check_export(exported, ids, expert_BT, model.logits(ids), prompts=[prompt], continuations=[greedy])


if __name__ == "__main__":
    cli.run(main)
