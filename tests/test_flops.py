"""FLOPs per token against XLA's own count of the unrolled step (its cost analysis counts a loop's body once)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax import flops, optim, steps
from readme_jax.alternate import ExpertPhase, RouterPhase
from readme_jax.config import ExpertConfig, ModelConfig, RouterConfig
from readme_jax.labels import LabelConfig
from readme_jax.losses import HeadLoss
from readme_jax.models import backbone, router
from readme_jax.models.experts import make_table
from readme_jax.sharding import put

CFG = ModelConfig(
    family="llama", vocab=384, embed=96, mlp=192, layer=4, head=4, kv_head=2, head_dim=32, norm_eps=1e-5,
    rope_theta=10000.0, max_position=512, tied=True,
)  # fmt: skip
EXPERTS = ExpertConfig(
    experts=4, channels=96, storage="tied", names=("a", "b", "c", "d"), importance="energy", carving="domain"
)
ROUTER = RouterConfig(width=96, heads=4, layers=2)
BATCH, SEQ = 2, 128
TX = optim.make(optim.OptimConfig(lr=1e-3), 1)


@pytest.fixture
def counted(monkeypatch, mesh):
    """Counts of XLA for a jitted function: every loop unrolled."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))

    def count(function, *args) -> float:
        return function.lower(*args).cost_analysis()["flops"]

    return count


def table():
    rng = np.random.default_rng(0)
    picks = [[np.sort(rng.permutation(CFG.mlp)[: EXPERTS.channels]) for _ in range(4)] for _ in range(CFG.layer)]
    picks[0][0][-1] = CFG.mlp - 1  # so that U is F
    return make_table(np.array(picks), CFG.mlp)


def zeros(tree):
    return jax.tree.map(lambda a: put(np.zeros(a.shape, a.dtype)), tree)


def batch(accum: int = 1) -> dict:
    ids_ABT = np.ones((accum, BATCH, SEQ), np.int32)
    return {"ids": put(ids_ABT), "segments": put(ids_ABT)}


@pytest.mark.parametrize(
    ("fields", "accum"),
    [
        ({}, 1),
        ({"kd_weight": 0.0, "ce_weight": 1.0}, 2),
        ({"tuned": "ffn"}, 1),
        ({"way": "grouped"}, 1),
    ],
    ids=["distilled", "next-token", "ffn", "grouped"],
)
def test_expert_step(counted, fields, accum):
    phase = ExpertPhase(steps=1, batch=BATCH, accum=accum, **fields)
    params = zeros(backbone.abstract_params(CFG))
    student, frozen = steps.split_tuned(params, phase.tuned)
    step = steps.make_expert_step(CFG, HeadLoss(phase.kd_weight, phase.ce_weight, 64), TX)
    # equal shares, so that `grouped` has no empty rows
    route = steps.plan(np.arange(accum * BATCH * SEQ).reshape(accum, BATCH, SEQ) % 4, 4, phase.way, put=put)
    teacher = params if phase.kd_weight else None
    got = counted(step, steps.start(student, TX), frozen, teacher, table(), batch(accum) | {"route": route})
    ours = flops.train_flops_per_token(CFG, EXPERTS, phase, SEQ) * accum * BATCH * SEQ
    assert got == pytest.approx(ours, rel=0.1)


def test_router_step_and_labels(counted):
    phase = RouterPhase(steps=1, batch=BATCH, shape=ROUTER, teacher="current")
    params = zeros(router.abstract_params(ROUTER, CFG.vocab, 4))
    step = steps.make_router_step(ROUTER, CFG.rope_theta, TX)
    target = put(np.full((1, BATCH, SEQ, 4), 0.25, np.float32))
    got = counted(step, steps.start(params, TX), batch() | {"target": target})
    whole = zeros(backbone.abstract_params(CFG))
    ids_BT = jnp.ones((BATCH, SEQ), jnp.int32)
    labels = counted(steps.make_label(CFG, LabelConfig()), whole, table(), ids_BT, ids_BT)
    # the table's AdamW update, 13 operations a number, is as large as the matmuls of so short a batch
    updated = 13 * sum(a.size for a in jax.tree.leaves(params))
    tokens = BATCH * SEQ
    assert labels == pytest.approx(flops.label_flops(CFG, 4, SEQ) * tokens, rel=0.1)
    ours = flops.train_flops_per_token(CFG, EXPERTS, phase, SEQ) * tokens
    assert got + labels - updated == pytest.approx(ours, rel=0.1)
    cached = RouterPhase(steps=1, batch=BATCH, shape=ROUTER)
    alone = flops.train_flops_per_token(CFG, EXPERTS, cached, SEQ)
    assert alone == pytest.approx(3 * flops.router_flops(ROUTER, 4, SEQ))
    assert got - updated == pytest.approx(alone * tokens, rel=0.1)


def test_the_papers_router():
    """About 3.15 MFLOP per token at width 512 (paper, table 1), without the scores."""
    assert flops.router_flops(RouterConfig(), 7, 0) == pytest.approx(3.15e6, rel=0.01)


def test_masked_runs_what_any_expert_has():
    phase = ExpertPhase(steps=1, batch=1)
    most = flops.train_flops_per_token(CFG, EXPERTS, phase, SEQ)
    used = flops.train_flops_per_token(CFG, EXPERTS, phase, SEQ, used=150)
    assert most - used == pytest.approx(3 * CFG.layer * 6 * CFG.embed * (192 - 150))
    own = flops.train_flops_per_token(CFG, EXPERTS, ExpertPhase(steps=1, batch=1, way="grouped"), SEQ)
    assert own == pytest.approx(flops.train_flops_per_token(CFG, EXPERTS, phase, SEQ, used=96))
