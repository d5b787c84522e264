"""`parallel` = `masked` on the same separate bank = a NumPy loop: outputs and gradients on every mesh, for any skew."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles_core import expert_ffn, packed, random_params

from readme_jax import routing, steps
from readme_jax.config import ConfigError, ModelConfig
from readme_jax.losses import HeadLoss
from readme_jax.models import backbone, experts, parallel
from readme_jax.models.experts import Masked, make_table
from readme_jax.sharding import AXES, MeshConfig, put, spec, use_mesh

B, T, D, C = 8, 20, 16, 6
MESHES = [(1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 4, 2), (1, 8, 1)]
SKEWS = ("even", "all to one", "empty expert", "zipf")


def on(shape):
    return use_mesh(MeshConfig(**dict(zip(AXES, shape))))


def bank(count, bias=True):
    """Separate experts, expert-major [E * C, D]."""
    rng = np.random.default_rng(count)
    w = {name: rng.normal(size=(count * C, D)) / np.sqrt(D) for name in ("w_gate", "w_up", "w_down")}
    if bias:
        w |= {"b_gate": rng.normal(size=count * C), "b_up": rng.normal(size=count * C), "b_down": rng.normal(size=D)}
    return {name: value.astype(np.float32) for name, value in w.items()}


def apart(w, count):
    """The bank on the current mesh, [E, C, ...]."""
    params = {"layers": {name: value[None] for name, value in w.items()}}
    specs = parallel.separate_specs({"layers": {name: jax.P() for name in w}})["layers"]
    split = parallel.separate_layout(params, count)["layers"]
    return {name: put(value[0], jax.P(*specs[name][1:])) for name, value in split.items()}


def together(w):
    """What came back from the mesh, as the bank it was."""
    return parallel.flat_layout({"layers": {name: np.asarray(value)[None] for name, value in w.items()}})["layers"]


def layer_table(count):
    own_LEC = np.arange(count * C, dtype=np.int32).reshape(1, count, C)
    return jax.tree.map(lambda a: a[0], make_table(own_LEC, count * C))


def skewed(count, skew):
    """int32 [B, T] experts."""
    rng = np.random.default_rng(5)
    share = np.arange(1, count + 1) ** -0.8
    share = {
        "even": np.ones(count),
        "all to one": np.eye(count)[-1],
        "empty expert": 1 - np.eye(count)[2],
        "zipf": rng.permutation(share),
    }[skew]
    return rng.choice(count, (B, T), p=share / share.sum()).astype(np.int32)


def inputs():
    """x and the cotangent of y, float32 [B, T, D] on the host."""
    rng = np.random.default_rng(9)
    return [rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2)]


def arguments(count, skew):
    """Arguments of `value_and_grad` on the current mesh, with the bucket that fits."""
    x, cotangent = (put(a, parallel.TOKENS) for a in inputs())
    return x, apart(bank(count), count), layer_table(count), make_route(skewed(count, skew), count), cotangent


def ffn(x, w, table, route):
    return experts.run(x, SimpleNamespace(**w), table, route)


@functools.partial(jax.jit, static_argnames="run")
def value_and_grad(x, w, table, route, cotangent, run=ffn):
    def loss(x, w):
        y = run(x, w, table, route)
        return jnp.sum((y * cotangent).astype(jnp.float32)), y

    (_, y), (dx, dw) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)
    return y, dx, dw


def make_route(expert_BT, count, rows=None):
    """The route of one batch on the current mesh; `rows` asks for a rung of the ladder."""
    shape = jax.sharding.get_mesh().shape
    plan = routing.exchange(expert_BT[None], count, data=shape["data"], peers=shape["expert"], rows=rows)
    return jax.tree.map(lambda a: a[0], parallel.place(plan, put))


def run_parallel(count, expert_BT, *, run=ffn, route=None, rows=None, dtype=jnp.float32, bias=True):
    """(y, dx, dw) from the current mesh, dw as [E * C, ...]."""
    x, cotangent = (put(a.astype(dtype), parallel.TOKENS) for a in inputs())
    route = make_route(expert_BT, count, rows) if route is None else route
    y, dx, dw = value_and_grad(x, apart(bank(count, bias), count), layer_table(count), route, cotangent, run=run)
    return np.asarray(y), np.asarray(dx), together(dw)


@functools.cache
def oracle(count, skew, bias=True):
    """(y, dx, dw), float64."""
    x, cotangent = inputs()
    ids_M, table_EC = skewed(count, skew).reshape(-1), np.arange(count * C).reshape(count, C)
    y, dx, dw = expert_ffn(x.reshape(-1, D), bank(count, bias), table_EC, ids_M, cotangent.reshape(-1, D))
    return y.reshape(x.shape), dx.reshape(x.shape), dw


def distance(got, want):
    """Largest relative distance of a leaf."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)) for a, b in pairs)


@pytest.mark.parametrize("count", [8, 16])
def test_masked_on_the_same_bank(mesh, count):
    x, cotangent = inputs()
    for skew in SKEWS:
        route = Masked(jnp.asarray(skewed(count, skew)))
        got = value_and_grad(x, bank(count), layer_table(count), route, cotangent)
        assert distance(got, oracle(count, skew)) < 1e-6, skew


@pytest.mark.parametrize("count", [8, 16])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_every_skew(shape, count):
    with on(shape):
        worst = B * T // (shape[0] * shape[1])
        for skew in SKEWS:  # with the largest bucket: all share one program
            got = run_parallel(count, skewed(count, skew), rows=worst)
            assert distance(got, oracle(count, skew)) < 1e-6, skew


@pytest.mark.parametrize("shape, count, bias", [((1, 8, 1), 8, False), ((1, 4, 2), 16, True)], ids=str)
def test_buckets_that_fit(shape, count, bias):
    with on(shape):
        for skew in ("even", "empty expert"):
            route = make_route(skewed(count, skew), count)
            assert route.send_GXS.shape[-1] < B * T // shape[1]
            got = run_parallel(count, skewed(count, skew), route=route, bias=bias)
            assert distance(got, oracle(count, skew, bias)) < 1e-6, skew


def test_bfloat16(mesh):
    x, cotangent = (jnp.asarray(a, jnp.bfloat16) for a in inputs())
    route = Masked(jnp.asarray(skewed(16, "zipf")))
    masked = value_and_grad(x, bank(16), layer_table(16), route, cotangent)
    assert masked[0].dtype == jnp.bfloat16 and masked[2]["w_up"].dtype == jnp.float32
    error = distance(masked, oracle(16, "zipf"))
    with on((2, 2, 2)):
        got = run_parallel(16, skewed(16, "zipf"), dtype=jnp.bfloat16)
    assert got[0].dtype == jnp.bfloat16 and got[2]["w_up"].dtype == np.float32
    assert distance(got, oracle(16, "zipf")) < 1.2 * error, "no worse than bfloat16 makes `masked`"
    assert error < 0.03


# ---- the trap: an order that a device computes is typed as equal on all devices ------------------


def sorted_on_device(cast, x, w, table, expert_BT):
    """A dispatch without a plan: tokens are the same on all devices of `expert`, each sorts out its own."""

    def local(w, x_BTD, expert_BT):
        own = w["w_gate"].shape[0]
        expert_M = expert_BT.reshape(-1) - own * jax.lax.axis_index("expert")
        mine_M = (expert_M >= 0) & (expert_M < own)
        order_M = jnp.argsort(jnp.where(mine_M, expert_M, own))
        if cast:
            order_M = jax.lax.pcast(order_M, ("data", "expert"), to="varying")
        x_MD = x_BTD.reshape(-1, D)[order_M]
        v = {name: value[jnp.clip(expert_M[order_M], 0, own - 1)] for name, value in w.items() if name != "b_down"}
        gate_MC = jnp.einsum("md,mcd->mc", x_MD, v["w_gate"]) + v["b_gate"]
        up_MC = jnp.einsum("md,mcd->mc", x_MD, v["w_up"]) + v["b_up"]
        y_MD = jnp.einsum("mc,mcd->md", jax.nn.silu(gate_MC) * up_MC, v["w_down"])
        y_MD = jnp.where(mine_M[order_M][:, None], y_MD, 0)
        y_MD = jnp.zeros_like(y_MD).at[order_M].set(y_MD)
        return jax.lax.psum(y_MD, ("expert", "model")).reshape(x_BTD.shape)

    rows = jax.P("data", None, None)
    specs = {n: jax.P() if n == "b_down" else parallel.WEIGHT if n[0] == "w" else parallel.BIAS for n in w}
    y_BTD = jax.shard_map(local, in_specs=(specs, rows, jax.P("data", None)), out_specs=rows)(
        w, jax.reshard(x, rows), jax.reshard(expert_BT, jax.P("data", None))
    )
    return jax.reshard(y_BTD, parallel.TOKENS) + w["b_down"]


DISPATCH = {cast: functools.partial(sorted_on_device, cast) for cast in (False, True)}


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_the_comparison_sees_an_order_without_its_cast(shape):
    want = oracle(8, "zipf")
    with on(shape):
        ids = put(skewed(8, "zipf"), spec("batch", "seq"))
        right, wrong = (run_parallel(8, None, run=DISPATCH[cast], route=ids) for cast in (True, False))
    assert distance(right, want) < 1e-6
    assert distance(wrong[0], want[0]) < 1e-6, "nothing to see in the output"
    assert distance(wrong[1:], want[1:]) > 0.1


# ---- what moves between devices -----------------------------------------------------------------


def count_primitive(jaxpr, name):
    """How often a primitive stands in a jaxpr and all those inside it."""
    inner = [v for eqn in jaxpr.eqns for v in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=is_jaxpr)]
    found = sum(eqn.primitive.name == name for eqn in jaxpr.eqns)
    return found + sum(count_primitive(getattr(v, "jaxpr", v), name) for v in inner if is_jaxpr(v))


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def checkpointed(policy, x, w, table, route):
    body = jax.checkpoint(lambda x, w: x + ffn(jnp.tanh(x), w, table, route), policy=policy)
    return body(x, w)


KEEP_NAMES = jax.checkpoint_policies.save_only_these_names(*parallel.REMAT_NAMES)
KEEP_NOTHING = jax.checkpoint_policies.nothing_saveable


@pytest.mark.parametrize("count", [8, 16])
def test_remat_by_names_does_not_send_again(count):
    with on((1, 8, 1)):
        args, sends = arguments(count, "even"), {}
        for policy in (None, KEEP_NAMES, KEEP_NOTHING):
            run = ffn if policy is None else functools.partial(checkpointed, policy)
            traced = jax.jit(functools.partial(value_and_grad.__wrapped__, run=run)).trace(*args)
            sends[policy] = count_primitive(traced.jaxpr.jaxpr, "all_to_all")
            if policy is KEEP_NAMES:
                text = traced.lower().compile().as_text()
    assert sends[None] == sends[KEEP_NAMES] == 4, "two there, two back"
    assert sends[KEEP_NOTHING] == 5, "counting sees what remat repeats"
    assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == 4
    assert "all-gather" not in text, "no weight moves"


def in_blocks(product, kind, r, a, b, blocks):
    """A product inside `shard_map`, as the FFN calls it."""

    def local(*args):
        return product(kind, r, *jax.lax.pcast(args, AXES, to="varying"))[None]

    whole = jax.shard_map(local, in_specs=(jax.P(),) * 3, out_specs=jax.P(AXES))
    return np.asarray(jax.jit(whole)(a, b, blocks))[0]


@pytest.mark.parametrize("kind", ["up", "down", "outer"])
def test_rows_past_the_last_block_do_not_matter(mesh, kind):
    """The TPU's product against the portable ones; the last blocks, undefined there, hold NaN."""
    r, blocks_E, rng = 4, np.array([2, 0, 3, 1], np.int32), np.random.default_rng(0)
    real = r * blocks_E.sum()
    x_WD, h_WC, w_ECD = (rng.normal(size=s).astype(np.float32) for s in ((r * 8, D), (r * 8, C), (4, C, D)))
    a, b = {"up": (x_WD, w_ECD), "down": (h_WC, w_ECD), "outer": (h_WC, x_WD)}[kind]
    owner_W = np.repeat(np.arange(4), r * blocks_E)
    if kind == "outer":
        want = np.stack([h_WC[:real][owner_W == e].T @ x_WD[:real][owner_W == e] for e in range(4)])
    else:
        want = np.zeros((r * 8, C if kind == "up" else D))
        for row, e in enumerate(owner_W):
            want[row] = a[row] @ (w_ECD[e].T if kind == "up" else w_ECD[e])
    zeroed = [np.where(np.arange(len(m))[:, None] < real, m, 0) if m.ndim == 2 else m for m in (a, b)]
    poisoned = [np.where(np.arange(len(m))[:, None] < real, m, np.nan) if m.ndim == 2 else m for m in (a, b)]
    by_blocks = parallel._by_blocks
    for used_only in (True, False):
        product = functools.partial(lambda used, k, r, *args: by_blocks(k, r, used, *args), used_only)
        np.testing.assert_allclose(in_blocks(product, kind, r, *zeroed, blocks_E), want, rtol=1e-5, atol=1e-5)
    got = in_blocks(parallel._ragged, kind, r, *poisoned, blocks_E)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_tpu_runs_a_ragged_dot():
    with on((2, 2, 2)):
        traced = value_and_grad.trace(*arguments(8, "even"))
        text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cpu", "cuda")}
    assert "ragged_dot" in text["tpu"] and "stablehlo.while" not in text["tpu"]
    for portable in ("cpu", "cuda"):
        assert "ragged_dot" not in text[portable] and "stablehlo.while" in text[portable]


def test_lowers_for_a_mesh_of_128_that_is_not_here():
    def shape(mesh, dims, partition, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, partition))

    mesh = jax.sharding.AbstractMesh((8, 8, 2), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        x = shape(mesh, (64, 512, D), parallel.TOKENS)
        w = {name: shape(mesh, (16, 64, D), parallel.WEIGHT) for name in ("w_gate", "w_up", "w_down")}
        table = experts.ExpertTable(*(shape(mesh, (16, 64), jax.P(), dtype) for dtype in (jnp.int32, jnp.bool_)))
        routes = parallel.abstract_routes((1, 64, 512), 16)
        assert [r.send_GXS.shape[-1] for r in routes] == list(routing.ladder(512, 8))
        route = jax.eval_shape(lambda r: jax.tree.map(lambda a: a[0], r), routes[0])
        text = value_and_grad.trace(x, w, table, route, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "ragged_dot" in text and "all_to_all" in text and "all_gather" not in text


# ---- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, count", [((1, 8, 1), 8), ((2, 2, 2), 8)], ids=str)
def test_programs_can_be_compiled_ahead(shape, count):
    with on(shape):
        ahead = parallel.abstract_routes((2, B, T), count)
        rungs = routing.ladder(B * T // (shape[0] * shape[1]), shape[1])
        assert [r.send_GXS.shape[-1] for r in ahead] == list(rungs)
        for skew in SKEWS:
            ids = np.stack([skewed(count, skew), skewed(count, "even")])
            route = steps.plan(ids, count, "parallel")
            match = [r for r in ahead if r.send_GXS.shape == route.send_GXS.shape]
            assert len(match) == 1
            # jit goes by type: the same shapes and shardings are the same program
            same = jax.tree.map(lambda a, b: (jax.typeof(a), a.sharding) == (jax.typeof(b), b.sharding), route, *match)
            assert all(jax.tree.leaves(same))


def test_refusals():
    ids = skewed(8, "even")
    with on((1, 1, 4)), pytest.raises(ConfigError, match=r"channels=6 of an expert .* multiple of the mesh's model=4"):
        apart(bank(8), 8)
    with on((1, 8, 1)):
        with pytest.raises(ConfigError, match=r"experts=12 must be a multiple of the mesh's expert=8"):
            steps.plan(ids[None], 12, "parallel")
        with pytest.raises(ConfigError, match=r"experts=4 must be a multiple of the mesh's expert=8"):
            apart(bank(4), 4)
        with pytest.raises(ConfigError, match=r"batch=6 must be a multiple of the mesh's 8 batch devices"):
            steps.plan(ids[None, :6], 8, "parallel")
        with pytest.raises(ConfigError, match=r"mlp=48 must be a multiple of experts=32"):
            apart(bank(8), 32)
        with pytest.raises(ConfigError, match="made for 16 experts on this mesh, the layer has 8"):
            run_parallel(8, None, route=make_route(skewed(16, "even"), 16))
        with pytest.raises(ConfigError, match=r"they run no other way: .*\(8, 6, 16\), the route Masked"):
            run_parallel(8, None, route=Masked(put(ids, spec("batch", "seq"))))
        layer, route = SimpleNamespace(**bank(8)), make_route(ids, 8)
        with pytest.raises(ConfigError, match=r"\(48, 16\), the route Parallel"):
            experts.run(put(inputs()[0], parallel.TOKENS), layer, layer_table(8), route)


# ---- the whole step -----------------------------------------------------------------------------

CFG = ModelConfig(
    family="qwen3", vocab=64, embed=16, mlp=8 * 4, layer=2, head=4, kv_head=2, head_dim=8, norm_eps=1e-5,
    rope_theta=10000.0, max_position=64, tied=True, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True,
)  # fmt: skip
STEPS, EXPERTS, SGD = 5, 8, optax.sgd(0.5)
ROWS = [[24], [10, 14], [5], [3, 4], [20], [24], [9, 9], []]


@functools.cache
def trained(shape, way):
    """(losses of five steps, parameters after each as [L, F, D] on the host, where the layers lie, compiled text)."""
    ids, segments = packed(ROWS * 2, 24, CFG.vocab)
    expert = np.random.default_rng(0).integers(0, EXPERTS, ids.shape).astype(np.int32)
    host = random_params(backbone.abstract_params(CFG), seed=1)
    own_LEC = np.tile(np.arange(CFG.mlp, dtype=np.int32).reshape(EXPERTS, -1), (CFG.layer, 1, 1))
    step = steps.make_expert_step(CFG, HeadLoss(kd=0.0, ce=1.0, chunk=12), SGD)
    with on(shape):
        apart = way == "parallel"
        params = backbone.place_separate(CFG, host, EXPERTS) if apart else backbone.place(CFG, host)
        phase, table = steps.start(params, SGD), make_table(own_LEC, CFG.mlp)
        # one mesh accumulates: the sum over microbatches is that of one batch
        ids_ABT, segments_ABT, expert_ABT = (
            a.reshape(2 if shape == (2, 2, 2) else 1, -1, 24) for a in (ids, segments, expert)
        )
        micro = jax.P(None, *spec("batch", "seq"))
        batch = {"ids": put(ids_ABT, micro), "segments": put(segments_ABT, micro)}
        batch["route"] = steps.plan(expert_ABT, EXPERTS, way)
        run = step.lower(phase, {}, None, table, batch).compile()
        losses, seen = [], []
        for _ in range(STEPS):
            phase, values = run(phase, {}, None, table, batch)
            losses.append(float(values["loss"]))
            params = jax.device_get(phase.params)
            seen.append(parallel.flat_layout(params) if apart else params)
        specs = {name: leaf.sharding.spec for name, leaf in phase.params["layers"].items()}
        text = run.as_text()
    return losses, seen, specs, text


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_training_is_that_of_one_device(shape):
    want_losses, want, _, _ = trained((1, 1, 1), "masked")
    losses, got, specs, text = trained(shape, "parallel")
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    host = random_params(backbone.abstract_params(CFG), seed=1)
    assert distance(moved(got[0], host), moved(want[0], host)) < 1e-4, "gradients"
    assert distance(got[-1], want[-1]) < 1e-5
    assert specs["w_up"] == jax.P(None, "expert", "model", None), "the optimizer's update keeps them in place"
    # an expert's weights are 4 or 2 channels wide and 16 deep here
    assert not re.findall(r"f32\[[\d,]*\b(?:2|4),16\]\S* all-gather", text)


@pytest.mark.parametrize("remat, sends", [("none", 4), ("names", 4), ("full", 5)])
def test_remat_of_the_whole_step(remat, sends):
    """Two all-to-alls in the scan over layers, two in that of the backward pass, and what remat repeats."""
    step = steps.make_expert_step(CFG, HeadLoss(kd=0.0, ce=1.0, chunk=12), SGD, remat=remat)
    with on((1, 8, 1)):
        params = backbone.place_separate(CFG, random_params(backbone.abstract_params(CFG)), EXPERTS)
        own_LEC = np.tile(np.arange(CFG.mlp, dtype=np.int32).reshape(EXPERTS, -1), (CFG.layer, 1, 1))
        ids = put(np.ones((1, 8, 24), np.int32), jax.P(None, *spec("batch", "seq")))
        batch = {"ids": ids, "segments": ids, "route": parallel.abstract_routes((1, 8, 24), EXPERTS)[0]}
        traced = step.trace(steps.start(params, SGD), {}, None, make_table(own_LEC, CFG.mlp), batch)
    assert count_primitive(traced.jaxpr.jaxpr, "all_to_all") == sends


def moved(params, host):
    """What a step changed; keys' bias has no gradient (softmax does not see it)."""
    change = jax.tree.map(np.subtract, params, host)
    return change | {"layers": {n: v for n, v in change["layers"].items() if n != "b_k"}}
