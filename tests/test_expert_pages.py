"""The FFN over pages against the masked FFN of part 1: tied, separate, static; any slots, parts that add up."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from oracles_core import random_table

from readme_jax.models import expert_pages, experts
from readme_jax.models.expert_pages import Pages
from readme_jax.serving.bank import Bank
from readme_jax.sharding import AXES, put

D, F, LAYERS = 16, 40, 2


def bank_and_weights(storage, count, page, biases=False, seed=0):
    """(bank, table [L, E, C], host weights {name: [L, F, ...]})."""
    rng = np.random.default_rng(seed)
    if storage == "separate":
        table_LEC = np.arange(count * (F // count)).reshape(1, count, -1).repeat(LAYERS, 0)
    else:
        table_LEC = np.asarray(random_table(LAYERS, count, F // 2, F))
    names = ("w_gate", "w_up", "w_down")
    weights = {name: rng.normal(size=(LAYERS, F, D)).astype(np.float32) / 4 for name in names}
    if biases:
        weights |= {name: rng.normal(size=(LAYERS, F)).astype(np.float32) for name in ("b_gate", "b_up")}
    bank = Bank.from_table(table_LEC, F, row_bytes=12 * D, page=page, separate=storage == "separate")
    return bank, table_LEC.astype(np.int32), weights


def placed(bank, table_LEC, weights, slots, seed=1):
    """(Pages, slot of each item): the pages in random slots among garbage."""
    host_IQD = expert_pages.host_pages(weights, bank.order_LR, bank.page)
    rng = np.random.default_rng(seed)
    slot_I = rng.permutation(slots)[: bank.items].astype(np.int32)
    pool_SQD = rng.normal(size=(slots, *host_IQD.shape[1:])).astype(np.float32) * 1e3
    pool_SQD[slot_I] = host_IQD
    bias = expert_pages.host_biases(weights, bank.order_LR, bank.page) if "b_gate" in weights else None
    bits = expert_pages.member_bits(expert_pages.membership(table_LEC, bank.order_LR, bank.page))
    return Pages(put(pool_SQD), put(bits), None if bias is None else put(bias)), slot_I


def oracle(x_MD, weights, table_LEC, layer, expert_M):
    """Part 1's masked FFN of one layer."""
    one = types.SimpleNamespace(**{name: put(w[layer]) for name, w in weights.items()})
    mask_EU = experts.make_table(table_LEC, F).mask_LEU[layer]
    if "b_gate" in weights:
        used = mask_EU.shape[1]
        one = types.SimpleNamespace(**{name: put(w[layer][:used]) for name, w in weights.items()})
    return np.asarray(experts.masked(x_MD[None], one, mask_EU, expert_M[None])[0])


def listed(bank, slot_I, layer, named, rng, length=None):
    """(slots, items, count): the pages of these experts in random order, then anything."""
    item_N = rng.permutation(bank.need(named)[layer]) + layer * bank.pages
    full = rng.integers(0, bank.items, length or bank.pages).astype(np.int32)
    full[: len(item_N)] = item_N
    return put(slot_I[full]), put(full), put(np.int32(len(item_N)))


WAYS = {
    "portable": jax.jit(expert_pages.portable),
    "kernel": jax.jit(functools.partial(expert_pages.kernel, interpret=True)),
}
run = WAYS["portable"]
CASES = [
    ("tied", 5, 8, False),
    ("tied", 3, 3, True),
    ("tied", 40, 4, False),
    ("separate", 4, 4, True),
    ("tied", 1, 16, False),
]


@pytest.mark.parametrize("storage, count, page, biases", CASES)
@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("way", WAYS)
def test_the_listed_pages_are_the_masked_ffn(mesh, storage, count, page, biases, tokens, way):
    bank, table_LEC, weights = bank_and_weights(storage, count, page, biases)
    pages, slot_I = placed(bank, table_LEC, weights, bank.items + 7)
    rng = np.random.default_rng(tokens)
    x_MD = put(rng.normal(size=(tokens, D)).astype(np.float32))
    for layer in range(LAYERS):
        expert_M = rng.integers(0, count, tokens).astype(np.int32)
        expected = oracle(x_MD, weights, table_LEC, layer, put(expert_M))
        got = WAYS[way](x_MD, pages, *listed(bank, slot_I, layer, set(expert_M.tolist()), rng), put(expert_M))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 64, 1024])
@pytest.mark.parametrize("d, page", [(576, 16), (4096, 32)])
def test_the_kernel_lowers_for_tpu(dtype, tokens, d, page):
    """Mosaic takes it for decode and prefill at the widths of SmolLM2 and Llama 2, and elsewhere it is not used."""
    slots, items, listed = 100, 300, 64
    shaped = jax.ShapeDtypeStruct
    pages = Pages(
        shaped((slots, 3 * page, d), dtype), shaped((items + 1, 1, page), jnp.uint32),
        shaped((items + 1, 2, page), dtype),
    )  # fmt: skip
    ids_N, one = shaped((listed,), jnp.int32), shaped((), jnp.int32)
    inputs = (shaped((tokens, d), dtype), pages, ids_N, ids_N, one, shaped((tokens,), jnp.int32))
    mesh = AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Explicit,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(expert_pages.ffn).trace(*inputs)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == 1 and "while" not in text
        assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_parts_of_a_list_add_up(mesh):
    bank, table_LEC, weights = bank_and_weights("tied", 5, 4)
    pages, slot_I = placed(bank, table_LEC, weights, bank.items)
    rng = np.random.default_rng(2)
    for tokens in (3, 20):
        x_MD = put(rng.normal(size=(tokens, D)).astype(np.float32))
        expert_M = put(rng.integers(0, 5, tokens).astype(np.int32))
        slot_N, item_N, count = listed(bank, slot_I, 1, range(5), rng)
        whole = run(x_MD, pages, slot_N, item_N, count, expert_M)
        cut = int(count) // 3
        first = run(x_MD, pages, slot_N, item_N, put(np.int32(cut)), expert_M)
        rest = run(x_MD, pages, jnp.roll(slot_N, -cut), jnp.roll(item_N, -cut), count - cut, expert_M)
        np.testing.assert_allclose(first + rest, whole, rtol=1e-5, atol=1e-5)
        assert not np.asarray(run(x_MD, pages, slot_N, item_N, put(np.int32(0)), expert_M)).any()


def test_one_program_for_any_number_of_pages(mesh):
    bank, table_LEC, weights = bank_and_weights("tied", 5, 2)
    pages, slot_I = placed(bank, table_LEC, weights, bank.items)
    rng, program = np.random.default_rng(3), jax.jit(functools.partial(expert_pages.portable))
    for named in ({0}, {1, 2}, set(range(5))):
        x_MD = put(rng.normal(size=(2, D)).astype(np.float32))
        program(x_MD, pages, *listed(bank, slot_I, 0, named, rng), put(np.array([min(named)] * 2, np.int32)))
    assert program._cache_size() == 1
