"""Streaming text: whole characters, stop strings across tokens, equal to decoding everything at once."""

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from readme_jax.serving.text import TextStream, decoder_of

TEXTS = ["naïve café", "a €5 note, 😀😀 and 👩‍👩‍👧", "ж 漢字 ok", "plain words only", "ends in half \u200d"]


@pytest.fixture(scope="module")
def decode(tmp_path_factory):
    """Of the tiny byte-level tokenizer: every byte above ASCII is a token of its own."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = decoder_of(tokenizer)
    found.tokenizer = tokenizer
    return found


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer as Llama 2's: `▁` for spaces, single bytes as tokens, the first space dropped."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁red", "▁blue", "▁", "green", "."]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def stream(decode, tokens, stop=()):
    """(shown text after each token and at the end, the stream)."""
    made, shown = TextStream(decode, stop), []
    for token in tokens:
        made.add(token)
        shown.append(made.text)
    made.finish()
    return [*shown, made.text], made


@pytest.mark.parametrize("text", TEXTS)
def test_characters_come_whole_and_at_once(decode, text):
    tokens = decode.tokenizer(text)["input_ids"]
    shown, made = stream(decode, tokens)
    assert made.text == text == decode.tokenizer.decode(tokens, skip_special_tokens=True)
    for count, now in enumerate(shown[:-1], 1):
        whole = decode(tokens[:count]).rstrip("\ufffd")
        assert now == whole, "all characters that are complete, and none that is not"


def test_any_tokens_give_what_decoding_them_at_once_gives(decode):
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens = rng.integers(0, 384, rng.integers(1, 40)).tolist()
        shown, made = stream(decode, tokens)
        assert made.text == decode.tokenizer.decode(tokens, skip_special_tokens=True)
        assert all(after.startswith(before) for before, after in zip(shown, shown[1:]))


def test_half_a_character_at_the_end(decode):
    tokens = decode.tokenizer("ok €")["input_ids"][:-1]
    shown, made = stream(decode, tokens)
    assert shown[-2] == "ok " and made.text == "ok \ufffd"


def test_special_tokens_are_left_out(decode):
    tokens = decode.tokenizer("red<|im_end|> blue")["input_ids"]
    assert stream(decode, tokens)[1].text == "red blue"


def test_spaces_of_sentencepiece(pieces):
    ids = {word: pieces.token_to_id(word) for word in ("▁red", "▁blue", "green", ".")}
    tokens = [ids["▁red"], ids["▁blue"], ids["green"], ids["."], ids["▁red"]]
    shown, made = stream(pieces.decode, tokens)
    assert shown[:5] == ["red", "red blue", "red bluegreen", "red bluegreen.", "red bluegreen. red"]
    euro = [pieces.token_to_id(f"<0x{b:02X}>") for b in "€😀".encode()]
    shown, made = stream(pieces.decode, [ids["▁red"], *euro, ids["▁blue"]])
    assert shown[:9] == ["red", "red", "red", "red€", "red€", "red€", "red€", "red€😀", "red€😀 blue"]
    broken = [*euro[:3], pieces.token_to_id("<0xFF>"), ids["▁blue"]]
    assert stream(pieces.decode, broken)[1].text == "€\ufffd blue", "a bad byte takes nothing back"


@pytest.mark.parametrize(
    "stop, expected",
    [
        ((" blue",), "red green"),
        (("nothing like it",), "red green blue. red"),
        (("e. r", "zz"), "red green blu"),
        (("blue", " bl"), "red green"),
        (("red",), ""),
        (("n b", "green blue"), "red gree"),
        ((". redd",), "red green blue. red"),
    ],
    ids=str,
)
def test_stop_strings(decode, stop, expected):
    text = "red green blue. red"
    shown, made = stream(decode, decode.tokenizer(text)["input_ids"], stop)
    assert made.text == expected and made.stopped == (expected != text)
    assert all(expected.startswith(now) for now in shown), "nothing of a stop string is ever shown"


def test_stop_strings_by_the_byte(decode):
    """Against the plain rule: the text up to the first place where a stop string is complete, token by token."""
    rng = np.random.default_rng(1)
    letters = [decode.tokenizer.convert_tokens_to_ids(c) for c in "ab"]
    for _ in range(300):
        tokens = rng.choice(letters, 14).tolist()
        stop = tuple("".join(rng.choice(list("ab"), rng.integers(2, 5))) for _ in range(rng.integers(1, 3)))
        shown, made = stream(decode, tokens, stop)
        whole, expected = decode(tokens), None
        for count in range(len(whole) + 1):
            found = [at for at in (whole[:count].find(s) for s in stop) if at >= 0]
            if found:
                expected = whole[: min(found)]
                break
        assert made.text == (whole if expected is None else expected) and made.stopped == (expected is not None)
        # held back is only what may still become a stop string
        for count, now in enumerate(shown[:-1], 1):
            rest = whole[len(now) : count]
            assert made.stopped or any(s.startswith(rest) for s in stop)


def test_after_a_stop_nothing_follows(decode):
    made = TextStream(decode, ("b",))
    ids = [decode.tokenizer.convert_tokens_to_ids(c) for c in "abc"]
    assert [made.add(i) for i in ids] == ["a", "", ""] and made.finish() == "" and made.text == "a"


def test_one_stop_as_unfinished_text_ends(decode):
    """A stop string may be completed by what was held back for want of bytes."""
    tokens = decode.tokenizer("a€")["input_ids"][:-1]
    shown, made = stream(decode, tokens, ("\ufffd",))
    assert made.text == "a" and made.stopped
