"""masked = grouped = separate storage = a NumPy loop over tokens: outputs and gradients to every input."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles_core import expert_ffn, random_table

from readme_jax.config import ConfigError
from readme_jax.models import experts
from readme_jax.models.experts import Grouped, Masked, make_table
from readme_jax.routing import group

B, T, D, F, E, C = 2, 40, 32, 48, 4, 20
ROWS = 16


def weights(bias, seed=0):
    rng = np.random.default_rng(seed)
    w = {name: rng.normal(size=(F, D)) / np.sqrt(D) for name in ("w_gate", "w_up", "w_down")}
    if bias:
        w |= {"b_gate": rng.normal(size=F), "b_up": rng.normal(size=F), "b_down": rng.normal(size=D)}
    return {name: value.astype(np.float32) for name, value in w.items()}


@jax.jit
def _value_and_grad(x, w, table, route, cotangent):
    def loss(x, w):
        y = experts.run(x, SimpleNamespace(**w), table, route)
        return jnp.sum(y * cotangent), y

    (_, y), (dx, dw) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)
    return y, dx, dw


@jax.jit
def _separate(x, w, table_EC, table, route, cotangent):
    """Experts own their rows, expert-major; the rows are gathered from the tied bank, so gradients are comparable."""

    def loss(x, w):
        rows = {n: a if n == "b_down" else a[table_EC.reshape(-1)] for n, a in w.items()}
        y = experts.run(x, SimpleNamespace(**rows), table, route)
        return jnp.sum(y * cotangent), y

    (_, y), (dx, dw) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)
    return y, dx, dw


def layer_table(table_EC, mlp):
    """The table of one layer, as the scan over layers hands it to the FFN."""
    return jax.tree.map(lambda a: a[0], make_table(table_EC[None], mlp))


def tables():
    """name -> int32 [E, C]. Those that use the last channel have the same shapes, so they share their programs."""
    full, unused = random_table(1, E, C, F, seed=1)[0], random_table(1, E, C, F - 9, seed=2)[0]
    odd = random_table(1, E, C, F // 2, seed=3)[0] * 2 + 1  # even channels belong to no one
    same = np.tile(np.arange(F - C, F, dtype=np.int32), (E, 1))
    full[0, -1] = odd[0, -1] = F - 1
    return {"full": full, "unused tail": unused, "unused between": odd, "same for all": same}


ROUTES = {
    "mixed": np.random.default_rng(5).integers(0, E, (B, T)),
    "empty expert": np.random.default_rng(6).choice([0, 2, 3], (B, T)),
    "all to one": np.full((B, T), 3),
}
CASES = [(t, "mixed", True) for t in tables()] + [("full", "mixed", False)]
CASES += [("full", r, True) for r in ("empty expert", "all to one")]


def grouped_plan(expert_BT, experts_count):
    """The plan of a batch, with spare empty groups up to ten: one shape for every route."""
    source, owner, row = group(expert_BT.reshape(-1), experts_count, ROWS)
    spare = 10 - len(owner)
    source = np.pad(source, ((0, spare), (0, 0)), constant_values=expert_BT.size)
    return Grouped(jnp.asarray(source), jnp.asarray(np.pad(owner, (0, spare))), jnp.asarray(row))


@pytest.mark.parametrize("table_name, route_name, bias", CASES)
def test_ways_and_storages_agree_with_numpy(mesh, table_name, route_name, bias):
    table_EC, expert_BT, w = tables()[table_name], ROUTES[route_name].astype(np.int32), weights(bias)
    rng = np.random.default_rng(9)
    x, cotangent = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    y, dx, dw = expert_ffn(
        x.reshape(-1, D), w, table_EC, expert_BT.reshape(-1), cotangent.reshape(-1, D)
    )  # the oracle, float64
    expected = (y.reshape(x.shape), dx.reshape(x.shape), dw)

    routes = {"masked": Masked(jnp.asarray(expert_BT)), "grouped": grouped_plan(expert_BT, E)}
    width = table_EC.shape[1]
    own = layer_table(np.arange(E * width, dtype=np.int32).reshape(E, width), E * width)
    results = {}
    for way, route in routes.items():
        results[way, "tied"] = _value_and_grad(x, w, layer_table(table_EC, F), route, cotangent)
        results[way, "separate"] = _separate(x, w, jnp.asarray(table_EC), own, route, cotangent)
    for kind, got in results.items():
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=str(kind))


@pytest.mark.parametrize("way", ["masked", "grouped"])
def test_an_expert_with_all_channels_is_the_dense_ffn(mesh, way):
    w = {name: jnp.asarray(value) for name, value in weights(bias=True).items()}
    x = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
    expert_BT = ROUTES["mixed"].astype(np.int32) % 2
    table = layer_table(np.tile(np.arange(F, dtype=np.int32), (2, 1)), F)
    route = Masked(jnp.asarray(expert_BT)) if way == "masked" else grouped_plan(expert_BT, 2)
    layer = SimpleNamespace(**w)
    dense, _ = experts.dense(jnp.asarray(x), layer)
    np.testing.assert_allclose(experts.run(jnp.asarray(x), layer, table, route), dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(experts.run(jnp.asarray(x), layer, table, None), dense)


def test_tap_sees_the_input_of_down_proj(mesh):
    w = weights(bias=True)
    x = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
    _, h = experts.dense(
        jnp.asarray(x), SimpleNamespace(**{k: jnp.asarray(v) for k, v in w.items()}), tap=lambda h, *_: h
    )
    gate, up = x @ w["w_gate"].T + w["b_gate"], x @ w["w_up"].T + w["b_up"]
    np.testing.assert_allclose(h, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-5)


def test_membership_of_the_table(mesh):
    table_LEC = random_table(2, E, C, F, seed=4)
    mask_LEF = experts.membership(table_LEC, F)
    for layer in range(2):
        for e in range(E):
            assert set(np.flatnonzero(mask_LEF[layer, e])) == set(table_LEC[layer, e])
    used = make_table(np.minimum(table_LEC, 40), F).mask_LEU
    assert used.shape[-1] == 41, "channels above the highest used one are not in the mask"


def test_refusals(mesh):
    with pytest.raises(ConfigError, match=r"outside 0\.\.48"):
        make_table(np.full((1, 1, 1), F, np.int32), F)
    with pytest.raises(ConfigError, match=r"outside 0\.\.48"):
        make_table(np.full((1, 1, 1), -1, np.int32), F)
    layer = SimpleNamespace(**{k: jnp.asarray(v) for k, v in weights(False).items()})
    with pytest.raises(ConfigError, match="dense"):
        experts.run(jnp.zeros((1, 4, D)), layer, None, Masked(jnp.zeros((1, 4), jnp.int32)))
