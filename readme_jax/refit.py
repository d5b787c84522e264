"""Down projections solved anew in closed form, so that a carved model follows the dense one layer by layer.

A token of the carved model runs half of the channels; the same channels, differently weighted, can stand in for part of
what is missing. Layer by layer, with the layers below already solved, w_down minimises over tokens t of some text

    sum_t weight_t |(h_t * mask_t) w_down - (dense_t - x_t)|^2 + ridge |w_down - its old value|^2,

h_t: the input of down_proj in the carved model, mask_t: the channels of the token's expert, x_t: the carved model's
residual stream behind attention, dense_t: the dense model's behind the layer. So each layer also corrects what those
below have missed (least squares on the pruned model's own activations, as in ThiNet, arXiv 1707.06342, and SparseGPT,
arXiv 2301.00774; here with several masks at once, because tied experts share one w_down). No gradient is needed.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from readme_jax import distributed
from readme_jax.config import DataError, ModelConfig, require
from readme_jax.data import Batches
from readme_jax.loop import place_batch
from readme_jax.metrics import progress
from readme_jax.models import backbone, experts
from readme_jax.models.backbone import Params
from readme_jax.models.experts import ExpertTable
from readme_jax.models.layers import embed
from readme_jax.sharding import REPLICATED
from readme_jax.steps import Phase, join, split_tuned

RIDGE = 0.1  # of the mean squared activation


def make_sums(cfg: ModelConfig) -> Callable:
    """jitted (layer, mask_EU, window, x_BTD, dense_BTD, expert_BT, segments_BT) -> (dense_BTD, gram_UU, cross_UD).

    layer: one layer of the untuned parameters. x, dense: residual streams of the carved and the dense model in front of
    the layer; the dense one behind it comes back. gram and cross: float32 sums over tokens of weight h h^T and
    weight h r^T, with r what w_down still misses. A token weighs 1 / (m + the mean of m), m = |its dense FFN output|^2:
    the few tokens with very large activations would decide alone.
    """

    @jax.jit
    def sums(layer: Params, mask_EU, window, x_BTD, dense_BTD, expert_BT, segments_BT):
        run, block = backbone.packed(cfg, segments_BT), backbone.gathered(cfg, layer, x_BTD.dtype)
        rows = slice(0, mask_EU.shape[-1])

        def whole(y_BTD, block):
            out_BTD, _ = experts.dense(y_BTD, block)
            return out_BTD, out_BTD

        def carved(y_BTD, block):
            keep_BTU = mask_EU.at[expert_BT].get(out_sharding=experts.HIDDEN)
            h_BTU = experts.activate(y_BTD, block, keep_BTU, rows)
            return experts.down(h_BTU, block, rows), h_BTU

        dense_BTD, out_BTD = run(dense_BTD, block, window, whole)
        after_BTD, h_BTU = run(x_BTD, block, window, carved)
        missed_BTD = (dense_BTD - after_BTD).astype(jnp.float32)
        real_BT = (segments_BT > 0).astype(jnp.float32)
        size_BT = jnp.sum(jnp.square(out_BTD.astype(jnp.float32)), -1) * real_BT
        weight_BT = real_BT / (size_BT + jnp.sum(size_BT) / jnp.maximum(jnp.sum(real_BT), 1.0) + 1e-30)
        h_BTU = jax.reshard(h_BTU.astype(jnp.float32), jax.P(experts.HIDDEN[0], None, None))
        weighted_BTU = h_BTU * weight_BT[..., None]
        exact = {"precision": jax.lax.Precision.HIGHEST, "out_sharding": REPLICATED}  # or it may not be positive
        gram_UU = jnp.einsum("btu,btv->uv", weighted_BTU, h_BTU, **exact)
        cross_UD = jnp.einsum("btu,btd->ud", weighted_BTU, missed_BTD, **exact)
        return dense_BTD, gram_UU, cross_UD

    return sums


def solve(gram_UU: jax.Array, cross_UD: jax.Array) -> jax.Array:
    """float32 [U, D]: what to add to w_down. Channels that no token ran are left as they are."""
    ran_U = jnp.diagonal(gram_UU) > 0
    ridge = RIDGE * jnp.trace(gram_UU) / jnp.maximum(jnp.sum(ran_U), 1) + 1e-30
    factor = jax.scipy.linalg.cho_factor(gram_UU + ridge * jnp.eye(len(gram_UU)), lower=True)
    return jax.scipy.linalg.cho_solve(factor, cross_UD)


def refit(cfg: ModelConfig, params: Params, table: ExpertTable, records: Sequence[dict[str, Any]]) -> jax.Array:
    """w_down [L, F, D] solved on `records`, in the dtype and place it has in `params`.

    params: the carved model's backbone on the mesh, tied experts, as carving left it: run with all its channels it is
    the dense model. records: ids, segments and expert, int32 [B, T] on the mesh each; two float32 residual streams of
    all of them are alive. The mean in a token's weight is over its batch. About four dense forward passes over the
    records and a Cholesky factorisation of [U, U] a layer. DataError where a solution is not finite.
    """
    sums = make_sums(cfg)

    @jax.jit
    def advance(layer: Params, layer_table: ExpertTable, window, x_BTD, expert_BT, segments_BT):
        block = backbone.gathered(cfg, layer, x_BTD.dtype)
        ffn = lambda y_BTD, block: (experts.masked(y_BTD, block, layer_table.mask_LEU, expert_BT), None)  # noqa: E731
        return backbone.packed(cfg, segments_BT)(x_BTD, block, window, ffn)[0]

    @jax.jit
    def solved(w_FD: jax.Array, gram_UU: jax.Array, cross_UD: jax.Array) -> jax.Array:
        more_FD = jnp.pad(solve(gram_UU, cross_UD), ((0, w_FD.shape[0] - len(gram_UU)), (0, 0)))
        place = jax.typeof(w_FD).sharding.spec
        return (w_FD.astype(jnp.float32) + jax.reshard(more_FD, place)).astype(w_FD.dtype)

    first = jax.jit(lambda embedding_VD, ids_BT: embed(embedding_VD, ids_BT, jnp.float32))
    xs = [first(params["embedding"], record["ids"]) for record in records]
    denses, done = list(xs), []
    windows = backbone.windows(cfg)
    with progress(cfg.layer, "refit", "layer", silent=not distributed.is_main()) as bar:
        for number in range(cfg.layer):
            layer, layer_table, window = jax.tree.map(operator.itemgetter(number), (params["layers"], table, windows))
            gram_UU, cross_UD = None, None
            for at, record in enumerate(records):
                batch = record["expert"], record["segments"]
                denses[at], gram, cross = sums(layer, layer_table.mask_LEU, window, xs[at], denses[at], *batch)
                gram_UU = gram if gram_UU is None else gram_UU + gram
                cross_UD = cross if cross_UD is None else cross_UD + cross
            layer["w_down"] = solved(layer["w_down"], gram_UU, cross_UD)
            finite = bool(jax.device_get(jnp.isfinite(layer["w_down"]).all()))
            require(finite, f"refit: no finite solution in layer {number}; are activations finite there?", DataError)
            done.append(layer["w_down"])
            for at, record in enumerate(records):
                xs[at] = advance(layer, layer_table, window, xs[at], record["expert"], record["segments"])
            bar.update()
    place = jax.typeof(params["layers"]["w_down"]).sharding.spec
    return jax.jit(lambda rows: jax.reshard(jnp.stack(rows), place))(done)


def refit_phase(
    cfg: ModelConfig,
    phase: Phase,
    frozen: Params,
    table: ExpertTable,
    batches: Batches,
    steps: int,
    route: Callable | None,
    router: Params | None,
) -> Phase:
    """The expert phase at its start with w_down solved on the first `steps` batches.

    route(router, ids_ABT, segments_ABT) -> int32 experts [A, B, T]; None: there is one expert.
    """
    records = []
    with jax.transfer_guard_host_to_device("allow"):  # outside the loop of steps
        for step in range(steps):
            batch = place_batch(batches, step)
            ids_ABT, segments_ABT = batch["ids"], batch["segments"]
            expert_ABT = jnp.zeros_like(ids_ABT) if route is None else route(router, ids_ABT, segments_ABT)
            whole = {"ids": ids_ABT, "segments": segments_ABT, "expert": expert_ABT}
            records += [{name: array[a] for name, array in whole.items()} for a in range(len(expert_ABT))]
        params = join(phase.params, frozen)
        fitted = params | {"layers": params["layers"] | {"w_down": refit(cfg, params, table, records)}}
    # `ffn` leaves the rest in `frozen`; both parts hold w_down of the tuned one
    tuned, _ = split_tuned(fitted, "all" if not frozen else "ffn")
    return dataclasses.replace(phase, params=tuned)
