"""Documents, files of them, and a tokenizer of bytes, for tests of text."""

import json

import numpy as np

from readme_jax.data import DomainConfig, documents

WORDS = "the quick brown fox jumps over a lazy dog while seven black birds watch from their old grey wall".split()
BOS, EOS = 256, 257
VOCAB = 258


def write_tokenizer(folder, *, opening=False):
    """A byte-level tokenizer without merges: token id = byte's place in the alphabet, then <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"<s>": BOS, "</s>": EOS}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if opening:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def texts(count, seed=0, words=30):
    rng = np.random.default_rng(seed)
    return [f"{seed}-{i} " + " ".join(rng.choice(WORDS, words)) for i in range(count)]


def write_jsonl(path, docs, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in docs))
    return DomainConfig(source="files", path=str(path), field=field)


def every_split(name, domain, **options):
    return {split: list(documents(name, domain, split, **options)) for split in ("train", "valid", "test")}
