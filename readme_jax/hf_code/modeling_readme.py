"""Read-ME mixture of experts in PyTorch: a dense decoder of transformers plus a pre-gating router.

The router is a small causal transformer over the token ids. It names one expert a token before the backbone runs, and
every layer uses that expert: the input of `down_proj` is multiplied by the expert's membership in the FFN's channels.

Shapes: B batch, T new tokens, S cached + new tokens, F stored FFN channels, E experts, C channels of an expert,
L layers, R router width.
"""

import contextvars
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_readme import ReadMeLlamaConfig, ReadMeMistralConfig, ReadMeQwen2Config, ReadMeQwen3Config

# Decoder layers call `mlp(x)` with nothing else, so the running forward's expert ids [B, T] and table [L, E, C] travel
# beside the call. A context variable rather than an attribute: two threads may run one model.
_ROUTED: contextvars.ContextVar = contextvars.ContextVar("readme_routed", default=None)

# What the installed transformers calls the cache: `cache` from 5.24 on, `past_key_values` before.
_CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


@dataclass
class ReadMeOutput(CausalLMOutputWithPast):
    """The family's output and `expert_ids`, int32 [B, T]: the expert that each new token ran through."""

    expert_ids: torch.Tensor | None = None


class ReadMeRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BTR: torch.Tensor) -> torch.Tensor:
        wide = x_BTR.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x_BTR.dtype)


class ReadMeRouterBlock(nn.ModuleDict):
    """Attention without the 1/sqrt(d) scale, then Linear-SiLU-Linear. A dict of modules because one is called `in`."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__({name: nn.Linear(width, width) for name in ("q", "k", "v", "o", "in", "out")})
        self["attn_norm"] = ReadMeRMSNorm(width, eps)
        self["mlp_norm"] = ReadMeRMSNorm(width, eps)
        self.heads = heads

    def forward(self, x_BTR, cos, sin, seen_BTS, cache, layer):
        B, T, R = x_BTR.shape
        normed = self["attn_norm"](x_BTR)
        q, k, v = (self[name](normed).view(B, T, self.heads, -1).transpose(1, 2) for name in ("q", "k", "v"))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, layer)
        # In float32 whatever the weights are: the scores are not scaled, and one bit may change an expert.
        mixed = nn.functional.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=seen_BTS[:, None], scale=1.0
        )
        x_BTR = x_BTR + self["o"](mixed.to(x_BTR.dtype).transpose(1, 2).reshape(B, T, R))
        return x_BTR + self["out"](nn.functional.silu(self["in"](self["mlp_norm"](x_BTR))))


class ReadMeRouter(nn.Module):
    """Token ids to expert logits. Its keys and values are the cache's layers from `first_layer` on."""

    def __init__(self, vocab: int, experts: int, theta: float, first_layer: int, router: dict):
        super().__init__()
        width, heads, eps = router["width"], router["heads"], router["norm_eps"]
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(ReadMeRouterBlock(width, heads, eps) for _ in range(router["layers"]))
        self.norm = ReadMeRMSNorm(width, eps)
        self.head = nn.Linear(width, experts)
        self.theta, self.head_dim, self.first_layer = theta, width // heads, first_layer

    def forward(self, ids_BT, attention_mask, position_ids, cache) -> torch.Tensor:
        """Logits [B, T, E] of the new tokens."""
        past = past_length(cache, self.first_layer, len(self.layers))
        if position_ids is None:
            position_ids = (past + torch.arange(ids_BT.shape[1], device=ids_BT.device))[None]
        seen_BTS = visible(ids_BT, attention_mask, position_ids, past, cache is not None)
        half = torch.arange(0, self.head_dim, 2, device=ids_BT.device, dtype=torch.float32)
        angle = position_ids[:, None, :, None].float() * self.theta ** (-half / self.head_dim)
        cos, sin = angle.cos(), angle.sin()
        x_BTR = self.embedding(ids_BT)
        for i, block in enumerate(self.layers):
            x_BTR = block(x_BTR, cos, sin, seen_BTS, cache, self.first_layer + i)
        return self.head(self.norm(x_BTR)).float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, the first half of the channels against the second."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def past_length(cache, first_layer: int, layers: int) -> int:
    """Tokens already in the cache; the router's layers are appended to a cache that does not have them yet.

    As layers of the same cache they follow its beam reordering, cropping and batch selection.
    """
    if cache is None:
        return 0
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"{type(cache).__name__} is not supported by Read-ME models: use DynamicCache (the default)")
    while len(cache.layers) < first_layer + layers:
        cache.layers.append(DynamicLayer())
    past, mine = cache.get_seq_length(), cache.get_seq_length(first_layer)
    if past != mine:
        raise ValueError(f"the cache holds {past} tokens of the backbone but {mine} of the router: not a Read-ME cache")
    return past


def visible(ids_BT, attention_mask, position_ids, past: int, cached: bool) -> torch.Tensor:
    """Bool [B, T, S]: which tokens a new token may look at. A padded token sees itself, so no row is empty."""
    B, T = ids_BT.shape
    new = torch.arange(past, past + T, device=ids_BT.device)
    all_ = torch.arange(past + T, device=ids_BT.device)
    seen_BTS = (all_[None] <= new[:, None]).expand(B, T, -1)
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (B, past + T):
            got = tuple(attention_mask.shape)
            raise ValueError(
                f"attention_mask has shape {got}; Read-ME models take [batch, cached + new] = {(B, past + T)}"
            )
        seen_BTS = seen_BTS & attention_mask.to(ids_BT.device).bool()[:, None]
        seen_BTS = seen_BTS | (all_[None] == new[:, None])
    elif not cached:
        # Positions that start again mean sequences packed in a row; the backbone reads them so too without a cache.
        jump = position_ids.expand(B, T).diff(dim=1, prepend=position_ids[:, :1].expand(B, 1) - 1) != 1
        part_BT = jump.cumsum(1)
        seen_BTS = seen_BTS & (part_BT[:, :, None] == part_BT[:, None])
    return seen_BTS


class ReadMeMLP(nn.Module):
    """A dense layer's own gate, up and down projections; h is masked by the token's expert before `down_proj`."""

    def __init__(self, dense: nn.Module, layer: int):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = dense.gate_proj, dense.up_proj, dense.down_proj
        self.act_fn, self.layer = dense.act_fn, layer

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        routed = _ROUTED.get()
        if routed is None:
            raise RuntimeError("no experts chosen: call the ForCausalLM model, not its `.model`")
        expert_BT, experts_LEC = routed
        h_BTF = self.act_fn(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)
        experts_EC = experts_LEC[self.layer].to(h_BTF.device, torch.int64)
        member_EF = h_BTF.new_zeros(experts_EC.shape[0], h_BTF.shape[-1]).scatter_(1, experts_EC, 1)
        return self.down_proj(h_BTF * member_EF[expert_BT.to(h_BTF.device)])


class ReadMeMixin(PreTrainedModel):
    """What turns a family's ForCausalLM into a Read-ME model; comes before it in the bases."""

    model: Any
    readme: Any
    supports_gradient_checkpointing = False
    # Routing is an argmax: the router keeps its own precision when the backbone is loaded in half precision.
    _keep_in_fp32_modules_strict = ["readme.router"]

    def __init__(self, config):
        super().__init__(config)
        if not config.readme:
            raise ValueError("config.readme is missing: this is a dense model, open it with its own class")
        experts, router = config.readme["experts"], config.readme.get("router")
        E, C = experts["experts"], experts["channels"]
        first = torch.arange(E)[:, None] * (C if experts["storage"] == "separate" else 0)
        table_EC = (first + torch.arange(C)).to(torch.int32)
        self.readme = nn.Module()
        self.readme.register_buffer("experts", table_EC.repeat(config.num_hidden_layers, 1, 1))
        if router is not None:
            theta, layers = config.rope_parameters["rope_theta"], config.num_hidden_layers
            self.readme.router = ReadMeRouter(config.vocab_size, E, theta, layers, router)
        for i, layer in enumerate(self.model.layers):
            layer.mlp = ReadMeMLP(layer.mlp, i)
        self.post_init()

    @torch.no_grad()
    def route(self, input_ids, attention_mask=None, position_ids=None, cache=None) -> torch.Tensor:
        """Expert ids, int32 [B, T], of the tokens `input_ids` [B, T]; the first of equal logits wins.

        With a cache the tokens' router keys and values are added to it: pass a cache only from `forward`.
        """
        router = getattr(self.readme, "router", None)
        if router is None:
            if self.readme.experts.shape[1] > 1:
                raise ValueError(f"{self.readme.experts.shape[1]} experts and no router: pass expert_ids")
            return torch.zeros_like(input_ids, dtype=torch.int32)
        logits_BTE = router(input_ids, attention_mask, position_ids, cache)
        return logits_BTE.argmax(-1).to(torch.int32)

    def resize_token_embeddings(self, *args, **kwargs):
        """As in transformers, for the router's table too: its new rows are the mean of the old ones."""
        resized = super().resize_token_embeddings(*args, **kwargs)
        router = getattr(self.readme, "router", None)
        if router is not None:
            old_VR = router.embedding.weight.data
            more = max(resized.num_embeddings - len(old_VR), 0)
            rows_VR = torch.cat((old_VR, old_VR.mean(0, keepdim=True).expand(more, -1)))[: resized.num_embeddings]
            router.embedding = nn.Embedding.from_pretrained(rows_VR.clone(), freeze=False)
        return resized

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        expert_ids: torch.Tensor | None = None,
        cache=None,
        **kwargs,
    ):
        """The family's forward with every token in one expert.

        `cache` and `past_key_values` are one thing under two names, of transformers 5.24 and of those before.

        `expert_ids`: integers that broadcast to [B, T], in place of the router's choice.
        `inputs_embeds`: only when no router has to run, since the router reads token ids.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        routed = hasattr(self.readme, "router")
        # With a cache the router runs even beside given experts: its keys and values must keep up with the backbone's.
        route = expert_ids is None or (routed and cache is not None)
        if route and routed and input_ids is None:
            raise ValueError(
                "inputs_embeds without input_ids: the router reads token ids; pass input_ids, "
                "or expert_ids with use_cache=False"
            )
        chosen = None
        if route:
            chosen = self.route(tokens, attention_mask, position_ids, cache)
        if expert_ids is not None:
            if expert_ids.is_floating_point():
                raise ValueError(f"expert_ids has dtype {expert_ids.dtype}; integers are needed")
            chosen = expert_ids.to(torch.int32).broadcast_to(tokens.shape)
        token = _ROUTED.set((chosen, self.readme.experts))
        try:
            out = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **{_CACHE: cache},
                **kwargs,
            )
        finally:
            _ROUTED.reset(token)
        return out if isinstance(out, tuple) else ReadMeOutput(**out, expert_ids=chosen)


class ReadMeLlamaForCausalLM(ReadMeMixin, LlamaForCausalLM):
    config_class = ReadMeLlamaConfig


class ReadMeMistralForCausalLM(ReadMeMixin, MistralForCausalLM):
    config_class = ReadMeMistralConfig


class ReadMeQwen2ForCausalLM(ReadMeMixin, Qwen2ForCausalLM):
    config_class = ReadMeQwen2Config


class ReadMeQwen3ForCausalLM(ReadMeMixin, Qwen3ForCausalLM):
    config_class = ReadMeQwen3Config
