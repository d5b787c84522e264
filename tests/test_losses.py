"""Labels and losses against NumPy transcriptions of METHOD section 3, and gradients against plain jnp."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles_core import energy_share, log_softmax, overlap_dist, packed, paper_router_loss, random_params, random_table
from oracles_core import head_loss as head_oracle

from readme_jax import labels, losses
from readme_jax.config import ConfigError
from readme_jax.labels import PAPER_LABELS, LabelConfig
from readme_jax.losses import HeadLoss
from readme_jax.models import backbone
from readme_jax.models.experts import make_table
from readme_jax.models.layers import ACTIVATION
from readme_jax.routing import membership
from readme_jax.sharding import MeshConfig, put, spec, use_mesh
from readme_jax.steps import make_label

B, T, F, D, E, C, L, V = 2, 40, 60, 32, 4, 36, 3, 50


# ---- rank ---------------------------------------------------------------------------------------


def awkward(rng, rows, width):
    """Rows of floats with ties, zeros of both signs, negatives, and magnitudes from 1e-30 to 1e30."""
    x = rng.normal(size=(rows, width)) * 10.0 ** rng.integers(-30, 31, (rows, width))
    x[0] = rng.normal(size=width)
    x[1] = rng.integers(-2, 3, width)
    x[2] = rng.choice([0.0, -0.0], width)
    x[3] = rng.choice([0.0, -0.0, 1.0, -1.0], width)
    x[4] = -np.abs(x[4])
    x[5] = 3.0
    return x.astype(np.float32)


def test_kth_largest_is_the_sorted_value(mesh):
    kth = jax.jit(labels.kth_largest)
    x = awkward(np.random.default_rng(0), 12, 33)
    for rank in (0, 1, 15, 31, 32):
        np.testing.assert_array_equal(kth(x, rank), -np.sort(-x, axis=-1)[:, rank : rank + 1])  # 0.0 == -0.0 here
    half = kth(jnp.asarray(x[:1], jnp.bfloat16), 4)
    assert half.dtype == jnp.float32 and float(half[0, 0]) == np.sort(np.asarray(x[0], jnp.bfloat16))[-5]


# ---- router labels ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def activations():
    """Activations of L layers, their experts (the first six channels are common to all) and router logits."""
    rng = np.random.default_rng(1)
    h = rng.normal(size=(L, B, T, F)).astype(np.float32) * np.exp(rng.normal(size=(L, 1, 1, F))).astype(np.float32)
    table = np.stack([random_table(1, E, C - 6, F - 6, seed=layer)[0] + 6 for layer in range(L)])
    table = np.concatenate([np.broadcast_to(np.arange(6, dtype=np.int32), (L, E, 6)), table], -1)
    return h, table, rng.normal(size=(B, T, E)).astype(np.float32)


def labels_of(config, h, table_LEC, w_down=None):
    """Target distribution from given activations, as a dense run would collect it."""
    table, tap = make_table(table_LEC, F), labels.label_tap(config)
    w_down = jnp.zeros((L, F, D)) if w_down is None else jnp.asarray(w_down)

    @jax.jit
    def run(h, w_down, table):
        seen_LBTE = jax.lax.map(
            lambda layer: tap(layer[0], SimpleNamespace(w_down=layer[1]), layer[2]), (h, w_down, table)
        )
        return labels.combine_layers(seen_LBTE, config)

    return run(h, w_down, table)


def test_paper_labels_give_the_reference_loss(mesh, activations):
    h, table, logits = activations
    target = labels_of(PAPER_LABELS, h, table)
    total, weight = losses.router_loss(logits, target, jnp.ones((B, T)))
    reference = paper_router_loss(h.reshape(L, -1, F), membership(table, F), logits.reshape(-1, E))
    # The loss is linear in the label, so the reference's SUM of the layers' losses is L times the loss of the MEAN
    # label: the same gradient direction, a learning rate that does not depend on the depth.
    assert float(total / weight) == pytest.approx(reference / L, rel=1e-6)
    np.testing.assert_allclose(np.sum(target, -1), 1, rtol=1e-6)


def test_the_first_expert_alone_gives_n(mesh, activations):
    """n is the width of expert 0's exclusive mask, whatever the others have: a table of unequal exclusive widths."""
    h, table, _ = activations
    mask_EF = membership(table, F)[0].copy()
    mask_EF[0, 30:] = False
    exclusive = mask_EF & ~mask_EF.all(0)
    assert len({int(row.sum()) for row in exclusive}) > 1
    for signed in (True, False):
        score = jax.jit(labels.overlap_score, static_argnums=2)(h[0], exclusive, signed)
        dist = overlap_dist(h[0].reshape(-1, F).astype(np.float64), exclusive, signed)
        score = np.asarray(score, np.float64).reshape(-1, E)
        got = 10 * (score - score.mean())
        np.testing.assert_allclose(got, dist, atol=1e-5)


def test_unsigned_overlap_ranks_magnitudes(mesh, activations):
    h, table, _ = activations
    unsigned = LabelConfig(kind="overlap", hard_weight=0.75, soft_weight=0.25, label_smoothing=0.5, temperature=0.1)
    np.testing.assert_array_equal(labels_of(unsigned, h, table), labels_of(PAPER_LABELS, np.abs(h), table))
    assert (np.asarray(labels_of(unsigned, h, table)) != np.asarray(labels_of(PAPER_LABELS, h, table))).any()


@pytest.mark.parametrize(
    "config",
    [LabelConfig(), LabelConfig(hard_weight=0.4, soft_weight=0.6, label_smoothing=0.2, temperature=0.3)],
    ids=["default", "mixed"],
)
def test_energy_labels_match_numpy(mesh, activations, config):
    h, table, _ = activations
    w_down = np.random.default_rng(2).normal(size=(L, F, D)).astype(np.float32)
    share = np.mean([energy_share(h[i].reshape(-1, F), w_down[i], table[i]) for i in range(L)], 0)
    soft = np.exp(log_softmax(share / config.temperature))
    hard = np.eye(E)[share.argmax(-1)] * (1 - config.label_smoothing) + config.label_smoothing / E
    expected = config.hard_weight * hard + config.soft_weight * soft
    got = labels_of(config, h, table, w_down)
    np.testing.assert_allclose(got, expected.reshape(B, T, E), rtol=2e-5, atol=1e-6)


def test_label_of_a_dense_run(mesh, tiny_cfg):
    """make_label taps the activations of the backbone itself, also where no expert has the last channels."""
    params = backbone.place(tiny_cfg, random_params(backbone.abstract_params(tiny_cfg)))
    ids, segments = packed([[80], [50]], 80, tiny_cfg.vocab)
    table_LEC = random_table(2, E, 20, 40, seed=7)
    table = make_table(table_LEC, tiny_cfg.mlp)
    _, h = jax.jit(lambda p: backbone.forward(tiny_cfg, p, ids, segments, tap=lambda h, *_: h))(params)
    h_LMF = np.asarray(h).reshape(2, -1, tiny_cfg.mlp)
    share = np.mean([energy_share(h_LMF[i], params["layers"]["w_down"][i], table_LEC[i]) for i in range(2)], 0)
    got = make_label(tiny_cfg, LabelConfig(temperature=0.1))(params, table, ids, segments)
    expected = np.exp(log_softmax(share / 0.1)).reshape(*ids.shape, E)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    paper = make_label(tiny_cfg, PAPER_LABELS)(params, table, ids, segments)
    logits = np.random.default_rng(0).normal(size=paper.shape)
    total, weight = losses.router_loss(jnp.asarray(logits, jnp.float32), paper, jnp.ones(ids.shape))
    mask = membership(table_LEC, tiny_cfg.mlp)
    reference = paper_router_loss(h_LMF, mask, logits.reshape(-1, E))
    assert float(total / weight) == pytest.approx(reference / 2, rel=1e-5)


def test_router_loss_leaves_out_weightless_tokens():
    rng = np.random.default_rng(3)
    logits, weight = rng.normal(size=(B, T, E)), rng.integers(0, 2, (B, T)).astype(float)
    target = rng.dirichlet(np.ones(E), (B, T))
    expected = -(target * log_softmax(logits)).sum(-1)[weight > 0].sum()
    total, count = losses.router_loss(*(jnp.asarray(a, jnp.float32) for a in (logits, target, weight)))
    assert float(total) == pytest.approx(expected, rel=1e-5) and float(count) == weight.sum()


def test_label_config_refusals():
    for bad in ({"temperature": 0.0}, {"label_smoothing": 1.0}, {"hard_weight": -1.0}, {"soft_weight": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            LabelConfig(**bad)


# ---- next token ---------------------------------------------------------------------------------


def test_next_token_stops_at_document_borders():
    ids = np.array([[5, 6, 7, 8, 9, 3], [4, 4, 2, 2, 1, 1]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]], np.int32)
    target, weight = losses.next_token(ids, segments)
    np.testing.assert_array_equal(weight, [[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 0]])
    assert weight.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(target)[np.asarray(weight) > 0], [6, 7, 9, 2, 2, 1, 1])


def case(seed=0):
    rng = np.random.default_rng(seed)
    head, teacher_head = rng.normal(size=(2, V, D)).astype(np.float32) / 3
    x, teacher = rng.normal(size=(2, B, T, D)).astype(np.float32)
    target = rng.integers(0, V, (B, T)).astype(np.int32)
    weight = (rng.random((B, T)) * rng.integers(0, 2, (B, T))).astype(np.float32)  # fractions, and zeros
    return head, put(x, ACTIVATION), teacher_head, put(teacher, ACTIVATION), target, weight


def plain_head_loss(static, head, x, teacher_head, teacher, target, weight):
    """All logits at once, differentiated by JAX."""
    logp = jax.nn.log_softmax(x @ head.T, -1)
    logq = jax.nn.log_softmax(teacher @ teacher_head.T, -1)
    kl = jnp.sum(jnp.exp(logq) * (logq - logp), -1)
    nll = -jnp.sum(jax.nn.one_hot(target, V) * logp, -1)
    return jnp.sum((static.kd * kl + static.ce * nll) * weight)


@pytest.mark.parametrize("kd, ce, chunk", [(1.0, 0.0, 16), (0.0, 1.0, 1000), (0.7, 0.2, 16)])
def test_head_loss_value_and_gradients(mesh, kd, ce, chunk):
    static, args = HeadLoss(kd, ce, chunk), case()
    head, x, teacher_head, teacher, target, weight = args
    x_MD, teacher_MD = (np.asarray(a).reshape(-1, D) for a in (x, teacher))
    flat = (head, x_MD, teacher_head, teacher_MD, target.reshape(-1), weight.reshape(-1))
    expected, kl, nll = head_oracle(*flat, kd, ce)
    said = losses.Dense(teacher, teacher_head) if kd else None
    total, parts = jax.jit(losses.head_loss, static_argnums=0)(static, head, x, said, target, weight)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(parts["ce"]) == pytest.approx(nll, rel=1e-5)
    assert float(parts["kl"]) == pytest.approx(kl if kd else 0.0, rel=1e-5)

    # tied: x depends on the head as well, and the loss is scaled by what comes after it
    def tied(loss, *teachers):
        def f(head, x):
            return 3.0 * loss(static, head, x + jnp.tanh(head[target]), *teachers, target, weight)

        return jax.jit(jax.grad(f, argnums=(0, 1)))(head, x)

    got = tied(lambda *a: losses.head_loss(*a)[0], said)
    plain = tied(plain_head_loss, teacher_head, teacher)
    for a, b in zip(got, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not np.asarray(got[1])[weight == 0].any(), "a token without weight moves nothing"


def test_head_loss_of_the_teacher_itself_is_its_entropy_floor(mesh):
    """KL to oneself is 0 and has no gradient."""
    head, x, _, _, target, weight = case()
    said = losses.Dense(x, head)
    value, grad = jax.jit(
        jax.value_and_grad(lambda y: losses.head_loss(HeadLoss(1.0, 0.0, 16), head, y, said, target, weight)[0])
    )(x)
    assert abs(float(value)) < 1e-4 and np.abs(grad).max() < 1e-6


def plain_top_loss(static, head, x, logp_teacher, k, target, weight):
    """KL over the teacher's k likeliest tokens and one class for all others, by the formula, differentiated by JAX."""
    logp = jax.nn.log_softmax(x @ head.T, -1)
    order = jnp.argsort(-logp_teacher, -1)

    def classes(a):
        a = jnp.exp(jnp.take_along_axis(a, order, -1))
        return jnp.concatenate([a[..., :k], jnp.sum(a[..., k:], -1, keepdims=True)], -1)[..., : min(k + 1, V)]

    p, q = classes(logp_teacher), classes(logp)
    nll = -jnp.sum(jax.nn.one_hot(target, V) * logp, -1)
    return jnp.sum((static.kd * jnp.sum(p * jnp.log(p / q), -1) + static.ce * nll) * weight)


@pytest.mark.parametrize("model", [1, 2], ids=["whole vocabulary", "split vocabulary"])
@pytest.mark.parametrize("k", [1, 7, V])
def test_top_k_distillation(k, model):
    """Value and gradients are those of the formula; with k = V of the whole KL; with less the KL is smaller."""
    static = HeadLoss(0.7, 0.2, 16)
    with use_mesh(MeshConfig(data=2, model=model)):
        head, x, teacher_head, teacher, *rest = case(seed=2)
        target, weight = (put(a, spec("batch", "seq")) for a in rest)
        top = jax.jit(losses.top_k, static_argnums=(2, 3))(teacher_head, teacher, k, 16)
        assert top.logp.shape == (B, T, k) and top.rest.shape == (B, T)
        logp_teacher = log_softmax(np.asarray(teacher, np.float64) @ teacher_head.T)
        likeliest = np.argsort(-logp_teacher, -1)[..., :k]
        np.testing.assert_array_equal(top.token, likeliest)
        logp_BTK = np.take_along_axis(logp_teacher, likeliest, -1)
        np.testing.assert_allclose(top.logp, logp_BTK, rtol=1e-5, atol=1e-5)
        others = 1 - np.exp(logp_BTK).sum(-1)
        np.testing.assert_allclose(np.exp(top.rest), others if k < V else 0, rtol=1e-4, atol=1e-6)

        def ours(said):
            f = jax.value_and_grad(lambda h, x: losses.head_loss(static, h, x, said, target, weight)[0], argnums=(0, 1))
            return jax.jit(f)(head, x)

        got, whole = ours(top), ours(losses.Dense(teacher, teacher_head))
        args = (logp_teacher.astype(np.float32), k, *rest)
        plain = jax.value_and_grad(lambda h, x: plain_top_loss(static, h, x, *args), argnums=(0, 1))(
            head, np.asarray(x)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, plain)
        if k == V:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, whole)
        else:
            assert float(got[0]) < float(whole[0])


@pytest.mark.parametrize("chunk", [16, 64])
def test_token_loss_by_row(mesh, chunk):
    head, x, _, _, target, weight = case(seed=1)
    total, count = jax.jit(losses.token_loss, static_argnums=4)(head, x, target, weight, chunk)
    nll = -np.take_along_axis(log_softmax(np.asarray(x, np.float64) @ head.T), target[..., None], -1)[..., 0]
    np.testing.assert_allclose(total, (nll * weight).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(count, weight.sum(-1), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e6])
def test_log_softmax_of_any_size(scale):
    logits_MV = (np.random.default_rng(0).normal(size=(5, 77)) * scale).astype(np.float32)
    logits_MV[1] -= 3 * scale  # all of them negative
    got = np.asarray(losses._log_softmax(jnp.asarray(logits_MV), None), np.float64)
    wide = logits_MV.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert np.asarray(losses._largest(jnp.asarray(logits_MV)))[:, 0].tolist() == logits_MV.max(-1).tolist()
