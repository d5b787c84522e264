"""Configurations of Read-ME models: a dense family's own configuration plus the `readme` block.

`readme` = {"experts": {experts, channels, storage, names, ...}, "router": {width, heads, layers, norm_eps} or null}.
`model_type` is the family's name behind `readme_`; `base_model_type` is the family's name.
"""

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config


class ReadMeLlamaConfig(LlamaConfig):
    """Llama 2, Llama 3, SmolLM2."""

    model_type = "readme_llama"
    base_model_type: str = "llama"
    readme: dict | None = None


class ReadMeMistralConfig(MistralConfig):
    """Mistral, with its sliding window."""

    model_type = "readme_mistral"
    base_model_type: str = "mistral"
    readme: dict | None = None


class ReadMeQwen2Config(Qwen2Config):
    """Qwen2 and Qwen2.5."""

    model_type = "readme_qwen2"
    base_model_type: str = "qwen2"
    readme: dict | None = None


class ReadMeQwen3Config(Qwen3Config):
    """Qwen3, dense."""

    model_type = "readme_qwen3"
    base_model_type: str = "qwen3"
    readme: dict | None = None
