"""GGUF to a Hugging Face folder: config.json, model.safetensors, tokenizer files, generation_config.json.

Quantised tensors are dequantised to float32, which holds them exactly (bfloat16 would round a second time); tensors
stored as float32, float16 or bfloat16 keep their own type. One tensor is in memory at a time.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm

from readme_jax.config import CheckpointError, require

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PLAIN = {Kind.F32: ("F32", np.float32), Kind.F16: ("F16", np.float16), Kind.BF16: ("BF16", ml_dtypes.bfloat16)}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def convert(path: str | Path, folder: str | Path) -> None:
    """Write the HF files of the GGUF model `path` into the existing empty `folder`.

    Architectures llama (Llama, Mistral, SmolLM) and qwen2 with a byte-level BPE tokenizer. CheckpointError names the
    file and the rule for everything else: unknown architecture, truncated file, missing, extra or misshapen tensor.
    """
    path, folder = Path(path), Path(folder)
    reader = _open(path)
    try:
        meta = {name: field.contents() for name, field in reader.fields.items()}
        shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
        config = hf_config(path, meta, shapes)
        tokenizer, tokenizer_config = tokenizer_files(path, meta, config)
    except (ValueError, TypeError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged GGUF metadata ({_line(error)})") from None
    tensors = _tensors(path, reader, config)
    config["dtype"] = _dtype(tensors)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids)
    # to_str, because the tokenizers library reports a full disk as a bare Exception.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_tensors(folder / "model.safetensors", path, tensors, config)


class _BoundedReader(gguf.GGUFReader):
    """The package's reader, with reads past the end refused: a tampered length must not spin or go unseen."""

    def _get(self, offset, dtype, count=1, override_order=None):
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"the file has {len(self.data)} bytes, its header asks for {end}")
        return super()._get(int(offset), dtype, count, override_order)


def _open(path: Path) -> gguf.GGUFReader:
    require(path.is_file(), f"{path}: no such file", CheckpointError)
    try:
        return _BoundedReader(path)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a whole GGUF file ({_line(error)})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


# ---- config ------------------------------------------------------------------------------------


def hf_config(path: Path, meta: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json of the model from GGUF metadata; the tensors decide what is tied, what has a bias, and the vocabulary
    (embeddings are often padded past the last token)."""
    arch = str(meta.get("general.architecture"))
    require(arch in ("llama", "qwen2"), f"{path}: architecture {arch!r} must be llama or qwen2", CheckpointError)

    def need(key: str, kind: type, default: Any = None) -> Any:
        value = meta.get(f"{arch}.{key}", default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        require(good, f"{path}: {arch}.{key}={value!r} must be a positive number", CheckpointError)
        # GGUF keeps floats in 32 bits: the shortest decimal gives back 1e-05 instead of 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind is float else int(value)

    heads, embed = need("attention.head_count", int), need("embedding_length", int)
    head_dim = need("attention.key_length", int, need("rope.dimension_count", int, max(1, embed // heads)))
    value_dim, rotary = need("attention.value_length", int, head_dim), need("rope.dimension_count", int, head_dim)
    require(
        value_dim == head_dim == rotary,
        f"{path}: {arch} key length {head_dim}, value length {value_dim} and rotary size {rotary} must be equal",
        CheckpointError,
    )
    require(
        not meta.get(f"{arch}.expert_count"), f"{path}: a mixture-of-experts GGUF, not a dense model", CheckpointError
    )
    tokens, rows = len(meta["tokenizer.ggml.tokens"]), shapes.get("token_embd.weight", (0,))[0]
    require(rows >= tokens, f"{path}: {tokens} tokens, but the embedding has {rows} rows", CheckpointError)
    config = {
        "architectures": ["LlamaForCausalLM" if arch == "llama" else "Qwen2ForCausalLM"],
        "model_type": arch,
        "vocab_size": rows,
        "hidden_size": embed,
        "intermediate_size": need("feed_forward_length", int),
        "num_hidden_layers": need("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": need("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": need("context_length", int),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon", float),
        "rope_theta": need("rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(path, arch, meta, shapes),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if arch == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_gate.bias" in shapes}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (value := meta.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            good = 0 <= value < config["vocab_size"]
            require(good, f"{path}: {theirs}_token_id={value} is outside the vocabulary", CheckpointError)
            config[f"{ours}_token_id"] = int(value)
    return config


def _rope_scaling(path: Path, arch: str, meta: dict[str, Any], names: Iterable[str]) -> dict[str, Any] | None:
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    known = kind in ("none", "linear") and "rope_freqs.weight" not in names
    hint = "RoPE scaling other than linear is not read from GGUF; use the model's safetensors"
    require(known, f"{path}: {hint}", CheckpointError)
    return {"rope_type": "linear", "factor": float(meta[f"{arch}.rope.scaling.factor"])} if kind == "linear" else None


# ---- tensors -----------------------------------------------------------------------------------


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor the model has, by GGUF name, with its HF shape [out, in]."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    Q, K = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = (V, D)
    qkv = config.get("attention_bias", config["model_type"] == "qwen2")
    for i in range(config["num_hidden_layers"]):
        layer = {"attn_q": (Q, D), "attn_k": (K, D), "attn_v": (K, D), "attn_output": (D, Q)}
        layer |= {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F), "attn_norm": (D,), "ffn_norm": (D,)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        biased = (["attn_q", "attn_k", "attn_v"] if qkv else []) + (
            ["attn_output"] if config.get("attention_bias") else []
        )
        biased += ["ffn_gate", "ffn_up", "ffn_down"] if config.get("mlp_bias") else []
        shapes |= {f"blk.{i}.{name}.bias": layer[name][:1] for name in biased}
    return shapes


def _hf_name(name: str) -> str:
    *layer, stem, suffix = name.split(".")
    return ".".join((["model", "layers", layer[1]] if layer else []) + [NAMES[stem], suffix])


def _tensors(path: Path, reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, Any]:
    """GGUF tensors by HF name in file order, checked to be exactly those the config asks for."""
    found, shapes = {tensor.name: tensor for tensor in reader.tensors}, _shapes(config)
    missing, extra = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    require(not missing, f"{path}: {len(missing)} tensors are missing, the first is {missing[:1]}", CheckpointError)
    require(not extra, f"{path}: {len(extra)} unknown tensors, the first is {extra[:1]}", CheckpointError)
    for name, tensor in found.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))
        require(shape == shapes[name], f"{path}: {name} has shape {shape}, the config {shapes[name]}", CheckpointError)
    return {_hf_name(name): tensor for name, tensor in found.items()}


def _dtype(tensors: dict[str, Any]) -> str:
    """The type transformers should load: half precision only when every matrix was stored so."""
    kinds = {tensor.tensor_type for tensor in tensors.values() if len(tensor.shape) > 1}
    return {(Kind.F16,): "float16", (Kind.BF16,): "bfloat16"}.get(tuple(kinds), "float32")


def array_of(path: Path, name: str, tensor: Any, config: dict[str, Any]) -> np.ndarray:
    """One tensor as HF stores it. Llama Q and K rows are in llama.cpp's rotary order (pairs side by side) and go back
    to halves, [heads, head_dim / 2, 2] -> [heads, 2, head_dim / 2]."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if tensor.tensor_type in PLAIN:
        array = tensor.data.view(PLAIN[tensor.tensor_type][1]).reshape(shape)
    else:
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{path}: {tensor.name} cannot be dequantised ({_line(error)})") from None
    finite = np.isfinite(array.astype(np.float32)).all()
    require(bool(finite), f"{path}: {tensor.name} holds values that are not finite", CheckpointError)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads and config["model_type"] == "llama":
        array = array.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)
    return np.ascontiguousarray(array)


def _write_tensors(target: Path, path: Path, tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """A safetensors file written tensor by tensor: the header needs only shapes, so nothing large is held."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        code, dtype = PLAIN.get(tensor.tensor_type, PLAIN[Kind.F32])
        start, end = end, end + int(np.prod(tensor.shape)) * np.dtype(dtype).itemsize
        shape = [int(n) for n in reversed(tensor.shape)]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    bar = tqdm(total=end, unit="B", unit_scale=True, desc=f"convert {path.name}", disable=None)
    with open(target, "wb") as file, bar:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            array = array_of(path, name, tensor, config)
            file.write(array.view(np.uint8).data if array.ndim else array.tobytes())
            bar.update(array.nbytes)


# ---- tokenizer ---------------------------------------------------------------------------------


def tokenizer_files(path: Path, meta: dict[str, Any], config: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer.json object and the tokenizer_config.json dict of a byte-level BPE ("gpt2") GGUF tokenizer."""
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    require(kind == "gpt2", f"{path}: tokenizer {kind!r} is not byte-level BPE (gpt2)", CheckpointError)
    tokens, merges = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"]
    require(len(set(tokens)) == len(tokens), f"{path}: tokenizer.ggml.tokens holds a token twice", CheckpointError)
    split = _pre_tokenizer(path, pre)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    for pair in pairs:
        good = len(pair) == 2 and all(part in vocab for part in pair) and "".join(pair) in vocab
        require(good, f"{path}: merge {' '.join(pair)!r} is not two tokens of the vocabulary", CheckpointError)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))  # type: ignore
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    types = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    require(len(types) == len(tokens), f"{path}: {len(types)} token types, {len(tokens)} tokens", CheckpointError)
    # 3 marks control tokens (cut from decoded text on request), 4 tokens the authors added as plain text.
    control = [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == 3]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in zip(tokens, types) if k == 4])
    out: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := meta.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            out[f"{name}_token"] = tokens[index]
    if "bos_token" in out and meta.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos = out["bos_token"]
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
        tokenizer.post_processor = template
    if meta.get("tokenizer.chat_template"):
        out["chat_template"] = meta["tokenizer.chat_template"]
    return tokenizer, out


def _pre_tokenizer(path: Path, pre: str) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in ("default", "gpt-2"):
        return level
    if pre == "smollm":  # digits one by one, then GPT-2 words
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    digits = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}.get(pre)
    require(
        digits is not None,
        f"{path}: pre-tokenizer {pre!r} is not one of smollm, gpt-2, qwen2, llama-bpe",
        CheckpointError,
    )
    words = pre_tokenizers.Split(Regex(_WORDS % digits), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
