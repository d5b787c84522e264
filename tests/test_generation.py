"""Generation: cached decoding against repeated full forwards, batches of any lengths, sampling against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax import api, generation
from readme_jax.config import ConfigError, DataError
from readme_jax.generation import Sampling, sample

PROMPTS = [[5, 9, 300], [7] * 9 + [11, 250, 3], list(range(20, 60))]  # the last is past the first rung of 32
NEW = 12


@pytest.fixture(scope="module")
def tuned(stages):
    return api.load(stages.tuned)


@pytest.fixture(scope="module")
def greedy(tuned):
    return [row.tolist() for row in tuned.generate(PROMPTS, max_new_tokens=NEW, stop_tokens=[])]


def test_decode_equals_repeated_full_forward(tuned, greedy):
    for prompt, new in zip(PROMPTS, greedy):
        ids = list(prompt)
        for token in new:
            assert int(tuned.logits([ids])[0, -1].argmax()) == token
            ids.append(token)
    assert len({tuple(row) for row in greedy}) == 3 and all(len(row) == NEW for row in greedy)


def test_one_at_a_time_equals_a_batch(tuned, greedy):
    for row, prompt in enumerate(PROMPTS):
        assert tuned.generate([prompt], max_new_tokens=NEW, stop_tokens=[])[0].tolist() == greedy[row]
    turned = tuned.generate(PROMPTS[::-1], max_new_tokens=NEW, stop_tokens=[])
    assert [row.tolist() for row in turned] == greedy[::-1]


@pytest.mark.parametrize("name", ["dense", "static"])
def test_models_without_router(stages, name):
    model = api.load(getattr(stages, name))
    prompt = PROMPTS[1]
    new = model.generate([prompt], max_new_tokens=NEW, stop_tokens=[])[0].tolist()
    whole = model.logits([prompt + new])[0].argmax(-1)
    assert whole[len(prompt) - 1 : -1].tolist() == new


def test_stop_tokens_end_a_row_and_are_left_out(tuned, greedy):
    heard = []
    stop = greedy[1][4]
    expected = [row[: row.index(stop)] if stop in row else row for row in greedy]
    out = tuned.generate(
        PROMPTS, max_new_tokens=NEW, stop_tokens=[stop, 999], on_token=lambda row, token: heard.append((row, token))
    )
    assert [row.tolist() for row in out] == expected and len(expected[1]) <= 4
    for row in range(3):
        assert [token for at, token in heard if at == row] == expected[row]
    # every row has ended: nothing more is computed
    assert tuned.generate([PROMPTS[0]], max_new_tokens=NEW, stop_tokens=[greedy[0][0]])[0].tolist() == []


def test_the_folder_names_its_stop_tokens(tuned):
    assert tuned.stop_tokens == {0} == {tuned.tokenizer.eos_token_id}


def test_text_and_chat(tuned):
    one = tuned.generate("one two three", max_new_tokens=6)
    assert isinstance(one, str)
    assert tuned.generate(["one two three", "red"], max_new_tokens=6)[0] == one
    ids = tuned.tokenizer("one two three")["input_ids"]
    assert tuned.tokenizer.decode(tuned.generate([ids], max_new_tokens=6)[0]) == one
    chat = "<|im_start|>user\none two three<|im_end|>\n<|im_start|>assistant\n"
    assert tuned.generate("one two three", chat=True, max_new_tokens=6) == tuned.generate(chat, max_new_tokens=6)
    assert tuned.generate("one two three", chat=True, max_new_tokens=6) != one


def test_seeds(tuned):
    def run(seed, prompts=PROMPTS, **options):
        options = {"temperature": 1.5, "max_new_tokens": NEW, "stop_tokens": []} | options
        return [row.tolist() for row in tuned.generate(prompts, seed=seed, **options)]

    first = run(1)
    assert run(1) == first and run(2) != first
    assert run(1, PROMPTS[:1])[0] == first[0], "a row does not depend on the others"
    same = run(1, [PROMPTS[0]] * 2)
    assert same[0] == first[0] and same[1] != same[0], "rows are drawn apart"
    assert run(1, max_new_tokens=5) == [row[:5] for row in first], "nor on how many tokens are wanted"


def test_lengths_and_seeds_within_a_bucket_compile_nothing(tuned):
    def run(**options):
        tuned.generate(PROMPTS[:2], temperature=0.7, top_k=3, stop_tokens=[], **options)
        return generation._advance._cache_size()

    before = generation._advance._cache_size()
    first = run(max_new_tokens=2)
    assert first == before + 2  # prefill and decode
    assert run(max_new_tokens=20, seed=5) == run(max_new_tokens=9) == first
    assert run(max_new_tokens=40) <= first + 2  # the next rung of the cache


# ---- sampling against NumPy -------------------------------------------------------------------

LOGITS = np.random.default_rng(3).normal(size=(1, 12)).astype(np.float32) * 2
DRAWS = 4000


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def expected(temperature, top_k, top_p):
    """Distribution of the next token in plain NumPy: temperature, then top_k, then top_p."""
    x = LOGITS[0].astype(np.float64) / temperature
    order = np.argsort(-x)
    if top_k:
        x[order[top_k:]] = -np.inf
    p = softmax(x)
    kept, total = [], 0.0
    for i in order:
        if total >= top_p:
            break
        kept.append(i)
        total += p[i]
    out = np.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1.0, 0, 1), (0.5, 0, 1), (2.0, 4, 1), (1.0, 0, 0.7), (1.5, 5, 0.6), (1.0, 1, 1), (1.0, 0, 1e-6), (1.0, 50, 1)],
)  # fmt: skip
def test_sample_follows_the_distribution(temperature, top_k, top_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    keys = jax.random.split(jax.random.key(0), DRAWS)
    drawn = np.asarray(sample(jnp.asarray(np.repeat(LOGITS, DRAWS, 0)), keys, sampling))
    p = expected(temperature, top_k, top_p)
    share = np.bincount(drawn, minlength=12) / DRAWS
    assert drawn.dtype == np.int32 and not share[p == 0].any(), "only tokens that are kept"
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / DRAWS) + 1e-12).all()


def test_greedy_takes_the_first_of_equals():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [5.0, 1.0, 1.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert sample(logits, keys, Sampling(temperature=0, top_k=1, top_p=0.1)).tolist() == [1, 0]


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1e-40),
        dict(top_p=0.0),
        dict(top_p=1.01),
        dict(top_k=-1),
        dict(temperature=-1.0),
        dict(max_new_tokens=0),
        dict(seed=-1),
    ],
    ids=str,
)
def test_options_out_of_range(options):
    (name, value) = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"{name}={value} must"):
        Sampling(**options)


@pytest.mark.parametrize(
    "value", [None, "3", 2.5, True, float("nan"), np.array(3), [3], 10**400], ids=lambda v: repr(v)[:9]
)
@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed", "temperature", "top_p"])
def test_options_of_another_kind(name, value):
    if value == 2.5 and name in ("temperature", "top_p"):
        value = float("inf")
    with pytest.raises(ConfigError, match=f"{name}=.* must be a (whole|finite) number"):
        Sampling(**{name: value})


def test_options_of_numpy_are_those_of_python():
    options = dict(max_new_tokens=np.int64(3), temperature=np.float32(0.5), top_k=np.int8(2), seed=np.uint32(7))
    assert Sampling(**options) == Sampling(max_new_tokens=3, temperature=0.5, top_k=2, seed=7)
    assert hash(Sampling(temperature=1)) == hash(Sampling(temperature=1.0))


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "no prompt given"),
        ([[1, 2], []], "prompt 1 is empty"),
        ([[1, 384]], "prompt 0: token id 384 is outside the vocabulary of 384"),
        ([[-1]], "prompt 0: token id -1 is outside"),
        ([[1] * 501], r"prompt 0: 501 tokens \+ max_new_tokens=12 exceed the context of 512"),
    ],
)
def test_bad_prompts(tuned, prompts, message):
    with pytest.raises(DataError, match=message):
        tuned.generate(prompts, max_new_tokens=NEW)


def test_chat_needs_text(tuned):
    with pytest.raises(DataError, match="chat=True needs text"):
        tuned.generate([[1, 2]], chat=True)
