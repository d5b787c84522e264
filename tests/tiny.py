"""A tiny checkpoint for tests: random Llama weights, a trained byte-level tokenizer, three domains of local text."""

import json
from pathlib import Path

import numpy as np

from readme_jax import hf
from readme_jax.config import ModelConfig

DOMAINS = {
    "numbers": "one two three four five six seven eight nine ten eleven twelve plus minus times equals",
    "colours": "red green blue yellow violet orange black white grey brown pale dark bright deep light soft",
    "animals": "cat dog horse cow sheep goat lion tiger bear wolf fox hare mouse rat eagle crow",
}


def text(name: str, words: int, seed: int) -> str:
    """Words of a domain in random order, as sentences."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(DOMAINS[name].split(), words)
    return " ".join(w + ("." if i % 9 == 8 else "") for i, w in enumerate(chosen))


def write_text(folder: Path, documents: int = 300) -> dict[str, Path]:
    """One jsonl a domain."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for d, name in enumerate(DOMAINS):
        paths[name] = folder / f"{name}.jsonl"
        rows = [json.dumps({"text": text(name, 40 + i % 17, 1000 * d + i)}) for i in range(documents)]
        paths[name].write_text("\n".join(rows) + "\n")
    return paths


def write_model(folder: Path, *, layer: int = 2, embed: int = 32, mlp: int = 48, seed: int = 0) -> ModelConfig:
    """A dense Llama folder with tokenizer, chat template and generation config."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(n, 400, 7) for n in DOMAINS], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0], "chat_template": template})
    )
    cfg = ModelConfig(
        family="llama", vocab=384, embed=embed, mlp=mlp, layer=layer, head=4, kv_head=2, head_dim=8, norm_eps=1e-5,
        rope_theta=10000.0, max_position=512, tied=True,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(hf.config_to_hf(cfg, {})))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    params = hf.init_params(cfg, seed=seed)
    params["layers"] = {k: v * (1 if k.endswith("norm") else 6) for k, v in params["layers"].items()}
    with hf.Writer(folder) as writer:
        hf.save_params(writer, cfg, params)
    return cfg
