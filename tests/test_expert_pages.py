"""The FFN over pages against the masked FFN of part 1: tied, separate, static; any slots, parts that add up."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from oracles_core import random_table

from readme_jax.models import expert_kernels, expert_pages, expert_whole, experts
from readme_jax.models.expert_pages import Pages
from readme_jax.models.layers import FEW_ROWS
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
    "tpu": jax.jit(functools.partial(expert_kernels.tpu, interpret=True)),
    "gpu": jax.jit(functools.partial(expert_kernels.gpu, interpret=True)),
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


@pytest.mark.parametrize("way", ["tpu", "gpu"])
@pytest.mark.parametrize("tokens", [2, 70])
@pytest.mark.parametrize("dtype, error", [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_the_kernels_at_widths_that_are_no_power_of_two(mesh, way, tokens, dtype, error):
    """Masked blocks of tokens, columns and rows, several programs over a list, experts past one word; both sums are
    float32: bfloat16 rounds the hidden and the output once each."""
    d, page, count, listed = 600, 23, 40, 9
    rng = np.random.default_rng(tokens)
    draw = lambda *shape: put(rng.normal(size=shape).astype(dtype))  # noqa: E731
    x_MD, pool_SQD = draw(tokens, d), draw(listed + 1, 3 * page, d) / np.sqrt(d).astype(dtype)
    member_IER = rng.random((listed, count, page)) < 0.5
    pages = Pages(pool_SQD, put(expert_pages.member_bits(member_IER)), draw(listed + 1, 2, page))
    slot_N, item_N = rng.permutation(listed + 1)[:listed].astype(np.int32), np.arange(listed, dtype=np.int32)
    expert_M = rng.integers(0, count, tokens).astype(np.int32)
    listed_pages = put(slot_N), put(item_N), put(np.int32(listed - 2))
    got_MD = np.asarray(WAYS[way](x_MD, pages, *listed_pages, put(expert_M)), np.float64)
    x_MD, pool_SQD, bias_I2R = (np.asarray(w, np.float64) for w in (x_MD, pool_SQD, pages.bias_I2R))
    expected_MD = np.zeros_like(x_MD)
    for slot, item in list(zip(slot_N, item_N, strict=True))[:-2]:
        gate_RD, up_RD, down_RD = np.split(pool_SQD[slot], 3)
        gate_MR, up_MR = x_MD @ gate_RD.T + bias_I2R[item, 0], x_MD @ up_RD.T + bias_I2R[item, 1]
        h_MR = gate_MR / (1 + np.exp(-gate_MR)) * up_MR * member_IER[item, expert_M]
        expected_MD += h_MR @ down_RD
    off = np.linalg.norm(got_MD - expected_MD) / np.linalg.norm(expected_MD)
    assert off < error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 64, 1024])
@pytest.mark.parametrize("d, page", [(576, 16), (4096, 32)])
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_the_kernels_lower(dtype, tokens, d, page):
    """For TPU and GPU, decode and prefill, at the widths of SmolLM2 and Llama 2, and elsewhere they are not used."""
    slots, items, listed = 100, 300, 64
    shaped = jax.ShapeDtypeStruct
    pages = Pages(
        shaped((slots, 3 * page, d), dtype), shaped((items + 1, 1, page), jnp.uint32),
        shaped((items + 1, 2, page), dtype),
    )  # fmt: skip
    ids_N, one = shaped((listed,), jnp.int32), shaped((), jnp.int32)
    inputs = (shaped((tokens, d), dtype), pages, ids_N, ids_N, one, shaped((tokens,), jnp.int32))
    texts = {}
    for platform in ("tpu", "cuda", "cpu"):
        # what Triton compiles for is asked of the mesh where there is no GPU
        device = AbstractDevice("NVIDIA H100", 132, "gpu") if platform == "cuda" else None
        mesh = AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Explicit,) * 3, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            texts[platform] = jax.jit(expert_pages.ffn).trace(*inputs).lower(lowering_platforms=(platform,)).as_text()
    assert texts["tpu"].count("tpu_custom_call") == 1 and "stablehlo.while" not in texts["tpu"]
    assert texts["cuda"].count("xla.gpu.triton") == 2 and "stablehlo.while" not in texts["cuda"]
    assert "custom_call" not in texts["cpu"] and "stablehlo.while" in texts["cpu"]


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


@pytest.mark.parametrize("storage, count, page, biases", CASES)
@pytest.mark.parametrize("tokens", [1, 6, FEW_ROWS + 1])
def test_pages_in_their_place_are_the_masked_ffn(mesh, storage, count, page, biases, tokens):
    """All pages of a layer in two arrays; one token reads the pages on its expert's list only."""
    bank, table_LEC, weights = bank_and_weights(storage, count, page, biases)
    rng = np.random.default_rng(5)
    x_MD = put(rng.normal(size=(tokens, D)).astype(np.float32))
    expert_M = put(rng.integers(0, count, tokens).astype(np.int32))
    bits_IWR = expert_pages.member_bits(expert_pages.membership(table_LEC, bank.order_LR, bank.page))
    bias_I2R = expert_pages.host_biases(weights, bank.order_LR, bank.page) if biases else None
    list_ELX = expert_whole.host_lists(bank.touch_LPE)
    host = expert_whole.host_layers(weights, bank.order_LR, bits_IWR, bias_I2R, np.float32)
    for layer, one in enumerate(host):
        whole = jax.tree.map(put, one)
        expected = oracle(x_MD, weights, table_LEC, layer, expert_M)
        np.testing.assert_allclose(jax.jit(expert_whole.ffn)(x_MD, whole, expert_M), expected, rtol=0, atol=2e-5)
        if tokens == 1:
            list_X = list_ELX[int(expert_M[0]), layer]
            assert sorted(list_X[: list_X[-1]]) == sorted(bank.need([int(expert_M[0])])[layer])
            away = np.isin(np.arange(bank.pages), list_X[: list_X[-1]], invert=True)
            poisoned = dataclasses.replace(whole, wide_PQD=whole.wide_PQD.at[away].set(np.nan))
            got = jax.jit(expert_whole.listed)(x_MD, poisoned, put(list_X), expert_M)
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
