"""A runner without an engine: small routed folders of every family, and a loop that feeds it any mix of work."""

import dataclasses
import json

import numpy as np
from oracles_core import random_params, random_table

from readme_jax import hf
from readme_jax.config import ExpertConfig, ModelConfig, RopeScaling, RouterConfig
from readme_jax.models import backbone, expert_pages, router
from readme_jax.serving.bank import Bank
from readme_jax.serving.policies import Limits
from readme_jax.serving.request import Batch, Request, SamplingParams, Work
from readme_jax.serving.residency import Residency
from readme_jax.serving.runner import Runner

PAGE, CHANNEL_PAGE, CONTEXT, VOCAB, EXPERTS = 4, 8, 160, 150, 5

BASE = ModelConfig(
    family="llama", vocab=VOCAB, embed=32, mlp=48, layer=3, head=4, kv_head=2, head_dim=8, norm_eps=1e-5,
    rope_theta=10000.0, max_position=512, tied=True,
)  # fmt: skip
FAMILIES = {
    "llama": BASE,
    "llama3": dataclasses.replace(
        BASE, kv_head=4, tied=False, rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_max_position=64)
    ),
    "llama biases": dataclasses.replace(
        BASE, kv_head=1, qkv_bias=True, out_bias=True, mlp_bias=True,
        rope_scaling=RopeScaling(kind="linear", factor=2.0),
    ),
    "mistral": dataclasses.replace(BASE, family="mistral", windows=(20, 20, 20), tied=False),
    "qwen2": dataclasses.replace(BASE, family="qwen2", qkv_bias=True, windows=(0, 9, 0)),
    "qwen3": dataclasses.replace(BASE, family="qwen3", qk_norm=True, head_dim=16),
}  # fmt: skip


def write(folder, cfg, *, storage="tied", experts=EXPERTS, routed=True, seed=0):
    """A model folder with random weights (vectors too), experts and router."""
    params = random_params(backbone.abstract_params(cfg), seed=seed)
    if storage == "separate":
        channels = cfg.mlp // experts
        table_LEC = np.arange(experts * channels).reshape(1, experts, channels).repeat(cfg.layer, 0)
    else:
        channels = cfg.mlp // 2
        table_LEC = np.asarray(random_table(cfg.layer, experts, channels, cfg.mlp))
    carved = ExpertConfig(
        experts=experts, channels=channels, storage=storage, names=tuple(f"e{i}" for i in range(experts)),
        importance="energy", carving="domain" if experts > 1 else "static",
    )  # fmt: skip
    shape = RouterConfig(width=16, heads=2, layers=2) if routed else None
    gate = random_params(router.abstract_params(shape, cfg.vocab, experts), seed=seed + 1) if shape else None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf.config_to_hf(cfg, {}, carved, shape)))
    with hf.Writer(folder) as writer:
        hf.save_params(writer, cfg, params, table_LEC.astype(np.int32), gate)
    return folder


def bank_of(folder, page=CHANNEL_PAGE, itemsize=4):
    cfg, carved, _ = hf.read_config(folder)
    table_LEC = hf.load_params(folder)[1]
    return Bank.from_table(
        table_LEC, cfg.mlp, row_bytes=3 * cfg.embed * itemsize, page=page, separate=carved.storage == "separate"
    )


class Loop:
    """One runner and what an engine would do around it: pages, residency, loads, in the simplest way."""

    def __init__(
        self, folder, *, share=1.0, seed=0, limits=None, dtype="float32", policy="lookahead", page=CHANNEL_PAGE,
        resident=False,
    ):  # fmt: skip
        kv_pages = 400
        self.bank = bank_of(folder, page, itemsize=4 if dtype == "float32" else 2)
        least = self.bank.least("layer") * self.bank.page_bytes
        budget = max(int(share * self.bank.total_bytes), least)
        self.residency = Residency(self.bank, budget, policy=policy)
        self.rng = np.random.default_rng(seed)
        limits = limits or Limits(batch_requests=4, batch_tokens=64, chunk=16)
        self.runner = Runner(
            folder, self.bank, slots=self.residency.slots, kv_pages=kv_pages, kv_page=PAGE, router_pages=kv_pages,
            limits=limits, context=CONTEXT, dtype=dtype, load_sizes=(2, 8), resident=resident,
        )  # fmt: skip
        if resident:
            self.residency.fill()
        self.runner.compile(progress=False)
        gate, up, down = self.runner.host_weights
        layers = {"w_gate": gate, "w_up": up, "w_down": down}
        self.host = expert_pages.host_pages(layers, self.bank.order_LR, self.bank.page)
        self.kv, self.router_kv = (self.rng.permutation(kv_pages).tolist() for _ in range(2))

    def load(self, items, slots):
        """Loads of one pass, in pieces of the runner's sizes."""
        size = self.runner.load_sizes[-1] if len(items) > 4 else self.runner.load_sizes[0]
        for start in range(0, len(items), size):
            part = items[start : start + size]
            pages = np.zeros((size, *self.host.shape[1:]), self.host.dtype)
            pages[: len(part)] = self.host[part]
            self.runner.insert(slots[start : start + size], self.runner._put(pages))

    def request(self, prompt, **sampling):
        sampling = {"choice": 0} | sampling
        choice = sampling.pop("choice")
        request = Request(list(prompt), SamplingParams(**sampling), choice=choice)
        count = -(-CONTEXT // PAGE)
        pages, router_pages = ([pool.pop() for _ in range(count)] for pool in (self.kv, self.router_kv))
        request.pages, request.router_pages = pages, router_pages
        request.experts = self.runner.fetch_experts(self.runner.route(request.tokens, 0, router_pages))
        return request

    def step(self, works, future=()):
        batch = Batch(tuple(works))
        plan = self.residency.plan(batch.experts, future)
        flight = self.runner.step(batch, plan, lambda n: self.load(*plan.loads_of(n)[:2]))
        scores = self.runner.fetch(flight)
        for work, score in zip(works, scores):
            request = work.request
            request.computed += work.count
            assert (score is not None) == work.samples
            if score is not None:
                request.tokens.append(score.token)
                request.experts.append(score.expert)
        return scores

    def run(self, requests, most=4):
        """All requests to their end, in random batches with pieces of prompts of random length."""
        scores = {id(request): [] for request in requests}
        while live := [r for r in requests if r.generated < r.sampling.max_new_tokens]:
            chosen = [live[i] for i in self.rng.permutation(len(live))[: self.rng.integers(1, most + 1)]]
            works = []
            for request in chosen:
                count = int(min(request.left, self.rng.integers(1, 17)))
                works.append(Work(request, request.computed, count))
            for work, score in zip(works, self.step(works)):
                if score is not None:
                    scores[id(work.request)].append(score)
        for request in requests:
            self.kv += request.pages
            self.router_kv += request.router_pages
        return [scores[id(request)] for request in requests]
