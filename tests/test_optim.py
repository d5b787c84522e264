"""The schedule of METHOD section 4 and what weight decay touches."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from readme_jax import optim
from readme_jax.config import ConfigError
from readme_jax.optim import OptimConfig
from readme_jax.sharding import put


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


# ---- bfloat16 parameters ------------------------------------------------------------------------


def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=60), [0.0, 1.5, -2.0, 1e-30, -1e-42, 3e38]]).astype(np.float32)
    many = jax.vmap(lambda key: optim.stochastic_round(x, key))(jax.random.split(jax.random.key(0), 4096))
    assert many.dtype == jnp.bfloat16
    many = np.asarray(many, np.float64)
    down = (x.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)  # towards zero
    up = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32).astype(np.float64)
    exact = down == x
    assert exact.sum() == 3 and (many[:, exact] == x[exact]).all()
    assert ((many == down) | (many == up)).all() and (many[:, ~exact].min(0) != many[:, ~exact].max(0)).all()
    share = (x - down) / (up - down)
    error = ((many - down) / (up - down)).mean(0) - share
    assert (np.abs(error) <= 5 * np.sqrt(share * (1 - share) / 4096) + 1e-12).all()  # five standard errors
    assert np.abs(error[~exact].mean()) < 5 * 0.5 / np.sqrt(4096 * (~exact).sum())
    odd = optim.stochastic_round(jnp.array([jnp.inf, -jnp.inf, jnp.nan]), jax.random.key(1))
    assert odd[0] == jnp.inf and odd[1] == -jnp.inf and jnp.isnan(odd[2])


def walk(steps=200, lr=1e-3, **config):
    """Parameters that begin at 1 and whose gradient is always 1: Adam takes lr off at each step. (params, state)"""
    config = OptimConfig(lr=lr, weight_decay=0.0, clip=1e9, **config)
    tx = optim.make(config, 1 << 30, seed=5)
    params = optim.cast({"w_x": jnp.ones(4096)}, config.params)
    step = jax.jit(lambda params, state: tx.update(jax.tree.map(jnp.ones_like, params), state, params))
    state = tx.init(params)
    for _ in range(steps):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    return params["w_x"], state


def test_small_updates_are_kept_by_stochastic_rounding_and_lost_by_nearest():
    exact, _ = walk()
    stochastic, _ = walk(params="bfloat16")
    nearest, _ = walk(params="bfloat16", rounding="nearest")
    assert exact.dtype == jnp.float32 and stochastic.dtype == nearest.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact, 0.8, rtol=1e-4)
    assert float(jnp.mean(stochastic.astype(jnp.float32))) == pytest.approx(0.8, abs=5e-4)
    assert len(np.unique(stochastic)) > 5
    assert (nearest == 1).all(), "0.001 is less than half of the distance to the next number, 1/256"


def test_float32_is_plain_adamw_and_nearest_is_its_rounded_sum():
    rng = np.random.default_rng(1)
    params = {"w_x": rng.normal(size=(4, 8)).astype(np.float32), "norm": np.ones(8, np.float32)}
    grad = {"w_x": rng.normal(size=(4, 8)).astype(np.float32), "norm": rng.normal(size=8).astype(np.float32)}
    config = OptimConfig(lr=0.1, weight_decay=0.3)
    rate = optim.schedule(config, 10)
    plain = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.3, mask={"w_x": True, "norm": False})
    )

    def two_steps(tx, params, grad):
        state, first = tx.init(params), None
        for _ in range(2):
            updates, state = jax.jit(tx.update)(grad, state, params)
            first = first or updates
            params = optax.apply_updates(params, updates)
        return params, first

    ours, theirs = two_steps(optim.make(config, 10), params, grad), two_steps(plain, params, grad)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    half, half_grad = (optim.cast(jax.tree.map(jnp.asarray, tree), "bfloat16") for tree in (params, grad))
    nearest = optim.make(dataclasses.replace(config, params="bfloat16", rounding="nearest"), 10)
    after, first = two_steps(nearest, half, half_grad)
    assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {np.dtype(np.float32)}
    image, image_grad = optim.cast(half, jnp.float32), optim.cast(half_grad, jnp.float32)
    _, expected = two_steps(plain, image, image_grad)
    jax.tree.map(np.testing.assert_array_equal, first, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {np.dtype(jnp.bfloat16)}


def test_dtypes_at_rest():
    for params in ("float32", "bfloat16"):
        for mu in ("float32", "bfloat16"):
            values, state = walk(2, params=params, mu_dtype=mu)
            moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == values.shape]
            assert values.dtype == params and [str(m.dtype) for m in moments] == [mu, "float32"]
    exact, half = walk(50)[0], walk(50, mu_dtype="bfloat16")[0]
    np.testing.assert_allclose(half, exact, rtol=1e-3)
    assert (half != exact).any()


def test_noise_is_a_function_of_seed_step_and_name_on_every_mesh(any_mesh):
    def after(seed, steps, names, data):
        tx = optim.make(OptimConfig(lr=1e-3, params="bfloat16"), 100, seed)
        layout = jax.P(None, "data") if data else jax.P()
        params = {name: put(np.ones((8, 16), jnp.bfloat16), layout) for name in names}
        state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
        for _ in range(steps):
            updates, state = step(params, state, params)
            for leaf in jax.tree.leaves((updates, state)):
                assert leaf.ndim == 0 or jax.typeof(leaf).sharding == jax.typeof(params["w_x"]).sharding
            params = optax.apply_updates(params, updates)
        return {name: np.asarray(p, np.float32) for name, p in params.items()}

    one = after(0, 3, ("w_x", "w_y"), False)
    assert (one["w_x"] != one["w_y"]).any()
    jax.tree.map(np.testing.assert_array_equal, after(0, 3, ("w_x", "w_y"), True), one)
    np.testing.assert_array_equal(after(0, 3, ("w_a", "w_x"), True)["w_x"], one["w_x"])
    assert (after(1, 3, ("w_x",), True)["w_x"] != one["w_x"]).any()


def test_refusals():
    with pytest.raises(ConfigError, match="rounding=nearest has no meaning with params=float32"):
        OptimConfig(lr=1.0, rounding="nearest")
    with pytest.raises(ConfigError, match="no weight-decay rule for the parameter gamma"):
        optim.decayed({"gamma": 1})
    for bad in ({"lr": 0.0}, {"round_decay": 0.0}, {"clip": 0.0}, {"warmup": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            OptimConfig(**({"lr": 1.0} | bad))
