"""The Python facade: `readme_jax.load(...)` gives a model with logits, routing and generation. NumPy in, NumPy out."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import artifacts, generation, hf, sources
from readme_jax.config import CheckpointError, ConfigError, DataError, ExpertConfig, ModelConfig, RouterConfig, require
from readme_jax.data import load_tokenizer
from readme_jax.generation import Decoder, Sampling
from readme_jax.models import backbone, router
from readme_jax.models.experts import Masked, make_table
from readme_jax.routing import bucket
from readme_jax.sharding import MeshConfig, batch_devices, make_mesh, put, spec

ONE = MeshConfig(data=1)
LENGTH_STEP = 64  # sequences are padded to a ladder of lengths so that few shapes compile


class Model:
    """A dense or carved model, on one device or over the devices of `mesh`: a batch is then a multiple of those it is
    split over.

    config: ModelConfig. experts: the expert table int32 [L, E, C], None when dense. expert_config, router_config: what
    was carved, None when dense or without a router. tokenizer: the folder's, loaded when first used.
    """

    def __init__(self, folder: Path, weights: bool = True, mesh: MeshConfig = ONE):
        self.folder = folder
        self.config: ModelConfig
        self.expert_config: ExpertConfig | None
        self.router_config: RouterConfig | None
        self.config, self.expert_config, self.router_config = hf.read_config(folder)
        if not weights:
            reader = hf.Reader(folder)
            hf.check(reader, self.config, self.expert_config, self.router_config)
            self.experts = None if self.expert_config is None else np.array(reader.get("readme.experts"))
            return
        self._mesh = make_mesh(mesh)
        params, self.experts, router_params = hf.load_params(folder, dtype=np.float32)
        with jax.set_mesh(self._mesh):
            self._weights: dict[str, Any] = {
                "params": backbone.place(self.config, params),
                "table": None if self.experts is None else make_table(self.experts, self.config.mlp),
                "router": None if router_params is None else router.place(router_params),
            }

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer of the folder; CheckpointError when it has none or does not fit the vocabulary."""
        tokenizer = load_tokenizer(self.folder)
        hf.check_tokenizer(tokenizer, self.config)
        return tokenizer

    @functools.cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Ids that end a generation: of generation_config.json and the tokenizer."""
        path, found = self.folder / "generation_config.json", []
        if path.is_file():
            try:
                eos = json.loads(path.read_text()).get("eos_token_id")
            except (ValueError, AttributeError):
                raise CheckpointError(f"{path}: must be a JSON object") from None
            found = eos if isinstance(eos, list) else [eos]
            good = all(i is None or type(i) is int and 0 <= i < self.config.vocab for i in found)
            require(good, f"{path}: eos_token_id={eos!r} must be token ids below {self.config.vocab}", CheckpointError)
        return frozenset(i for i in [*found, self.tokenizer.eos_token_id] if i is not None)

    def _ids(self, ids_BT) -> tuple[np.ndarray, np.ndarray, int]:
        try:
            ids_BT = np.asarray(ids_BT)
        except ValueError:  # rows of different lengths
            raise DataError("ids must be [B, T]: rows of equal length; call once for each length") from None
        require(
            ids_BT.ndim == 2 and ids_BT.size > 0, f"ids must be [B, T] and not empty, got {ids_BT.shape}", DataError
        )
        require(np.issubdtype(ids_BT.dtype, np.integer), f"ids must be integers, got {ids_BT.dtype}", DataError)
        low, high = int(ids_BT.min()), int(ids_BT.max())
        vocab = self.config.vocab
        require(0 <= low and high < vocab, f"ids run from {low} to {high}, the vocabulary has {vocab}", DataError)
        length = ids_BT.shape[1]
        limit = self.config.max_position
        require(length <= limit, f"{length} tokens exceed the context of {limit}", DataError)
        pad = bucket(length, LENGTH_STEP) - length
        segments_BT = np.pad(np.ones(ids_BT.shape, np.int32), ((0, 0), (0, pad)))
        return np.pad(ids_BT.astype(np.int32), ((0, 0), (0, pad))), segments_BT, length

    def run(self, function: Any, *rows_BX) -> Any:
        """function(config, router config or None, weights, *rows) on the mesh, each of the rows [B, ...] split over the
        batch's devices; its results on the host. ConfigError for a batch that cannot be split."""
        with jax.set_mesh(self._mesh):
            count, batch = batch_devices(), len(rows_BX[0])
            require(batch % count == 0, f"batch={batch} must be a multiple of the {count} devices that split it")
            placed = [put(rows, spec("batch", *(None,) * (rows.ndim - 1))) for rows in rows_BX]
            return jax.tree.map(np.asarray, function(self.config, self.router_config, self._weights, *placed))

    def logits(self, ids_BT) -> np.ndarray:
        """float32 logits [B, T, V] of token ids [B, T]; each row one document from its start."""
        ids_BT, segments_BT, length = self._ids(ids_BT)
        return self.run(_logits, ids_BT, segments_BT)[:, :length]

    def route(self, ids_BT) -> np.ndarray | None:
        """int32 [B, T] expert of each token, None for a dense model; zeros for one expert without a router."""
        ids_BT, segments_BT, length = self._ids(ids_BT)
        if self.experts is None:
            return None
        return self.run(_route, ids_BT, segments_BT)[:, :length]

    def generate(
        self,
        prompts: str | list[str] | list[list[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        chat: bool = False,
        stop_tokens: list[int] | None = None,
        on_token=None,
    ) -> Any:
        """Continue prompts of any lengths as one batch; see `generation.Sampling` for the options.

        prompts: text (returns text, a str for a str and a list for a list) or lists of token ids (returns a list of
        int32 arrays). chat: wrap each text as a user's turn in the tokenizer's chat template. stop_tokens: ids that
        end a text, by default the model's own.
        """
        single = isinstance(prompts, str)
        rule = "prompts must be a text, a list of texts, or a list of lists of token ids"
        require(isinstance(prompts, str | list | tuple) or np.ndim(prompts) > 0, rule, DataError)
        require(isinstance(prompts, str | list | tuple | np.ndarray), rule, DataError)
        items = [prompts] if single else list(prompts)
        text = bool(items) and all(isinstance(p, str) for p in items)
        require(text or not chat, "chat=True needs text prompts", DataError)
        ids = [self.encode(str(p), chat) if text else whole_numbers(p, rule) for p in items]
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        rule = f"stop_tokens={stop_tokens!r} must be a list of token ids"
        stop = frozenset(whole_numbers(stop_tokens, rule)) if stop_tokens is not None else self.stop_tokens
        decoder = Decoder(self.config, self.router_config, sampling)
        with jax.set_mesh(self._mesh):
            out = generation.generate(decoder, self._weights, ids, stop, on_token)
        if not text:
            return [np.array(row, np.int32) for row in out]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in out]
        return texts[0] if single else texts

    def encode(self, prompt: str, chat: bool = False) -> list[int]:
        """Token ids of a text, or of it as a user's turn in the chat template.

        DataError for a text that is no Unicode, and when there is no template or it cannot be rendered.
        """
        require(isinstance(prompt, str), f"a prompt must be a text, got {type(prompt).__name__}", DataError)
        _check_unicode(prompt, "a prompt")
        if not chat:
            return self.tokenizer(prompt)["input_ids"]
        require(
            self.tokenizer.chat_template is not None, f"{self.folder}: the tokenizer has no chat template", DataError
        )
        turn = [{"role": "user", "content": prompt}]
        try:
            rendered: Any = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program that came with the model: anything may go wrong in it
            raise DataError(f"{self.folder}: the chat template fails: {' '.join(str(error).split())[:200]}") from None
        _check_unicode(rendered, "the rendered chat template")
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half of a surrogate pair at character {error.start}") from None


def whole_numbers(values: Any, rule: str) -> list[int]:
    """A list of ints; DataError with `rule` for anything else."""
    array = np.asarray(values) if isinstance(values, list | tuple | np.ndarray) else None
    good = array is not None and array.ndim == 1 and (not array.size or np.issubdtype(array.dtype, np.integer))
    require(good, rule, DataError)
    return [int(i) for i in values]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _route(cfg, router_cfg, weights, ids_BT, segments_BT):
    if router_cfg is None:
        return jnp.zeros_like(ids_BT)
    return router.route(router_cfg, weights["router"], ids_BT, segments_BT, cfg.rope_theta)


def hidden(cfg, router_cfg, weights, ids_BT, segments_BT) -> jax.Array:
    """Hidden states before the head, float32 [B, T, D], of a `Model`'s weights: routed where there are experts."""
    route = None if weights["table"] is None else Masked(_route(cfg, router_cfg, weights, ids_BT, segments_BT))
    return backbone.forward(cfg, weights["params"], ids_BT, segments_BT, table=weights["table"], route=route)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(cfg, router_cfg, weights, ids_BT, segments_BT):
    return backbone.unembed(weights["params"], hidden(cfg, router_cfg, weights, ids_BT, segments_BT))


def load(path_or_name: str | Path, *, weights: bool = True, mesh: MeshConfig = ONE) -> Model:
    """Open a model: an HF folder, a hub name, a .gguf file, or the result of any stage of this package.

    weights False: only what there is to know of it (configs, expert table, tokenizer), checked, for an engine, which
    places the weights its own way; nothing can be computed with it. mesh: the devices to compute on, one by default.
    """
    folder = sources.resolve_model(str(path_or_name))
    model_config, experts, router_config = hf.read_config(folder)
    if experts is not None and experts.experts > 1 and router_config is None:
        raise ConfigError(f"{folder}: {experts.experts} experts but no router; train one with `readme-jax alternate`")
    if (folder / artifacts.MANIFEST).is_file():
        artifacts.verify(folder, hashes="changed")
    return Model(folder, weights, mesh)
