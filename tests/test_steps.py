"""The jitted steps of training: accumulation, what is frozen, one compile, and the same result on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles_core import head_loss, packed, random_params, random_table

from readme_jax import losses, optim, steps
from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.losses import HeadLoss
from readme_jax.models import backbone, router
from readme_jax.models.experts import Masked, make_table
from readme_jax.sharding import MeshConfig, put, spec, use_mesh

E, T = 4, 24
ROUTER = RouterConfig(width=16, heads=2)
HEAD = HeadLoss(kd=0.8, ce=0.3, chunk=10)
ADAM = optim.OptimConfig(lr=1e-2)
# Rows of different lengths: microbatches of unequal token counts. The last row of the first two is padding only.
ROWS = [[24], [10, 14], [5], [3, 4], [20], []]


CFG = ModelConfig(
    family="qwen3", vocab=64, embed=16, mlp=24, layer=2, head=4, kv_head=2, head_dim=8, norm_eps=1e-5,
    rope_theta=10000.0, max_position=64, tied=True, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True,
    windows=(0, 8),
)  # fmt: skip


def draw(cfg):
    """Everything a step needs, in NumPy: student, teacher, router, table, a batch [6, T] and its experts."""
    ids, segments = packed(ROWS, T, cfg.vocab)
    rng = np.random.default_rng(0)
    return {
        "params": random_params(backbone.abstract_params(cfg), seed=1),
        "teacher": random_params(backbone.abstract_params(cfg), seed=2),
        "router": random_params(router.abstract_params(ROUTER, cfg.vocab, E), seed=3),
        "table": random_table(cfg.layer, E, 12, cfg.mlp),
        "ids": ids,
        "segments": segments,
        "expert": rng.integers(0, E, ids.shape).astype(np.int32),
        "target": rng.dirichlet(np.ones(E), ids.shape).astype(np.float32),
    }


@pytest.fixture(scope="module")
def cfg():
    return CFG


@pytest.fixture(scope="module")
def host():
    return draw(CFG)


def place_ABT(array, accum=1):
    """[B, T, ...] -> [accum, B / accum, T, ...] on the mesh, rows split over the batch axes."""
    array = array.reshape(accum, -1, *array.shape[1:])
    return put(array, jax.P(None, *spec("batch", *["seq"] * (array.ndim - 2))))


def router_batch(host, accum=1):
    return {name: place_ABT(host[name], accum) for name in ("ids", "segments", "target")}


def expert_batch(host, accum=1, way="masked"):
    expert = host["expert"].reshape(accum, -1, T)
    on_mesh = (lambda a: place_ABT(a.reshape(-1, T), accum)) if way == "masked" else put
    batch = {name: place_ABT(host[name], accum) for name in ("ids", "segments")}
    return batch | {"route": steps.plan(expert, E, way, put=on_mesh)}


def assert_close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)


def types(tree):
    return [str(jax.typeof(leaf)) for leaf in jax.tree.leaves(tree)]


router_logits = jax.jit(
    lambda router_cfg, theta, params, ids, segments: router.logits(router_cfg, params, ids, segments, theta),
    static_argnums=(0, 1),
)

# SGD with rate 1 moves parameters by exactly the gradient: comparing them compares gradients, which Adam would hide.
SGD = optax.sgd(1.0)


# A step compiles for seconds: tests that can share one do.
router_step = functools.cache(steps.make_router_step)
expert_step = functools.cache(steps.make_expert_step)


def test_router_accumulation_is_one_big_batch(mesh, cfg, host):
    step = router_step(ROUTER, cfg.rope_theta, SGD)
    results = []
    for accum in (1, 3):
        phase = steps.start(jax.tree.map(put, host["router"]), SGD)
        phase, means = step(phase, router_batch(host, accum))
        assert int(phase.step) == 1
        results.append((phase.params, means))
    assert_close(*results)
    logits = router_logits(ROUTER, cfg.rope_theta, jax.tree.map(put, host["router"]), host["ids"], host["segments"])
    logp, real = np.asarray(jax.nn.log_softmax(logits, -1)), host["segments"] > 0
    means = results[0][1]
    assert float(means["loss"]) == pytest.approx(-(host["target"] * logp).sum(-1)[real].mean(), rel=1e-5)
    agree = logp.argmax(-1) == host["target"].argmax(-1)
    assert float(means["agreement"]) == pytest.approx(agree[real].mean(), rel=1e-6)


def test_balance_adds_its_gradient(mesh, cfg, host):
    """One step of rate 1 with the term is one without, less its gradient; the metric is the term by hand."""
    params, batch = jax.tree.map(put, host["router"]), router_batch(host, 1)
    moved = []
    for balance in ((), (0.5,)):
        phase = steps.start(jax.tree.map(put, host["router"]), SGD)
        phase, means = router_step(ROUTER, cfg.rope_theta, SGD, *balance)(phase, batch)
        moved.append(phase.params)
    weight_BT = (host["segments"] > 0).astype(np.float32)

    @jax.jit
    def term(params):
        logits_BTE = router.logits(ROUTER, params, batch["ids"][0], batch["segments"][0], cfg.rope_theta)
        return losses.balance_loss(logits_BTE, batch["segments"][0] > 0), logits_BTE

    gradient, logits_BTE = jax.jit(jax.grad(term, has_aux=True))(params)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-4
    assert_close(moved[1], jax.tree.map(lambda p, g: p - 0.5 * g, moved[0], gradient))
    logits_BTE = np.asarray(logits_BTE, np.float64)
    odds_BTE = np.exp(logits_BTE - logits_BTE.max(-1, keepdims=True))
    chance_ME = (odds_BTE / odds_BTE.sum(-1, keepdims=True))[weight_BT > 0]
    load_E = np.bincount(chance_ME.argmax(-1), minlength=chance_ME.shape[-1]) / len(chance_ME)
    assert float(means["balance"]) == pytest.approx(len(load_E) * (load_E * chance_ME.mean(0)).sum(), rel=1e-5)
    assert "balance" not in router_step(ROUTER, cfg.rope_theta, SGD)(steps.start(params, SGD), batch)[1]


def test_expert_accumulation_is_one_big_batch_and_grouped_is_masked(mesh, cfg, host):
    step = expert_step(cfg, HEAD, SGD)
    teacher, table = backbone.place(cfg, host["teacher"]), make_table(host["table"], cfg.mlp)
    results = []
    for accum, way in ((1, "masked"), (3, "grouped")):
        phase = steps.start(backbone.place(cfg, host["params"]), SGD)
        phase, means = step(phase, {}, teacher, table, expert_batch(host, accum, way))
        results.append((phase.params, means))
    assert_close(*results)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max() > 1e-6, results[0][0], host["params"])
    assert all(jax.tree.leaves(moved)) or not moved["layers"].pop("b_k"), (
        "every parameter has a gradient (b_k has none)"
    )

    @functools.partial(jax.jit, static_argnums=1)
    def hidden(params, routed):
        route = Masked(host["expert"]) if routed else None
        return backbone.forward(cfg, params, host["ids"], host["segments"], table=table, route=route)[0]

    student = backbone.place(cfg, host["params"])
    x_BTD, teacher_BTD = np.asarray(hidden(student, True)), np.asarray(hidden(teacher, False))
    same = (host["segments"][:, :-1] == host["segments"][:, 1:]) & (host["segments"][:, :-1] > 0)
    arrays = (x_BTD[:, :-1][same], host["teacher"]["embedding"], teacher_BTD[:, :-1][same], host["ids"][:, 1:][same])
    total, kl, ce = head_loss(host["params"]["embedding"], *arrays, np.ones(same.sum()), HEAD.kd, HEAD.ce)
    means = results[0][1]
    for name, expected in (("loss", total), ("kl", kl), ("ce", ce)):
        assert float(means[name]) == pytest.approx(expected / same.sum(), rel=1e-5), name


def test_expert_phase_tunes_the_ffn_only_compiles_once_and_learns(mesh, cfg, host):
    tx = optim.make(ADAM, 1000)
    step = steps.make_expert_step(cfg, HeadLoss(kd=0.0, ce=1.0, chunk=24), tx)
    whole = backbone.place(cfg, host["params"])
    tuned, frozen = steps.split_tuned(whole, "ffn")
    table, batch = make_table(host["table"], cfg.mlp), expert_batch(host)
    assert set(tuned) == {"layers"} and set(tuned["layers"]) == set(steps.FFN)
    before, frozen_before = types(tuned), jax.tree.map(np.array, frozen)
    first = {name: np.array(value) for name, value in tuned["layers"].items()}
    phase, seen = steps.start(tuned, tx), []
    state_before = types(phase)
    for _ in range(40):
        phase, means = step(phase, frozen, None, table, batch)
        seen.append(float(means["loss"]))
    assert step._cache_size() == 1
    assert types(phase.params) == before and types(phase) == state_before
    assert int(phase.step) == 40
    jax.tree.map(np.testing.assert_array_equal, frozen, frozen_before)
    assert all((np.asarray(phase.params["layers"][name]) != value).any() for name, value in first.items())
    assert seen[-1] < 0.5 * seen[0], seen[::10]


def test_router_phase_compiles_once_and_learns(mesh, cfg, host):
    tx = optim.make(ADAM, 1000)
    step = steps.make_router_step(ROUTER, cfg.rope_theta, tx)
    phase = steps.start(jax.tree.map(put, host["router"]), tx)
    before, seen = types(phase), []
    batch = router_batch(host | {"target": np.eye(E, dtype=np.float32)[host["ids"] % E]})
    for _ in range(60):
        phase, means = step(phase, batch)
        seen.append(float(means["loss"]))
    assert step._cache_size() == 1
    assert types(phase) == before
    assert seen[-1] < 0.1 * seen[0] and float(means["agreement"]) > 0.95
    route = steps.make_route(ROUTER, cfg.rope_theta)
    expert_ABT = np.asarray(route(phase.params, batch["ids"], batch["segments"]))
    real = host["segments"] > 0
    assert np.mean((expert_ABT[0] == host["ids"] % E)[real]) > 0.95


def test_bf16_and_remat_keep_float32_masters(mesh, cfg, host):
    teacher, table = backbone.place(cfg, host["teacher"]), make_table(host["table"], cfg.mlp)
    losses = []
    for options in ({}, {"dtype": jnp.bfloat16, "remat": "full"}):
        step = expert_step(cfg, HEAD, SGD, **options)
        phase, means = step(
            steps.start(backbone.place(cfg, host["params"]), SGD), {}, teacher, table, expert_batch(host)
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(phase.params)} == {np.dtype(np.float32)}
        losses.append(float(means["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_bfloat16_parameters_train_where_they_lie(cfg, host):
    """All in bfloat16 that can be, two microbatches, four devices: types stay, one compile, the loss falls."""
    few = {name: array[:4] if name in ("ids", "segments", "expert") else array for name, array in host.items()}
    tx = optim.make(optim.OptimConfig(lr=1e-2, params="bfloat16", mu_dtype="bfloat16"), 1000, seed=1)
    step, losses = steps.make_expert_step(cfg, HEAD, tx, dtype=jnp.bfloat16), []
    with use_mesh(MeshConfig(data=2, model=2)):
        student, teacher = (optim.cast(backbone.place(cfg, host[name]), jnp.bfloat16) for name in ("params", "teacher"))
        phase, table = steps.start(student, tx), make_table(host["table"], cfg.mlp)
        before, batch = types(phase), expert_batch(few, accum=2)
        kinds = [str(leaf.dtype) for leaf in jax.tree.leaves(phase) if leaf.ndim]
        assert kinds.count("bfloat16") == 2 * kinds.count("float32") > 0, "parameters and first moment; second moment"
        for _ in range(10):
            phase, means = step(phase, {}, teacher, table, batch)
            losses.append(float(means["loss"]))
        assert types(phase) == before and step._cache_size() == 1
    assert losses[-1] < 0.9 * losses[0]


def test_a_bfloat16_teacher_says_the_same_in_bfloat16(mesh, cfg, host):
    step = expert_step(cfg, HEAD, SGD, dtype=jnp.bfloat16, remat="full")
    teacher, table = backbone.place(cfg, host["teacher"]), make_table(host["table"], cfg.mlp)
    results = []
    for kind in (jnp.float32, jnp.bfloat16):
        phase = steps.start(backbone.place(cfg, host["params"]), SGD)
        phase, means = step(phase, {}, optim.cast(teacher, kind), table, expert_batch(host))
        results.append(phase.params | {"means": means})
    assert_close(*results, tolerance=1e-6)


@pytest.mark.parametrize("tuned", ["all", "ffn"])
def test_join_inverts_split(host, tuned):
    params = host["params"]
    part, rest = steps.split_tuned(params, tuned)
    joined = steps.join(part, rest)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True))
    assert len(jax.tree.leaves(part)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(params))
