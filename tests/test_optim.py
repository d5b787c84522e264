"""The schedule of METHOD section 4 and what weight decay touches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax import optim
from readme_jax.config import ConfigError
from readme_jax.optim import OptimConfig


def test_cosine_within_a_round_and_lower_from_round_to_round():
    rate = jax.jit(optim.schedule(OptimConfig(lr=5e-4), steps_per_round=100))
    for step in (0, 1, 50, 99, 100, 150, 799):
        index, within = divmod(step, 100)
        expected = 5e-4 * 0.8**index * (1 + math.cos(math.pi * within / 100)) / 2
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-9), step
    assert float(rate(100)) == pytest.approx(4e-4)
    assert float(rate(jnp.int32(250))) == pytest.approx(float(rate(250)))


def test_warmup_starts_each_round():
    rate = jax.jit(optim.schedule(OptimConfig(lr=1.0, warmup=3, round_decay=0.5), steps_per_round=1000))
    ramp = [float(rate(s)) for s in (0, 1, 2, 3)]
    np.testing.assert_allclose(ramp, [0.25, 0.5, 0.75, 1.0], atol=1e-4)
    np.testing.assert_allclose([float(rate(1000 + s)) for s in range(4)], np.array(ramp) / 2, rtol=1e-5)


def test_the_optimizer_follows_the_schedule_and_decays_matrices_only():
    params = {
        "embedding": jnp.ones((3, 2)),
        "norm": jnp.ones(2),
        "layers": {"w_q": jnp.ones((2, 2)), "b_q": jnp.ones(2), "attn_norm": jnp.ones(2)},
    }
    tx = optim.make(OptimConfig(lr=0.1, weight_decay=0.5), steps_per_round=2)
    state, update_of = tx.init(params), jax.jit(tx.update)
    zero = jax.tree.map(jnp.zeros_like, params)
    for lr in (0.1, 0.05, 0.08, 0.04):  # cosine over two steps, then x0.8
        update, state = update_of(zero, state, params)
        for leaf in (update["embedding"], update["layers"]["w_q"]):
            np.testing.assert_allclose(leaf, -lr * 0.5, rtol=1e-5)
        for leaf in (update["norm"], update["layers"]["b_q"], update["layers"]["attn_norm"]):
            assert not np.asarray(leaf).any()


def test_first_step_is_adam_on_the_clipped_gradient():
    params = {"w_x": jnp.zeros(2)}
    tx = optim.make(OptimConfig(lr=0.1, clip=1.0), steps_per_round=10)
    big, state = jax.jit(tx.update)({"w_x": jnp.array([30.0, -40.0])}, tx.init(params), params)
    np.testing.assert_allclose(big["w_x"], [-0.1, 0.1], rtol=1e-4)  # the first Adam step is the sign
    mu = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,))
    np.testing.assert_allclose(mu, [0.06, -0.08], rtol=1e-4)  # 0.1 * (30, -40) / 50: clipped to norm 1


def test_refusals():
    with pytest.raises(ConfigError, match="no weight-decay rule for the parameter gamma"):
        optim.decayed({"gamma": 1})
    for bad in ({"lr": 0.0}, {"round_decay": 0.0}, {"clip": 0.0}, {"warmup": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            OptimConfig(**({"lr": 1.0} | bad))
