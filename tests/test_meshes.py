"""Five steps of both phases on every mesh: losses and every gradient as on one device, types kept, one compile."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles_core import packed, random_params, random_table

from readme_jax import steps
from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.labels import PAPER_LABELS
from readme_jax.losses import HeadLoss
from readme_jax.models import backbone, router
from readme_jax.models.experts import make_table
from readme_jax.sharding import MeshConfig, P, put, spec, use_mesh

MESHES = [(1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 4, 2), (1, 8, 1)]
E, C, T, STEPS = 4, 12, 24, 5
HEAD = HeadLoss(kd=0.8, ce=0.3, chunk=10)
ROUTER = RouterConfig(width=16, heads=2)
# Of the options only the bias of the FFN is placed in a way of its own.
CFG = ModelConfig(
    family="llama", vocab=64, embed=16, mlp=24, layer=2, head=4, kv_head=2, head_dim=8, norm_eps=1e-5,
    rope_theta=10000.0, max_position=64, tied=False, mlp_bias=True,
)  # fmt: skip
# Nothing divides but the FFN: 14 columns are split over two devices of `data` or not at all, 63 ids and one key head
# stay whole. Tied, so that one table is looked up and is the head as well.
ODD = dataclasses.replace(CFG, vocab=63, embed=14, head=3, kv_head=1, tied=True)
ROWS = [[24], [10, 14], [5], [3, 4], [20], [9, 9], [24], []] * 2


def gradients(rate):
    """SGD whose state is the last gradient: what every step's gradient was can be read from outside."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(grad, state, params=None):
        return jax.tree.map(lambda g: -rate * g, grad), grad

    return optax.GradientTransformation(init, update)


def types(tree):
    return [str(jax.typeof(leaf)) for leaf in jax.tree.leaves(tree)]


def run(step, phase, *rest):
    """(losses of five steps, gradients of each); the types of the phase stay, and so does the program."""
    before, losses, grads = types(phase), [], []
    for _ in range(STEPS):
        phase, means = step(phase, *rest)
        losses.append({(name, i): float(x) for name, value in means.items() for i, x in enumerate(np.ravel(value))})
        grads.append(jax.tree.map(np.asarray, phase.opt_state))
    assert types(phase) == before and types(phase.params) == types(phase.opt_state)
    assert step._cache_size() == 1
    return losses, grads


@functools.cache
def trained(cfg, shape):
    """Labels, then both phases on a mesh. The one-device reference takes the batch at once, the meshes in two
    microbatches: accumulation is compared as well."""
    accum = 1 if shape == MESHES[0] else 2
    rng = np.random.default_rng(6)
    ids, segments = packed(ROWS, T, cfg.vocab, seed=5)
    expert = rng.integers(0, E, ids.shape).astype(np.int32)
    seq = P(None, *spec("batch", "seq"))

    def place(array_BT, *trailing):
        return put(array_BT.reshape(accum, -1, *array_BT.shape[1:]), P(*seq, *trailing))

    with use_mesh(MeshConfig(data=shape[0], expert=shape[1], model=shape[2])):
        batch = {"ids": place(ids), "segments": place(segments)}
        student, teacher = (
            backbone.place(cfg, random_params(backbone.abstract_params(cfg), seed=seed)) for seed in (1, 2)
        )
        table = make_table(random_table(cfg.layer, E, C, cfg.mlp), cfg.mlp)
        label = steps.make_label(cfg, PAPER_LABELS)
        labels = [label(teacher, table, batch["ids"][a], batch["segments"][a]) for a in range(accum)]
        target = np.concatenate(labels)

        tx = gradients(0.3)
        phase = steps.start(router.place(random_params(router.abstract_params(ROUTER, cfg.vocab, E), seed=3)), tx)
        step = steps.make_router_step(ROUTER, cfg.rope_theta, tx)
        tuned_router = run(step, phase, batch | {"target": place(target, None)})

        route = steps.plan(expert.reshape(accum, -1, T), E, "masked", put=lambda a: put(a, seq))
        phase = steps.start(student, tx)
        step = steps.make_expert_step(cfg, HEAD, tx)
        tuned_experts = run(step, phase, {}, teacher, table, batch | {"route": route})
    return target, tuned_router, tuned_experts


def assert_same(got, expected):
    """Losses to 1e-5 of themselves, each gradient leaf to 1e-4 of its largest entry."""
    (losses, grads), (losses_one, grads_one) = got, expected
    for step, (values, values_one) in enumerate(zip(losses, losses_one, strict=True)):
        assert values == pytest.approx(values_one, rel=1e-5), f"step {step}"
    for step, (tree, tree_one) in enumerate(zip(grads, grads_one, strict=True)):
        for (path, grad), one in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(tree_one), strict=True):
            scale = np.abs(one).max()
            assert scale > 1e-6, f"{path}: a gradient of nothing compares with everything"
            assert np.abs(grad - one).max() <= 1e-4 * scale, f"step {step}: {path}"
    assert losses_one[-1]["loss", 0] < losses_one[0]["loss", 0], "five steps that change nothing compare nothing"


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_meshes_train_as_one_device(shape):
    labels, tuned_router, tuned_experts = trained(CFG, shape)
    one = trained(CFG, MESHES[0])
    np.testing.assert_allclose(labels, one[0], rtol=1e-5, atol=1e-6)
    assert_same(tuned_router, one[1])
    assert_same(tuned_experts, one[2])


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_sizes_that_do_not_divide_train_as_one_device(shape):
    (_, *got), (_, *one) = trained(ODD, shape), trained(ODD, MESHES[0])
    for phase, phase_one in zip(got, one, strict=True):
        assert_same(phase, phase_one)
