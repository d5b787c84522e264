"""Text from a model: prefill, then cached decoding of router and backbone, one jitted program per shape bucket.

The router runs first on every token, so the expert is known before the backbone's layers run (pre-gating).
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.config import DataError, ModelConfig, RouterConfig, require
from readme_jax.models import backbone, router
from readme_jax.models.experts import ExpertTable, Masked
from readme_jax.routing import bucket

PROMPT_STEP = 32  # prompts and caches are padded to a ladder of multiples of this many positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    max_new_tokens: tokens to add at most. temperature: 0 is greedy, else divides the logits. top_k: keep the k best
    (0: all). top_p: keep the smallest set with this probability (1: all). seed: of the sampling; equal seeds give equal
    text whatever else is in the batch but the row's place in it. ConfigError for a value of another kind or range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            value = value.item() if isinstance(value, np.generic) else value
            kind, noun = (numbers.Integral, "whole") if field.type is int else (numbers.Real, "finite")
            good = isinstance(value, kind) and not isinstance(value, bool) and -1e300 < value < 1e300
            require(good, f"{field.name}={str(value)[:40]} must be a {noun} number")
            object.__setattr__(self, field.name, field.type(value))  # pyright: ignore
        require(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1")
        require(self.temperature >= 0, f"temperature={self.temperature} must not be negative")
        usable = self.temperature == 0 or 1e-6 <= self.temperature <= 1e6
        require(usable, f"temperature={self.temperature} must be 0 (greedy) or in 1e-6 .. 1e6")
        require(self.top_k >= 0, f"top_k={self.top_k} must not be negative")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must be in 0 .. 2**32 - 1")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """int32 [B] next tokens. Ties of top_k and top_p at the border are kept (as transformers does for top_k)."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k and sampling.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, -1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, -1)
        before_BV = jnp.cumsum(p_BV, -1) - p_BV  # the best token is always kept
        least_B1 = jnp.min(jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf), -1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Static part of generation. router None: every token runs expert 0 when there is a table, else dense."""

    cfg: ModelConfig
    router: RouterConfig | None
    sampling: Sampling

    def start(self, batch: int, slots: int) -> dict:
        """Empty caches."""
        caches = {"backbone": backbone.init_cache(self.cfg, batch, slots)}
        if self.router is not None:
            caches["router"] = router.init_cache(self.router, batch, slots)
        return caches

    def hidden(self, weights: dict, ids_BT: jax.Array, positions_BT: jax.Array, caches: dict):
        """(hidden [B,T,D], experts int32 [B,T] or None, caches)."""
        table: ExpertTable | None = weights["table"]
        expert_BT, caches = None, dict(caches)
        if table is not None:
            expert_BT = jnp.zeros_like(ids_BT)
            if self.router is not None:
                expert_BT, caches["router"] = router.step(
                    self.router, weights["router"], ids_BT, positions_BT, caches["router"], self.cfg.rope_theta
                )
        x_BTD, caches["backbone"] = backbone.step(
            self.cfg,
            weights["params"],
            ids_BT,
            positions_BT,
            caches["backbone"],
            table=table,
            route=None if expert_BT is None else Masked(expert_BT),
        )
        return x_BTD, expert_BT, caches


@functools.partial(jax.jit, static_argnums=0, donate_argnames="caches")
def _advance(decoder: Decoder, weights, ids_BT, positions_BT, last_B, caches, index, seed):
    """Run tokens through the caches and sample after each row's `last_B` position of this call."""
    x_BTD, expert_BT, caches = decoder.hidden(weights, ids_BT, positions_BT, caches)
    x_B1D = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)
    logits_BV = jax.reshard(backbone.unembed(weights["params"], x_B1D)[:, 0], jax.P())
    root = jax.random.key(seed)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(root, row), index))(jnp.arange(len(last_B)))
    return sample(logits_BV, keys_B, decoder.sampling), expert_BT, caches


def generate(
    decoder: Decoder,
    weights: dict,
    prompts: list[list[int]],
    stop: frozenset[int] = frozenset(),
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """New token ids of each prompt (a stop token ends a row and is not returned).

    weights: {"params", "table" or None, "router" or None} on the device. Prompts may differ in length. The token of a
    step is fetched while the next step runs; on_token(row, id) is called as they arrive.
    """
    cfg, room = decoder.cfg, decoder.sampling.max_new_tokens
    require(len(prompts) > 0, "no prompt given", DataError)
    for row, prompt in enumerate(prompts):
        require(len(prompt) > 0, f"prompt {row} is empty", DataError)
        longest = len(prompt) + room
        require(
            longest <= cfg.max_position,
            f"prompt {row}: {len(prompt)} tokens + max_new_tokens={room} exceed the context of {cfg.max_position}",
            DataError,
        )
        bad = max(prompt) if max(prompt) >= cfg.vocab else min(prompt)
        require(
            0 <= bad < cfg.vocab, f"prompt {row}: token id {bad} is outside the vocabulary of {cfg.vocab}", DataError
        )
    batch, lengths_B = len(prompts), np.array([len(p) for p in prompts], np.int32)
    width = bucket(int(lengths_B.max()), PROMPT_STEP)
    ids_BT = np.zeros((batch, width), np.int32)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt)] = prompt
    caches = decoder.start(batch, max(bucket(int(lengths_B.max()) + room, PROMPT_STEP), width))
    positions_BT = np.broadcast_to(np.arange(width, dtype=np.int32), (batch, width))
    # what does not change the program is left out of its key: other lengths and seeds compile nothing
    seed = np.uint32(decoder.sampling.seed)
    decoder = dataclasses.replace(decoder, sampling=dataclasses.replace(decoder.sampling, max_new_tokens=1, seed=0))
    token_B, _, caches = _advance(decoder, weights, ids_BT, positions_BT, lengths_B - 1, caches, np.int32(0), seed)
    out: list[list[int]] = [[] for _ in prompts]
    done_B = np.zeros(batch, bool)
    zero_B = np.zeros(batch, np.int32)
    for index in range(1, room + 1):
        previous_B = token_B
        if index < room:
            place_B1 = (lengths_B + index - 1)[:, None]
            token_B, _, caches = _advance(
                decoder, weights, previous_B[:, None], place_B1, zero_B, caches, np.int32(index), seed
            )
        for row, token in enumerate(np.asarray(previous_B).tolist()):
            if done_B[row]:
                continue
            if token in stop:
                done_B[row] = True
                continue
            out[row].append(token)
            if on_token is not None:
                on_token(row, token)
        if done_B.all():
            break
    return out
