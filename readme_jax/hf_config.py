"""config.json of a Hugging Face folder <-> ModelConfig, ExpertConfig, RouterConfig.

Reads both spellings transformers has used for rotary embedding. What the models do not compute (quantisation, other
rope types, other activations) is refused, never ignored.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from readme_jax.config import (
    CheckpointError,
    ConfigError,
    ExpertConfig,
    ModelConfig,
    RopeScaling,
    RouterConfig,
    from_dict,
    require,
    to_dict,
)

NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
FAMILIES = tuple(NAMES)
_REQUIRED = object()
MOST_LAYERS = 10_000  # far above any model: lists of names and windows are as long, before any file is looked at


def read_config(folder: str | Path) -> tuple[ModelConfig, ExpertConfig | None, RouterConfig | None]:
    """Model, expert and router config of a folder's config.json; the last two are None in a dense one.

    CheckpointError when the file is absent or not JSON; ConfigError naming file, field and rule for what is missing,
    malformed or not supported. Defaults are those of transformers for the family.
    """
    path = Path(folder) / "config.json"
    require(path.is_file(), f"{path}: no such file; a model folder needs one", CheckpointError)
    try:
        data = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not valid JSON") from None
    require(isinstance(data, dict), f"{path}: must be a JSON object", CheckpointError)
    return parse_config(data, str(path))


def parse_config(
    data: dict[str, Any], where: str = "config.json"
) -> tuple[ModelConfig, ExpertConfig | None, RouterConfig | None]:
    """`read_config` of a dict already in memory; `where` begins every message."""
    try:
        cfg = _model_config(data)
        moe = data.get("readme")
        if moe is None:
            return cfg, None, None
        require(isinstance(moe, dict) and "experts" in moe, f"readme={moe!r} must be a mapping with the key experts")
        experts = from_dict(ExpertConfig, moe["experts"], "readme.experts")
        router = moe.get("router")
        router = None if router is None else from_dict(RouterConfig, router, "readme.router")
        width = experts.experts * experts.channels if experts.storage == "separate" else None
        require(
            width in (None, cfg.mlp) and experts.channels <= cfg.mlp,
            f"intermediate_size={cfg.mlp} does not fit {experts.experts} {experts.storage} experts of "
            f"{experts.channels} channels",
        )
        return cfg, experts, router
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _field(data: dict, name: str, kind: type, default: Any = _REQUIRED) -> Any:
    """One field of config.json, by its JSON type; null counts as absent, as it does in transformers."""
    value = data.get(name)
    if value is None:
        require(default is not _REQUIRED, f"{name}: missing, and it has no default")
        return default
    good = isinstance(value, int | float) and not isinstance(value, bool) if kind is float else type(value) is kind
    noun = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]
    require(good and (kind is not float or math.isfinite(value)), f"{name}={value!r} must be {noun}")
    return float(value) if kind is float else value


def _size(data: dict, name: str, default: Any = _REQUIRED) -> Any:
    """A field that counts something: a whole number from 1."""
    value = _field(data, name, int, default)
    require(value is None or value >= 1, f"{name}={value} must be at least 1")
    return value


def _model_config(data: dict) -> ModelConfig:
    kind = _field(data, "model_type", str)
    family = kind.removeprefix("readme_")
    require(family in FAMILIES, f"model_type={kind!r} is not supported (known: {', '.join(FAMILIES)})")
    act = _field(data, "hidden_act", str, "silu")
    require(act == "silu", f"hidden_act={act!r} is not supported: it must be 'silu'")
    require(
        not data.get("quantization_config"),
        "quantization_config: quantised weights are not supported; give the original checkpoint",
    )
    embed, head, layer = (_size(data, n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    require(layer <= MOST_LAYERS, f"num_hidden_layers={layer} must be at most {MOST_LAYERS}")
    head_dim = _size(data, "head_dim", 128 if family == "qwen3" else None)
    if head_dim is None:
        require(
            embed % head == 0,
            f"hidden_size={embed} must be a multiple of num_attention_heads={head} when head_dim is not given",
        )
        head_dim = embed // head
    theta, scaling = _rope(data)
    norm_eps = _field(data, "rms_norm_eps", float)
    require(norm_eps >= 0, f"rms_norm_eps={norm_eps} must not be negative")
    attention_bias = family in ("llama", "qwen3") and _field(data, "attention_bias", bool, False)
    return ModelConfig(
        family=family,  # pyright: ignore[reportArgumentType]
        vocab=_size(data, "vocab_size"),
        embed=embed,
        mlp=_size(data, "intermediate_size"),
        layer=layer,
        head=head,
        # Only Llama has checkpoints from before grouped queries; elsewhere a default would be a guess.
        kv_head=_size(data, "num_key_value_heads", head if family == "llama" else _REQUIRED),
        head_dim=head_dim,
        norm_eps=norm_eps,
        rope_theta=theta,
        max_position=_size(data, "max_position_embeddings"),
        tied=_field(data, "tie_word_embeddings", bool, False),
        rope_scaling=scaling,
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=attention_bias,
        mlp_bias=family == "llama" and _field(data, "mlp_bias", bool, False),
        qk_norm=family == "qwen3",
        windows=_windows(data, family, layer),
    )


def _rope(data: dict) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes rope_parameters; older versions rope_theta beside rope_scaling, which wins where both are.
    name = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    rope = data.get(name) or {}
    require(isinstance(rope, dict), f"{name}={rope!r} must be a mapping")
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    require(not nested, f"{name}.{nested[0] if nested else ''}: one rotary embedding per layer type is not supported")
    theta = _field(rope, "rope_theta", float, _field(data, "rope_theta", float, 10000.0))
    require(0 < theta < 3e38, f"rope_theta={theta} must be greater than 0 and fit float32")
    for place in (rope, data):
        share = _field(place, "partial_rotary_factor", float, 1.0)
        require(share == 1.0, f"partial_rotary_factor={share} is not supported: it must be 1")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    require(
        kind in ("llama3", "linear"),
        f"{name}.rope_type={kind!r} is not supported (known: 'default', 'linear', 'llama3')",
    )
    try:
        factor = _field(rope, "factor", float)
        require(factor >= 1, f"factor={factor} must be at least 1")
        if kind == "linear":
            return theta, RopeScaling(kind="linear", factor=factor)
        low, high = (_field(rope, key, float) for key in ("low_freq_factor", "high_freq_factor"))
        require(0 < low < high, f"low_freq_factor={low} must be above 0 and below high_freq_factor={high}")
        original = _size(rope, "original_max_position_embeddings", _size(data, "max_position_embeddings"))
        outside = _size(data, "original_max_position_embeddings", original)
        # Which of the two counts has changed between versions of transformers.
        require(
            outside == original,
            f"original_max_position_embeddings={original} contradicts {outside} in the config itself",
        )
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from None
    return theta, RopeScaling(
        kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position=original
    )


def _windows(data: dict, family: str, layer: int) -> tuple[int, ...]:
    """Sliding window of every layer, 0 for full attention; () when no layer slides. Defaults as in transformers."""
    types = data.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        good = isinstance(types, list) and len(types) == layer and all(kind in known for kind in types)
        require(good, f"layer_types must have one of {', '.join(known)} for each of num_hidden_layers={layer}")
    slides = [kind == "sliding_attention" for kind in types] if types is not None else None
    window = (_size(data, "sliding_window", None) or 0) if "sliding_window" in data else 4096
    if family == "mistral":
        here = [window > 0] * layer
    elif family in ("qwen2", "qwen3") and _field(data, "use_sliding_window", bool, False):
        first = _field(data, "max_window_layers", int, 28)
        here = slides if slides is not None else [window > 0 and i >= first for i in range(layer)]
        require(window > 0 or not any(here), "sliding_window is missing, and layer_types has sliding_attention")
    else:
        here = [False] * layer
    require(slides in (None, here), "layer_types contradicts sliding_window: the family slides in other layers")
    return tuple(window if here[i] else 0 for i in range(layer)) if any(here) else ()


def config_to_hf(
    cfg: ModelConfig,
    base: dict[str, Any],
    experts: ExpertConfig | None = None,
    router: RouterConfig | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """config.json of `cfg`: `base` (the original one) kept, with the FFN width and the `readme` key brought up to date.

    An empty `base` gives a whole config. `dtype`, such as "float32", is how the weights are stored now, which
    transformers loads them as. ConfigError when the result would not read back as the same configs.
    """
    out = dict(base) if base else _whole(cfg)
    out["intermediate_size"] = cfg.mlp
    if dtype is not None:
        out["torch_dtype" if "torch_dtype" in out else "dtype"] = dtype
    out.pop("readme", None)
    if experts is not None:
        out["readme"] = {"experts": to_dict(experts), "router": to_dict(router)}
    back = parse_config(out)
    for ours, theirs in zip((cfg, experts, router), back):
        for field in dataclasses.fields(ours) if ours is not None else ():
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            require(a == b, f"config.json: {field.name}={b!r} in the original config, {a!r} in the model")
    return out


def plain_config(data: dict[str, Any]) -> dict[str, Any]:
    """config.json of an exported folder without what `export` added: plain model type and class, no code files."""
    if not str(data.get("model_type", "")).startswith("readme_"):
        return data
    family = data["model_type"].removeprefix("readme_")
    out = {key: value for key, value in data.items() if key not in ("auto_map", "base_model_type")}
    return out | {"architectures": [f"{NAMES[family]}ForCausalLM"], "model_type": family}


def _whole(cfg: ModelConfig) -> dict[str, Any]:
    out: dict[str, Any] = {
        "architectures": [f"{NAMES[cfg.family]}ForCausalLM"],
        "model_type": cfg.family,
        "hidden_act": "silu",
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.embed,
        "num_hidden_layers": cfg.layer,
        "num_attention_heads": cfg.head,
        "num_key_value_heads": cfg.kv_head,
        "head_dim": cfg.head_dim,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "max_position_embeddings": cfg.max_position,
        "tie_word_embeddings": cfg.tied,
        "attention_bias": cfg.out_bias,
        "mlp_bias": cfg.mlp_bias,
    }
    if cfg.rope_scaling is not None:
        scaling = cfg.rope_scaling
        out["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            out["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
    window = max(cfg.windows, default=0)
    if cfg.family == "mistral":
        out["sliding_window"] = window or None
    elif cfg.family != "llama":
        out |= {"use_sliding_window": window > 0, "sliding_window": window or None}
        out["layer_types"] = ["sliding_attention" if w else "full_attention" for w in cfg.windows or [0] * cfg.layer]
    return out
