"""Hugging Face folders <-> our parameters: one table of tensor names per family, with transforms and inverses.

Parameters are pure dicts of NumPy arrays, layers stacked. A carved folder is a valid dense checkpoint of its family
plus `readme.experts` and `readme.router.*`. A dense checkpoint goes in and out with equal bytes.
"""

import dataclasses
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from readme_jax.config import CheckpointError, ExpertConfig, ModelConfig, RouterConfig, require
from readme_jax.hf_config import config_to_hf, parse_config, read_config
from readme_jax.weights import Reader, Writer

__all__ = [
    "Entry",
    "Reader",
    "Writer",
    "check",
    "check_tokenizer",
    "config_to_hf",
    "copy_side_files",
    "init_params",
    "iter_layers",
    "load_params",
    "outgoing",
    "parse_config",
    "read_config",
    "read_layer",
    "read_top",
    "save_params",
    "set_leaf",
    "stored_dtype",
    "table",
    "write_layer",
    "write_moe",
    "write_top",
]

Params = dict[str, Any]
FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
_ROUTER = "readme.router."


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the name table: a tensor of the folder, or `count` of them with {layer} in the name.

    `path` is the place in our tree, `shape` ours without the layer axis, `hf_shape` the file's. `to_ours` and `to_hf`
    take one layer's array and return a view of it where NumPy can.
    """

    hf: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    hf_shape: tuple[int, ...]
    count: int = 0
    transposed: bool = False

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """File orientation -> ours. CheckpointError when the shape is not `hf_shape`."""
        require(
            array.shape == self.hf_shape,
            f"tensor {self.hf}: shape {array.shape}, the config needs {self.hf_shape}",
            CheckpointError,
        )
        return (array.T if self.transposed else array).reshape(self.shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Ours -> file orientation. CheckpointError when the shape is not `shape`."""
        require(
            array.shape == self.shape,
            f"parameter {'.'.join(self.path)}: shape {array.shape}, the config needs {self.shape}",
            CheckpointError,
        )
        return array.T if self.transposed else array.reshape(self.hf_shape)

    def names(self) -> list[str]:
        """The tensor names of this line, layer by layer."""
        return [self.hf.format(layer=i) for i in range(self.count)] if self.count else [self.hf]


def table(cfg: ModelConfig, experts: ExpertConfig | None = None, router: RouterConfig | None = None) -> list[Entry]:
    """Every tensor of the folder, once: top of the model, layers, then (path `experts`, path `router` ...) the MoE."""
    entries = _top_entries(cfg) + _layer_entries(cfg)
    if experts is not None:
        shape = (cfg.layer, experts.experts, experts.channels)
        entries.append(Entry("readme.experts", ("experts",), shape, shape))
        if router is not None:
            entries += _router_entries(cfg.vocab, router.width, router.layers, experts.experts)
    return entries


def _top_entries(cfg: ModelConfig) -> list[Entry]:
    table_VD, wide = (cfg.vocab, cfg.embed), (cfg.embed,)
    entries = [
        Entry("model.embed_tokens.weight", ("embedding",), table_VD, table_VD),
        Entry("model.norm.weight", ("norm",), wide, wide),
    ]
    return entries if cfg.tied else [*entries, Entry("lm_head.weight", ("head",), table_VD, table_VD)]


def _layer_entries(cfg: ModelConfig) -> list[Entry]:
    D, F, N, K, H = cfg.embed, cfg.mlp, cfg.head, cfg.kv_head, cfg.head_dim
    entries = []

    def line(hf: str, name: str, shape: tuple[int, ...], hf_shape: tuple[int, ...], transposed: bool = False) -> None:
        hf = "model.layers.{layer}." + hf
        entries.append(Entry(hf, ("layers", name), shape, hf_shape, cfg.layer, transposed))

    line("input_layernorm.weight", "attn_norm", (D,), (D,))
    for letter, heads in (("q", N), ("k", K), ("v", K)):
        line(f"self_attn.{letter}_proj.weight", f"w_{letter}", (heads, H, D), (heads * H, D))
        if cfg.qkv_bias:
            line(f"self_attn.{letter}_proj.bias", f"b_{letter}", (heads, H), (heads * H,))
    line("self_attn.o_proj.weight", "w_o", (D, N, H), (D, N * H))
    if cfg.out_bias:
        line("self_attn.o_proj.bias", "b_o", (D,), (D,))
    if cfg.qk_norm:
        line("self_attn.q_norm.weight", "q_norm", (H,), (H,))
        line("self_attn.k_norm.weight", "k_norm", (H,), (H,))
    line("post_attention_layernorm.weight", "mlp_norm", (D,), (D,))
    line("mlp.gate_proj.weight", "w_gate", (F, D), (F, D))
    line("mlp.up_proj.weight", "w_up", (F, D), (F, D))
    line("mlp.down_proj.weight", "w_down", (F, D), (D, F), transposed=True)
    if cfg.mlp_bias:
        line("mlp.gate_proj.bias", "b_gate", (F,), (F,))
        line("mlp.up_proj.bias", "b_up", (F,), (F,))
        line("mlp.down_proj.bias", "b_down", (D,), (D,))
    return entries


def _router_entries(vocab: int, width: int, layers: int, experts: int) -> list[Entry]:
    R = width
    top = [("embedding.weight", "embedding", (vocab, R)), ("norm.weight", "norm", (R,))]
    top += [("head.weight", "head", (experts, R)), ("head.bias", "b_head", (experts,))]
    block = [("attn_norm.weight", "attn_norm", (R,)), ("mlp_norm.weight", "mlp_norm", (R,))]
    for name in ("q", "k", "v", "o", "in", "out"):
        block += [(f"{name}.weight", f"w_{name}", (R, R)), (f"{name}.bias", f"b_{name}", (R,))]
    entries = [Entry(_ROUTER + hf, ("router", name), shape, shape) for hf, name, shape in top]
    prefix = _ROUTER + "layers.{layer}."
    return entries + [Entry(prefix + hf, ("router", "layers", name), shape, shape, layers) for hf, name, shape in block]


# ---- checks -----------------------------------------------------------------------------------


def check(
    reader: Reader, cfg: ModelConfig, experts: ExpertConfig | None = None, router: RouterConfig | None = None
) -> None:
    """CheckpointError naming the tensor and file unless the folder holds exactly the tensors of the table.

    Allowed beside them: `rotary_emb.inv_freq` (recomputed), and in a tied model an `lm_head.weight` whose bytes equal
    the embedding's. Reads headers only, except for that comparison and the expert table.
    """
    found = set(reader.names())
    for entry in table(cfg, experts, router):
        kinds = (np.dtype(np.int32),) if entry.path == ("experts",) else FLOATS
        for name in entry.names():
            require(name in found, f"{reader.folder}: tensor {name} is missing", CheckpointError)
            found.remove(name)
            where, shape, dtype = f"{reader.file(name)}: tensor {name}", reader.shape(name), reader.dtype(name)
            require(
                shape == entry.hf_shape, f"{where}: shape {shape}, the config needs {entry.hf_shape}", CheckpointError
            )
            require(dtype in kinds, f"{where}: dtype {dtype} must be {' or '.join(map(str, kinds))}", CheckpointError)
    if cfg.tied and "lm_head.weight" in found:
        found.remove("lm_head.weight")
        _check_tied(reader)
    for name in sorted(found):
        frequencies = re.fullmatch(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", name)
        require(
            frequencies is not None,
            f"{reader.file(name)}: tensor {name} is not part of a {cfg.family} model with this config.json",
            CheckpointError,
        )
    if experts is not None:
        _check_experts(reader, cfg)


def _check_tied(reader: Reader) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    same = reader.shape(head) == reader.shape(embedding) and reader.dtype(head) == reader.dtype(embedding)
    same = same and np.array_equal(reader.get(head).view(np.uint8), reader.get(embedding).view(np.uint8))
    require(
        same,
        f"{reader.file(head)}: tensor {head} differs from {embedding}, but config.json has tie_word_embeddings=true",
        CheckpointError,
    )


def _check_experts(reader: Reader, cfg: ModelConfig) -> None:
    where, experts_LEC = f"{reader.file('readme.experts')}: tensor readme.experts", reader.get("readme.experts")
    low, high = int(experts_LEC.min()), int(experts_LEC.max())
    require(
        low >= 0 and high < cfg.mlp, f"{where}: channel ids {low}..{high} must lie in 0..{cfg.mlp - 1}", CheckpointError
    )
    rising = (np.diff(experts_LEC, axis=-1) > 0).all()
    require(bool(rising), f"{where}: the channel ids of an expert must rise strictly", CheckpointError)


def check_tokenizer(tokenizer: Any, cfg: ModelConfig) -> None:
    """CheckpointError when the tokenizer can give an id that the embedding has no row for. Fewer ids are fine."""
    size = len(tokenizer)
    if hasattr(tokenizer, "get_vocab"):  # ids may have holes: the highest counts, not how many there are
        size = max(size, 1 + max(tokenizer.get_vocab().values(), default=-1))
    require(
        size <= cfg.vocab,
        f"tokenizer {getattr(tokenizer, 'name_or_path', '')}: {size} ids do not fit the model's vocab_size={cfg.vocab}",
        CheckpointError,
    )


# ---- reading ----------------------------------------------------------------------------------


def read_top(reader: Reader, cfg: ModelConfig) -> Params:
    """{embedding [V, D], norm [D], head [V, D] when untied}: read-only views of the mapped file, its own dtype."""
    return {entry.path[-1]: entry.to_ours(reader.get(entry.hf)) for entry in _top_entries(cfg)}


def read_layer(reader: Reader, cfg: ModelConfig, layer: int) -> dict[str, np.ndarray]:
    """The arrays of one layer in our orientation, without the layer axis: read-only views of the mapped file."""
    return {e.path[-1]: e.to_ours(reader.get(e.hf.format(layer=layer))) for e in _layer_entries(cfg)}


def iter_layers(reader: Reader, cfg: ModelConfig) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(layer, `read_layer`) of every layer in order: memory stays at one layer when the caller drops each."""
    for layer in range(cfg.layer):
        yield layer, read_layer(reader, cfg, layer)


def load_params(folder: str | Path, *, dtype: Any = None) -> tuple[Params, np.ndarray | None, Params | None]:
    """(params, experts_LEC int32 or None, router params or None) of a folder, layers stacked, as NumPy arrays.

    `dtype` casts every float of the backbone, the router then is float32; None keeps the file's own. Checks the whole
    folder first (CheckpointError, ConfigError). Peak memory: the result, and one tensor.
    """
    cfg, experts, router = read_config(folder)
    reader = Reader(folder)
    check(reader, cfg, experts, router)
    tree: Params = {}
    for entry in table(cfg, experts, router):
        wanted = np.float32 if dtype is not None and entry.path[0] == "router" else dtype
        array = np.empty(((entry.count,) if entry.count else ()) + entry.shape, stored_dtype(reader, entry, wanted))
        for i, name in enumerate(entry.names()):
            array[i if entry.count else ...] = entry.to_ours(reader.get(name))
        set_leaf(tree, entry.path, array)
    return tree, tree.pop("experts", None), tree.pop("router", None)


def stored_dtype(reader: Reader, entry: Entry, dtype: Any = None) -> np.dtype:
    """Dtype that the tensors of a line are loaded as: `dtype` for floats, else the file's own.

    CheckpointError when it is left to the file and the layers differ.
    """
    kinds = {reader.dtype(name): name for name in entry.names()}
    require(
        len(kinds) == 1 or dtype is not None,
        f"{reader.folder}: {' and '.join(f'{name} is {kind}' for kind, name in kinds.items())}; "
        "layers stored in different dtypes need one dtype to load them as",
        CheckpointError,
    )
    return np.dtype(dtype) if dtype is not None and entry.path != ("experts",) else next(iter(kinds))


def set_leaf(tree: Params, path: tuple[str, ...], value: Any) -> None:
    """Set one leaf of a tree of dicts; branches on the way are made."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


# ---- writing ----------------------------------------------------------------------------------


def write_top(writer: Writer, cfg: ModelConfig, top: Params) -> None:
    """The inverse of `read_top`; keys of `top` that are not of the top (such as `layers`) are left alone."""
    for entry in _top_entries(cfg):
        writer.add(entry.hf, entry.to_hf(np.asarray(top[entry.path[-1]])))


def write_layer(writer: Writer, cfg: ModelConfig, layer: int, arrays: dict[str, np.ndarray]) -> None:
    """The inverse of `read_layer`; `arrays` must hold exactly the names of the family's table."""
    entries = _layer_entries(cfg)
    _same_names(set(arrays), {entry.path[-1] for entry in entries}, f"layer {layer}")
    for entry in entries:
        writer.add(entry.hf.format(layer=layer), entry.to_hf(np.asarray(arrays[entry.path[-1]])))


def write_moe(writer: Writer, experts_LEC: np.ndarray) -> None:
    """`readme.experts`, stored as int32."""
    writer.add("readme.experts", np.asarray(experts_LEC, np.int32))


def outgoing(
    cfg: ModelConfig, params: Params, experts: np.ndarray | None = None, router: Params | None = None
) -> Iterator[tuple[str, Entry, Any, int | None]]:
    """(tensor name, line of the table, our array, its layer or None) of every tensor, in the order they are written.

    Nothing is read of the arrays but the shapes of the router's. CheckpointError for a parameter missing or unknown.
    """
    require(
        router is None or experts is not None,
        "a router cannot be written without the table of experts it chooses from",
        CheckpointError,
    )
    top, block = _top_entries(cfg), _layer_entries(cfg)
    _same_names(set(params), {entry.path[0] for entry in top + block}, "params")
    _same_names(set(params["layers"]), {entry.path[-1] for entry in block}, "params.layers")
    for entry in top:
        yield entry.hf, entry, params[entry.path[-1]], None
    for layer in range(cfg.layer):
        for entry in block:
            yield entry.hf.format(layer=layer), entry, params["layers"][entry.path[-1]], layer
    if experts is None:
        return
    experts = np.asarray(experts, np.int32)
    yield "readme.experts", Entry("readme.experts", ("experts",), experts.shape, experts.shape), experts, None
    if router is None:
        return
    (vocab, R), E, layers = router["embedding"].shape, len(router["head"]), len(router["layers"]["w_q"])
    entries = _router_entries(vocab, R, layers, E)
    _same_names(set(router), {entry.path[1] for entry in entries}, "router")
    _same_names(set(router["layers"]), {e.path[2] for e in entries if e.count}, "router.layers")
    for entry in entries:
        array = router["layers"][entry.path[2]] if entry.count else router[entry.path[1]]
        for i, name in enumerate(entry.names()):
            yield name, entry, array, i if entry.count else None


def save_params(
    writer: Writer,
    cfg: ModelConfig,
    params: Params,
    experts: np.ndarray | None = None,
    router: Params | None = None,
) -> None:
    """The inverse of `load_params`, in the dtype of the arrays; `writer.close()` is the caller's.

    CheckpointError for a parameter that is missing, unknown or misshapen.
    """
    for name, entry, array, layer in outgoing(cfg, params, experts, router):
        writer.add(name, entry.to_hf(np.asarray(array if layer is None else array[layer])))


def _same_names(found: set[str], wanted: set[str], where: str) -> None:
    for name in sorted(wanted - found):
        raise CheckpointError(f"{where}: parameter {name} is missing")
    for name in sorted(found - wanted):
        raise CheckpointError(f"{where}: parameter {name} is not part of this model")


def copy_side_files(src: str | Path, dst: str | Path) -> list[str]:
    """Copy tokenizer, vocabulary, chat template and generation config from one folder to another; returns the names."""
    patterns = ("tokenizer*", "special_tokens*", "added_tokens.json", "vocab*", "merges*", "generation_config.json")
    patterns += ("chat_template*", "additional_chat_templates/*.jinja")
    src, dst = Path(src), Path(dst)
    paths = sorted({path for pattern in patterns for path in src.glob(pattern) if path.is_file()})
    for path in paths:
        target = dst / path.relative_to(src)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)  # content only: files of a hub cache are read-only links
    return [str(path.relative_to(src)) for path in paths]


def init_params(cfg: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> Params:
    """Random parameters of any config: normal(0.02) weights and biases, norms 1. For tests and random models.

    The stream of each parameter is keyed by its path, so one more parameter changes no other.
    """
    tree: Params = {}
    for entry in table(cfg):
        shape = ((entry.count,) if entry.count else ()) + entry.shape
        if entry.path[-1].endswith("norm"):
            set_leaf(tree, entry.path, np.ones(shape, dtype))
            continue
        rng = np.random.default_rng((seed, zlib.crc32("/".join(entry.path).encode())))
        array = np.empty(shape, dtype)
        for part in array if entry.count else (array,):  # one layer of float32 at a time
            part[...] = 0.02 * rng.standard_normal(entry.shape, np.float32)
        set_leaf(tree, entry.path, array)
    return tree
