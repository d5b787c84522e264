"""Pallas kernels of the FFN over pages of channels, for TPU and for NVIDIA GPUs; `expert_pages.ffn` chooses (DESIGN 4).

Both read the pages that a list names and no others, each once for a tile of tokens, multiply in the dtype of the tokens
and add up in float32. Letters as in `expert_pages`; T tokens of a tile, K columns and C rows of a page that a program
takes at a time, P parts of a list.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu

from readme_jax.sharding import REPLICATED

try:
    from jax.experimental.pallas import triton as _triton
except ImportError:  # jax 0.12 announces its end: GPUs then run the portable way
    _triton = None

triton: Any = _triton
WORD = 32
TILE = 256  # most tokens that the TPU kernel keeps beside a page
VMEM = 15 << 20  # bytes of on-chip memory that it fills: a kernel on TPU v5e may have 16 MiB
GPU_TILE = 64  # tokens of one program on a GPU
GPU_PROGRAMS = 512  # enough for each of an H100's 132 multiprocessors to hold several


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """What the FFN of every layer reads.

    pool_SQD: the pages on the device. member_IWR: uint32, bit e % 32 of word e // 32 is set when expert e has the
    channel; one item more than there are, all zero, for the padding of lists. bias_I2R: biases of gate and up in the
    pages' order, None for families without.
    """

    pool_SQD: jax.Array
    member_IWR: jax.Array
    bias_I2R: jax.Array | None = None


def row_major(place: jax.sharding.Sharding) -> Format:
    """Where and how the arrays of `Pages` lie for the kernels: last axis innermost, padded as the device needs.

    XLA's own choice on TPU wastes no byte: at 576 columns it puts the slots innermost, and copies the whole pool in
    front of every call.
    """
    return Format(Layout(major_to_minor=(0, 1, 2)), place)


def keep(member_W1R: Sequence[jax.Array], expert_M1: jax.Array) -> jax.Array:
    """bool [M, R]: the token's expert has the channel of a page's row; `member_W1R` has one array [1, R] for a word."""
    word_MR = member_W1R[0]
    for w, word_1R in enumerate(member_W1R[1:], 1):
        word_MR = jnp.where(expert_M1 >> 5 == w, word_1R, word_MR)
    return (word_MR >> (expert_M1 & (WORD - 1)).astype(jnp.uint32)) & 1 != 0


def _tpu_kernel(slot_N, item_N, count_1, x_ref, pool_ref, member_ref, bias_ref, expert_ref, out_ref):
    """One page for one tile of tokens: page n of the list is fetched while page n - 1 is computed."""
    del slot_N, item_N  # the index maps read them
    n, rows = pl.program_id(1), pool_ref.shape[1] // 3

    @pl.when(n == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(n < count_1[0])
    def _():
        def product(first: int) -> jax.Array:
            w_RD = pool_ref[0, first : first + rows, :]
            return jax.lax.dot_general(x_MD, w_RD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

        x_MD = x_ref[...]
        gate_MR, up_MR = product(0), product(rows)
        if bias_ref is not None:
            gate_MR += bias_ref[0, :1, :].astype(jnp.float32)
            up_MR += bias_ref[0, 1:, :].astype(jnp.float32)
        h_MR = gate_MR * jax.nn.sigmoid(gate_MR) * up_MR
        member_W1R = [member_ref[0, w : w + 1, :] for w in range(member_ref.shape[1])]
        h_MR = jnp.where(keep(member_W1R, expert_ref[...]), h_MR, 0.0).astype(x_MD.dtype)
        w_RD = pool_ref[0, 2 * rows :, :]
        out_ref[...] += jnp.dot(h_MR, w_RD, preferred_element_type=jnp.float32)


def tpu_tile(tokens: int, width: int, rows: int, itemsize: int) -> int:
    """Tokens, a multiple of 16, whose inputs and float32 outputs lie in VMEM beside two pages; twice where one tile
    follows another."""
    tile = min(TILE, -(-tokens // 16) * 16)
    pages = 2 * 3 * rows * width * itemsize
    while tile > 16 and pages + (1 + (tokens > tile)) * tile * width * (itemsize + 4) > VMEM:
        tile = -(-tile // 32) * 16
    return tile


def tpu(
    x_MD: jax.Array,
    pages: Pages,
    slot_N: jax.Array,
    item_N: jax.Array,
    count: jax.Array,
    expert_M: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`expert_pages.ffn` as a Pallas kernel for TPU.

    The list is known before the kernel runs, so pages stream in one after another. Past `count` the list's last page is
    named again, which fetches nothing. Arrays of `pages` lie as `row_major` has them, or XLA copies them first.
    """
    (m, d), (_, q, _), (_, words, rows) = x_MD.shape, pages.pool_SQD.shape, pages.member_IWR.shape
    tile = tpu_tile(m, d, rows, x_MD.dtype.itemsize)
    spare = -m % tile
    x_MD, expert_M1 = jnp.pad(x_MD, ((0, spare), (0, 0))), jnp.pad(expert_M, (0, spare))[:, None]

    def last(n, count_1):
        return jnp.maximum(jnp.minimum(n, count_1[0] - 1), 0)

    def tokens(i, n, slot_N, item_N, count_1):
        return i, 0

    def slot(i, n, slot_N, item_N, count_1):
        return slot_N[last(n, count_1)], 0, 0

    def item(i, n, slot_N, item_N, count_1):
        return item_N[last(n, count_1)], 0, 0

    biased = pages.bias_I2R is not None
    in_specs = [
        pl.BlockSpec((tile, d), tokens),
        pl.BlockSpec((1, q, d), slot),
        pl.BlockSpec((1, words, rows), item),
        pl.BlockSpec((1, 2, rows), item) if biased else None,
        pl.BlockSpec((tile, 1), tokens),
    ]
    run = pl.pallas_call(
        _tpu_kernel if biased else _unbiased,
        out_shape=jax.ShapeDtypeStruct(x_MD.shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(x_MD.shape[0] // tile, slot_N.shape[0]),
            in_specs=[spec for spec in in_specs if spec is not None],
            out_specs=pl.BlockSpec((tile, d), tokens),
        ),
        interpret=interpret,
        name="expert_pages",
    )
    # by hand over the mesh's one device: with Explicit axes a kernel's buffers have no types
    run = jax.shard_map(run, in_specs=REPLICATED, out_specs=REPLICATED, check_vma=False)
    inputs = (x_MD, pages.pool_SQD, pages.member_IWR, *((pages.bias_I2R,) if biased else ()), expert_M1)
    return run(slot_N, item_N, count[None], *inputs)[:m].astype(x_MD.dtype)


def _unbiased(slot_N, item_N, count_1, x_ref, pool_ref, member_ref, expert_ref, out_ref):
    _tpu_kernel(slot_N, item_N, count_1, x_ref, pool_ref, member_ref, None, expert_ref, out_ref)


def _power(number: int) -> int:
    """The least power of two from 16 that is not below: what Triton's blocks and products take."""
    return max(16, 1 << (number - 1).bit_length())


def _product(x_TK: jax.Array, w_CK: jax.Array, dim: int) -> jax.Array:
    """[T, C] with [C, K], dim 1, or [T, K] with [C, K], dim 0, summed in float32. As everywhere on such a GPU, float32
    inputs are rounded to TF32 unless `jax_default_matmul_precision` forbids it."""
    dims = (((1,), (dim,)), ((), ()))
    return jax.lax.dot_general(x_TK, w_CK.astype(x_TK.dtype), dims, preferred_element_type=jnp.float32)


def _wide_kernel(slot_N, item_N, count_1, x_ref, pool_ref, member_ref, expert_ref, *rest, tile, step, block):
    """h of C rows of one page for one tile of tokens, zero where a token's expert has no such channel."""
    bias_ref, h_ref = rest if len(rest) == 2 else (None, *rest)
    (m, d), (_, words, rows) = x_ref.shape, member_ref.shape
    first, n, row = pl.program_id(0) * tile, pl.program_id(1), pl.program_id(2) * block
    mine_T = first + jnp.arange(tile) < m if m % tile else None
    mine_C = row + jnp.arange(block) < rows if rows % block else None

    @pl.when(n < count_1[0])
    def _():
        slot, item = slot_N[n], item_N[n]

        def row_of(ref, at: int) -> jax.Array:
            """[1, C] of an array [items, rows of it, R]."""
            return _load(ref.at[item, pl.ds(at, 1), pl.ds(row, block)], _both(None, mine_C))

        def body(j, sums):
            in_K = j * step + jnp.arange(step) < d if d % step else None
            x_TK = _load(x_ref.at[pl.ds(first, tile), pl.ds(j * step, step)], _both(mine_T, in_K))
            refs = [pool_ref.at[slot, pl.ds(side * rows + row, block), pl.ds(j * step, step)] for side in (0, 1)]
            return tuple(
                y_TC + _product(x_TK, _load(ref, _both(mine_C, in_K)), 1) for y_TC, ref in zip(sums, refs, strict=True)
            )

        gate_TC, up_TC = jax.lax.fori_loop(0, -(-d // step), body, (jnp.zeros((tile, block), jnp.float32),) * 2)
        if bias_ref is not None:
            gate_TC += row_of(bias_ref, 0).astype(jnp.float32)
            up_TC += row_of(bias_ref, 1).astype(jnp.float32)
        h_TC = gate_TC * jax.nn.sigmoid(gate_TC) * up_TC
        expert_T = _load(expert_ref.at[pl.ds(first, tile)], mine_T)
        member_W1C = [row_of(member_ref, w) for w in range(words)]
        h_TC = jnp.where(keep(member_W1C, expert_T[:, None]), h_TC, 0.0).astype(h_ref.dtype)
        _store(h_ref.at[n, pl.ds(first, tile), pl.ds(row, block)], h_TC, _both(mine_T, mine_C))


def _down_kernel(slot_N, count_1, pool_ref, h_ref, out_ref, *, tile, step, block):
    """K columns of the output of one tile, over every P-th page of the list."""
    (_, m, rows), (parts, _, d) = h_ref.shape, out_ref.shape
    first, column, part = pl.program_id(0) * tile, pl.program_id(1) * step, pl.program_id(2)
    mine_T = first + jnp.arange(tile) < m if m % tile else None
    in_K = column + jnp.arange(step) < d if d % step else None
    blocks = -(-rows // block)

    def body(i, y_TK):
        page, at = jax.lax.div(i, jnp.int32(blocks)), jax.lax.rem(i, jnp.int32(blocks))
        n, row = part + page * parts, at * block
        mine_C = row + jnp.arange(block) < rows if rows % block else None
        h_TC = _load(h_ref.at[n, pl.ds(first, tile), pl.ds(row, block)], _both(mine_T, mine_C))
        w_ref = pool_ref.at[slot_N[n], pl.ds(2 * rows + row, block), pl.ds(column, step)]
        return y_TK + _product(h_TC, _load(w_ref, _both(mine_C, in_K)), 0)

    turns = jax.lax.div(jnp.maximum(count_1[0] - part + parts - 1, 0), jnp.int32(parts)) * blocks
    y_TK = jax.lax.fori_loop(0, turns, body, jnp.zeros((tile, step), jnp.float32))
    _store(out_ref.at[part, pl.ds(first, tile), pl.ds(column, step)], y_TK, _both(mine_T, in_K))


def _both(mine_A: jax.Array | None, mine_B: jax.Array | None) -> jax.Array | None:
    """[A, B], or what broadcasts to it; None: all."""
    if mine_A is None:
        return None if mine_B is None else mine_B[None, :]
    return mine_A[:, None] if mine_B is None else mine_A[:, None] & mine_B[None, :]


def _load(ref, mask: jax.Array | None) -> jax.Array:
    """What a part of an array holds, zero outside `mask`; None: the array is a whole number of such parts."""
    if mask is None:
        return triton.load(ref)
    return triton.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0)


def _store(ref, value: jax.Array, mask: jax.Array | None) -> None:
    triton.store(ref, value, mask=None if mask is None else jnp.broadcast_to(mask, value.shape))


def gpu(
    x_MD: jax.Array,
    pages: Pages,
    slot_N: jax.Array,
    item_N: jax.Array,
    count: jax.Array,
    expert_M: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`expert_pages.ffn` as two Pallas kernels for GPUs, compiled by Triton.

    In the first a program takes gate and up of one page, or of 16 rows of it when tokens are few; the second splits the
    columns of the output and then the list of pages, so that one token of a decode step keeps the whole device reading.
    Its partial sums are added up afterwards, in an order that depends on shapes only. Programs past `count` do nothing.
    """
    (m, d), (listed,), (_, _, rows), size = x_MD.shape, slot_N.shape, pages.member_IWR.shape, x_MD.dtype.itemsize
    tile = min(GPU_TILE, _power(m))
    tiles, few = -(-m // tile), tile == 16
    # bytes of a row that a program asks for at a time: where tokens are few, so are programs, and each asks for more
    step, narrow = min((512 if few else 256) // size, _power(d)), min((256 if few else 128) // size, _power(d))
    block, columns = min(16 if few else 64, _power(rows)), -(-d // narrow)
    # the partial sums of all parts take no more bytes than the rows that they are sums of
    parts = max(1, min(listed, GPU_PROGRAMS // (tiles * columns), listed * rows * size // (4 * m)))

    def call(kernel, stages: int, **shapes):
        params = triton.CompilerParams(num_warps=4, num_stages=stages)
        return pl.pallas_call(kernel, compiler_params=params, interpret=interpret, **shapes)

    wide = call(
        functools.partial(_wide_kernel, tile=tile, step=step, block=block),
        stages=4 if few else 3,
        out_shape=jax.ShapeDtypeStruct((listed, m, rows), x_MD.dtype),
        grid=(tiles, listed, -(-rows // block)),
        name="expert_pages_wide",
    )
    down = call(
        functools.partial(_down_kernel, tile=tile, step=narrow, block=min(64, _power(rows))),
        stages=7,  # Triton gives half of them to the slots, which must be there before their pages are asked for
        out_shape=jax.ShapeDtypeStruct((parts, m, d), jnp.float32),
        grid=(tiles, columns, parts),
        name="expert_pages_down",
    )

    def run(slot_N, item_N, count_1, x_MD, pool_SQD, *rest):
        h_NMR = wide(slot_N, item_N, count_1, x_MD, pool_SQD, *rest)
        return jnp.sum(down(slot_N, count_1, pool_SQD, h_NMR), axis=0).astype(x_MD.dtype)

    # by hand over the mesh's one device: with Explicit axes a kernel's buffers have no types
    run = jax.shard_map(run, in_specs=REPLICATED, out_specs=REPLICATED, check_vma=False)
    bias = () if pages.bias_I2R is None else (pages.bias_I2R,)
    return run(slot_N, item_N, count[None], x_MD, pages.pool_SQD, pages.member_IWR, expert_M, *bias)
