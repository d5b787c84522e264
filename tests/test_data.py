"""Documents and their split, packing against a plain recount, prepared artifacts, and batches as a function of step."""

import collections
import dataclasses
import errno
import json
import os
import sys
import types

import numpy as np
import pytest

from readme_jax import artifacts, corpus, data, packing
from readme_jax.config import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    DataError,
    SourceError,
    from_dict,
    load_yaml,
)
from readme_jax.data import Batches, DataConfig, DomainConfig, Records, documents, pack

WORDS = "the quick brown fox jumps over a lazy dog while seven black birds watch from their old grey wall".split()
BOS, EOS = 256, 257
VOCAB = 258


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return data.load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


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


# ---- configs ----------------------------------------------------------------------------------


def test_config_from_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "domains:\n  code: {source: fallback, weight: 2}\n  wiki: {source: hub, path: some/set, name: en}\n"
        "seq: 64\ntrain_tokens: 1000\neval_tokens: 100\ncalibration_tokens: 100\n"
    )
    config = load_yaml(DataConfig, tmp_path / "run.yaml")
    assert config.weights == {"code": 2.0, "wiki": 1.0}
    assert config.domains["wiki"] == DomainConfig(source="hub", path="some/set", name="en")
    assert config.tokens == {"train": 1000, "test": 100, "calibration": 100}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"domains": {}}, "domains is empty"),
        ({"seq": 7}, "seq=7 must be at least 8"),
        ({"train_tokens": -1}, "train_tokens=-1 must be 0 or more"),
        ({"train_tokens": 0, "eval_tokens": 0, "calibration_tokens": 0}, "are all 0"),
        ({"seed": 0}, "seed: no such key"),
        ({"domains": {"a/b": {"source": "fallback"}}}, "domains.a/b: a domain name may hold"),
        ({"domains": {"a": {"source": "fallback", "weight": 0}}}, "every weight is 0"),
        ({"domains": {"a": {"source": "fallback", "weight": -0.5}}}, "domains.a: weight=-0.5 must be 0 or more"),
        ({"domains": {"a": {"source": "fallback", "weight": float("nan")}}}, "weight=nan"),
        ({"domains": {"a": {"source": "ftp", "path": "x"}}}, "'ftp' is not one of"),
        ({"domains": {"a": {"source": "hub"}}}, "path is empty; source=hub needs one"),
        ({"domains": {"a": {"source": "files", "path": "x", "field": ""}}}, "field is empty"),
        ({"domains": {"a": {"source": "files", "path": "x", "colour": 1}}}, "domains.a.colour: no such key"),
    ],
)
def test_bad_config(change, message):
    good = {
        "domains": {"a": {"source": "fallback"}},
        "seq": 8,
        "train_tokens": 8,
        "eval_tokens": 8,
        "calibration_tokens": 8,
    }
    from_dict(DataConfig, good)
    with pytest.raises(ConfigError) as caught:
        from_dict(DataConfig, good | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_source_without_yaml():
    with pytest.raises(ConfigError, match="source='ftp' is not one of fallback, files, hub"):
        DomainConfig(source="ftp", path="x")  # type: ignore[arg-type]


# ---- documents --------------------------------------------------------------------------------


def test_split_is_a_division_by_hash(tmp_path):
    docs = texts(2000)
    parts = every_split("d", write_jsonl(tmp_path / "a.jsonl", docs))
    assert sorted(sum(parts.values(), [])) == sorted(docs)
    assert not set(parts["train"]) & set(parts["test"]) and not set(parts["train"]) & set(parts["valid"])
    shares = {split: len(found) / len(docs) for split, found in parts.items()}
    assert shares == pytest.approx({"train": 0.90, "valid": 0.05, "test": 0.05}, abs=0.02)
    # Order of the source does not matter, nor do other documents: each text keeps its split.
    assert every_split("d", write_jsonl(tmp_path / "b.jsonl", docs[::-1])) == parts
    half = every_split("d", write_jsonl(tmp_path / "c.jsonl", docs[:1000]))
    assert all(set(half[split]) <= set(parts[split]) for split in parts)
    assert parts["train"] != [text for text in docs if text in set(parts["train"])]  # mixed, not source order


def test_windows_keep_every_document(tmp_path, monkeypatch):
    docs = texts(500)
    domain = write_jsonl(tmp_path / "a.jsonl", docs)
    whole = every_split("d", domain)
    monkeypatch.setitem(corpus.WINDOW, "files", 5000)
    windowed = every_split("d", domain)
    assert {s: sorted(p) for s, p in windowed.items()} == {s: sorted(p) for s, p in whole.items()}
    early = set(docs[:60])
    assert set(windowed["train"][:20]) <= early  # text of the first windows comes first: a stream need not end


def test_few_long_documents_are_split_by_piece(tmp_path):
    books = ["\n\n".join(texts(700, seed, words=20)) for seed in range(3)]
    parts = every_split("books", write_jsonl(tmp_path / "a.jsonl", books))
    assert all(parts.values())
    assert max(map(len, sum(parts.values(), []))) <= corpus.PIECE
    assert sum(map(len, sum(parts.values(), []))) == sum(map(len, books))
    share = sum(map(len, parts["train"])) / sum(map(len, books))
    assert 0.8 < share < 0.98
    shorter = every_split("books", write_jsonl(tmp_path / "b.jsonl", books), piece=1000)
    assert {s: sum(map(len, p)) for s, p in shorter.items()} == {s: sum(map(len, p)) for s, p in parts.items()}


def test_long_documents_among_many_stay_in_one_split(tmp_path):
    docs = texts(150)
    marks = [f"mark{i:03d}" for i in range(40)]
    docs += [" ".join([mark] * 3000) for mark in marks]
    parts = every_split("d", write_jsonl(tmp_path / "a.jsonl", docs), piece=2000)
    homes = {mark: {split for split, found in parts.items() for text in found if mark in text} for mark in marks}
    assert all(len(home) == 1 for home in homes.values())
    assert max(map(len, sum(parts.values(), []))) <= 2000


def test_cut_prefers_paragraphs():
    text = "a" * 30 + "\n\n" + "b" * 10 + "\n" + "c" * 30 + " " + "d" * 200
    pieces = corpus.cut(text, 40)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 40
    assert pieces[:3] == ["a" * 30 + "\n\n", "b" * 10 + "\n" + "c" * 29, "c " + "d" * 38]
    assert corpus.cut("short", 40) == ["short"] and corpus.cut("x" * 40, 40) == ["x" * 40]


def test_file_kinds_read_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet

    docs = [*texts(120), "line one\nline two"]
    (tmp_path / "list.json").write_text(json.dumps([{"text": t} for t in docs]))
    (tmp_path / "lines.json").write_text("".join(json.dumps({"text": t}) + "\n" for t in docs))
    write_jsonl(tmp_path / "rows.jsonl", docs)
    pyarrow.parquet.write_table(pyarrow.table({"text": docs, "id": range(len(docs))}), tmp_path / "rows.parquet")
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(docs):
        (tmp_path / "txt" / f"{i}.txt").write_text(text)
    import datasets

    datasets.Dataset.from_dict({"id": range(len(docs)), "text": docs}).save_to_disk(tmp_path / "saved", num_shards=3)
    assert len(list((tmp_path / "saved").glob("*.arrow"))) == 3
    paths = ["list.json", "lines.json", "rows.jsonl", "rows.parquet", "txt", "txt/*.txt", "**/[0-9]*.txt", "saved"]
    paths += ["saved/*.arrow"]
    found = [every_split("d", DomainConfig(source="files", path=str(tmp_path / path))) for path in paths]
    assert sorted(sum(found[0].values(), [])) == sorted(docs)
    assert all(other == found[0] for other in found[1:])


def test_blank_and_null_text_is_left_out(tmp_path):
    docs = ["", "  \n", None, *texts(3)]
    found = every_split("d", write_jsonl(tmp_path / "a.jsonl", docs))
    assert sorted(sum(found.values(), [])) == sorted(texts(3))


@pytest.mark.parametrize(
    "name, content, error, message",
    [
        ("a.jsonl", b'{"body": "x", "id": 1}\n', DataError, "a.jsonl line 1: field 'text' is missing; it has body, id"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', DataError, "line 2: field 'text' is int, not text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text"\n', DataError, "a.jsonl line 3: not JSON"),
        ("a.jsonl", b'["x"]\n', DataError, "field 'text' is missing"),
        ("a.json", b'{"text": "x"', DataError, "a.json: not JSON"),
        ("a.txt", b"\xff\xfe\xfd", DataError, "not UTF-8"),
        ("a.parquet", b"nothing of the kind", DataError, "not a readable parquet file"),
        ("a.arrow", b"nothing of the kind", DataError, "not a readable arrow file"),
        ("a.csv", b"text\nx\n", ConfigError, "unsupported suffix '.csv'"),
    ],
)
def test_bad_files(tmp_path, name, content, error, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error) as caught:
        list(documents("law", DomainConfig(source="files", path=str(tmp_path / name)), "train"))
    assert message in str(caught.value) and str(caught.value).startswith("domain law: ")
    assert "\n" not in str(caught.value)


def test_parquet_without_the_field(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="field 'text' is missing; it has body, id"):
        list(documents("law", DomainConfig(source="files", path=str(tmp_path / "a.parquet")), "train"))


def test_saved_folders_that_are_none(tmp_path):
    import datasets

    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts(3)})}).save_to_disk(saved)

    def read(path):
        return list(documents("law", DomainConfig(source="files", path=str(path)), "train"))

    assert read(saved / "train")
    with pytest.raises(ConfigError, match="domain law: path=.*saved holds several splits; name one of its folders"):
        read(saved)
    (saved / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(SourceError, match="arrow: listed in state.json but missing"):
        read(saved / "train")
    (saved / "train" / "state.json").write_text("[]")
    with pytest.raises(DataError, match="state.json: not of a saved data set"):
        read(saved / "train")


def streamed(tmp_path, monkeypatch, docs):
    """A hub data set of three files, streamed by `datasets` itself; returns the domain and the rows read of it."""
    import datasets

    real, files = datasets.load_dataset, []
    for i in range(3):
        files.append(str(tmp_path / f"shard{i}.jsonl"))
        write_jsonl(tmp_path / f"shard{i}.jsonl", docs[i::3])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, name, **options: real("json", data_files=files, **options)
    )
    return DomainConfig(source="hub", path="some/set")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "few", "hub"])
def test_windows_go_on_after_any_place(tmp_path, monkeypatch, kind):
    import pyarrow
    import pyarrow.parquet

    docs = ["", *texts(400, words=20), " "]
    if kind == "hub":
        domain = streamed(tmp_path, monkeypatch, docs)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": docs}), tmp_path / "a.parquet")
        domain = DomainConfig(source="files", path=str(tmp_path / "a.parquet"))
    else:
        few = ["\n\n".join(texts(300, seed, words=20)) for seed in range(3)]
        domain = write_jsonl(tmp_path / "a.jsonl", few if kind == "few" else docs)
    monkeypatch.setitem(corpus.WINDOW, domain.source, 3000)
    for split in ("train", "test"):
        whole = list(corpus.windows("d", domain, split))
        assert len(whole) > 8 and sum((texts for texts, _ in whole), []) == list(documents("d", domain, split))
        for i, (_, place) in enumerate(whole):
            place = json.loads(json.dumps(place))
            assert ("stream" in place) == (kind == "hub" and place["rows"] > corpus.MANY)
            assert [t for t, _ in corpus.windows("d", domain, split, after=place)] == [
                t for t, _ in whole[i + 1 :]
            ] or (i == len(whole) - 1 and not any(t for t, _ in corpus.windows("d", domain, split, after=place)))


def test_a_stream_goes_on_without_reading_what_was_read(tmp_path, monkeypatch):
    domain = streamed(tmp_path, monkeypatch, texts(600, words=20))
    monkeypatch.setitem(corpus.WINDOW, "hub", 3000)
    *_, (last, place) = corpus.windows("d", domain, "train")
    places = [place for _, place in corpus.windows("d", domain, "train")]
    for i in range(2):  # the first two of three files are not needed any more
        (tmp_path / f"shard{i}.jsonl").write_text("not even JSON")
    late = next(place for place in places if place["rows"] > 450)
    assert list(corpus.windows("d", domain, "train", after=late))
    with pytest.raises(SourceError):
        list(corpus.windows("d", domain, "train"))


def test_missing_path(tmp_path):
    with pytest.raises(SourceError, match="domain law: path=.*nothing.* matches no file"):
        list(documents("law", DomainConfig(source="files", path=str(tmp_path / "nothing*.jsonl")), "train"))


def test_unknown_split():
    with pytest.raises(ConfigError, match="split='dev' is not one of"):
        list(documents("law", DomainConfig(source="fallback"), "dev"))  # type: ignore[arg-type]


def fake_sources(monkeypatch, folder):
    asked = []

    def fetch_domains(names=None):
        asked.append(names)
        return {name: folder / f"{name}.jsonl" for name in names or ()}

    import readme_jax

    module = types.ModuleType("readme_jax.sources")
    module.fetch_domains = fetch_domains  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "readme_jax.sources", module)
    monkeypatch.setattr(readme_jax, "sources", module, raising=False)
    return asked


def test_fallback_source(tmp_path, monkeypatch):
    asked = fake_sources(monkeypatch, tmp_path)
    for name in ("wiki", "news"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in texts(120)])
    own = list(documents("wiki", DomainConfig(source="fallback"), "train"))
    other = list(documents("mine", DomainConfig(source="fallback", path="news"), "train"))
    assert asked == [["wiki"], ["news"]]
    assert own and all(t.startswith("wiki ") for t in own) and other and all(t.startswith("news ") for t in other)


def test_hub_source_streams_and_reports(monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, name=None, *, split, streaming):
        calls.append((path, name, split, streaming))
        if path == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist\nsecond line")
        return iter([{"body": text} for text in texts(300)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    good = DomainConfig(source="hub", path="some/set", name="en", split="validation", field="body")
    assert sorted(sum(every_split("d", good).values(), [])) == sorted(texts(300))
    assert calls[0] == ("some/set", "en", "validation", True)
    with pytest.raises(SourceError) as caught:
        list(documents("law", DomainConfig(source="hub", path="no/such"), "test"))
    assert str(caught.value) == (
        "domain law: hub data set no/such (train) cannot be read: Dataset 'no/such' doesn't exist"
    )


# ---- tokenizer and packing --------------------------------------------------------------------


def test_load_tokenizer(tmp_path, tokenizer):
    text = "héllo wörld"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    with pytest.raises(CheckpointError, match="no such folder"):
        data.load_tokenizer(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no tokenizer can be loaded"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="no tokenizer can be loaded") as caught:
        data.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_pack_equals_a_plain_recount(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "TOKENISE", 300)  # several groups of text
    docs = ["abc", "de", "f", *texts(40, words=12), "x" * 100]
    ids_NT, segments_NT = pack(docs, tokenizer, 16, 1000)
    assert ids_NT.dtype == segments_NT.dtype == np.int32
    assert ids_NT.shape == segments_NT.shape == (63, 16)
    flat, owner = [], []
    for i, text in enumerate(docs):
        row = [*tokenizer(text)["input_ids"], EOS]
        flat, owner = flat + row, owner + [i] * len(row)
    assert ids_NT.ravel().tolist() == flat[: 63 * 16]
    for n in range(63):
        own = owner[n * 16 : n * 16 + 16]
        assert segments_NT[n].tolist() == [doc - own[0] + 1 for doc in own]
    assert segments_NT.max() > 2


def test_pack_bos_instead_of_eos(tmp_path):
    tokenizer = data.load_tokenizer(write_tokenizer(tmp_path, opening=True))
    ids_NT, segments_NT = pack(["abc", "de"], tokenizer, 8, 7)
    a, b, c, d, e = (tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "abcde")
    assert ids_NT.tolist() == [[BOS, a, b, c, BOS, d, e, 0]]
    assert segments_NT.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]


def test_pack_pads_only_where_text_ends(tokenizer):
    ids_NT, segments_NT = pack(["a" * 20], tokenizer, 8, 17)  # 21 tokens with the end mark
    assert segments_NT.tolist() == [[1] * 8, [1] * 8, [1] * 5 + [0] * 3]
    assert ids_NT[-1].tolist()[4:] == [EOS, 0, 0, 0]
    with pytest.raises(DataError) as caught:
        pack(["a" * 20], tokenizer, 8, 22, where="domain law (train)")
    assert str(caught.value) == "domain law (train): 21 tokens, 22 asked"


def test_pack_refuses(tokenizer):
    with pytest.raises(DataError, match=r"domain law \(test\): no text, 8 tokens asked"):
        pack([], tokenizer, 8, 8, where="domain law (test)")
    with pytest.raises(DataError, match=r"law: token id 257 does not fit the model's vocab=257"):
        pack(["abc"], tokenizer, 8, 4, where="law", vocab=257)


def test_pack_reads_no_more_than_it_needs(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "TOKENISE", 100)
    read = []

    def endless():
        while True:
            read.append(1)
            yield "word " * 10

    ids_NT, _ = pack(endless(), tokenizer, 16, 160)
    assert ids_NT.shape == (10, 16) and len(read) < 10


# ---- the artifact -----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    domains = {name: write_jsonl(tmp_path / f"{name}.jsonl", texts(400, seed)) for seed, name in enumerate("abc")}
    return DataConfig(domains=domains, seq=32, train_tokens=1000, eval_tokens=500, calibration_tokens=96)


def test_a_source_that_changed_while_unfinished(tmp_path, run, tokenizer, monkeypatch):
    """What was packed of the old text goes, whose the folder is stays."""

    def die(*_):
        raise KeyboardInterrupt

    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with monkeypatch.context() as patch:
        patch.setattr(data, "_prepare_domain", die)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                data.prepare(run, tokenizer, out, VOCAB)
            (partial / "a.train.ids.npy").write_bytes(b"of the old text")
            write_jsonl(tmp_path / "a.jsonl", texts(400, 9))
        with pytest.raises(ArtifactError, match="unfinished result of another run .*seq=32 there, 16 here"):
            data.prepare(dataclasses.replace(run, seq=16), tokenizer, out, VOCAB)
    data.prepare(run, tokenizer, out, VOCAB)
    assert data.open_records(out, "train")["a"].ids.shape[1] == 32


def test_prepare_and_open(tmp_path, run, tokenizer):
    out = data.prepare(run, tokenizer, tmp_path / "out", VOCAB)
    assert load_yaml(DataConfig, out) == run
    opened = {split: data.open_records(out, split) for split in ("train", "test", "calibration")}
    for split, count in (("train", 32), ("test", 16), ("calibration", 3)):
        assert list(opened[split]) == ["a", "b", "c"]
        for records in opened[split].values():
            assert isinstance(records.ids, np.memmap) and records.ids.dtype == records.segments.dtype == np.uint16
            assert [a.dtype for a in records.take(np.array([0, 2]))] == [np.int32] * 2
            assert records.ids.shape == records.segments.shape == (count, 32) and len(records) == count
    for name in "abc":
        train, test = (tokenizer.decode(opened[split][name].ids.ravel()) for split in ("train", "test"))
        held_out = set(documents(name, run.domains[name], "test"))
        whole = [text for text in test.split("</s>")[:-1] if text]
        assert whole and set(whole) <= held_out and not set(train.split("</s>")) & held_out
        assert np.array_equal(opened["calibration"][name].ids, opened["train"][name].ids[:3])
    info = artifacts.read_manifest(out)["info"]
    assert info["domains"]["a"]["train"] == {"records": 32, "tokens": 1024}
    artifacts.verify(out, hashes=True)
    left = {p.suffix for p in out.iterdir()} | {p.name for p in out.iterdir() if p.name.startswith(".")}
    assert left == {".npy", ".json", ".yaml"}


def test_prepare_is_not_redone_and_guards_its_inputs(tmp_path, run, tokenizer, monkeypatch):
    out = data.prepare(run, tokenizer, tmp_path / "out", VOCAB)
    monkeypatch.setattr(data, "fill", lambda *a, **k: pytest.fail("packed again"))
    assert data.prepare(run, tokenizer, out, VOCAB) == out
    with pytest.raises(ArtifactError, match="belongs to another run .*train_tokens=1000 there, 900 here"):
        data.prepare(dataclasses.replace(run, train_tokens=900), tokenizer, out, VOCAB)
    other = data.load_tokenizer(write_tokenizer(tmp_path / "other", opening=True))
    with pytest.raises(ArtifactError, match="another tokenizer or from files changed"):
        data.prepare(run, other, out, VOCAB)
    write_jsonl(tmp_path / "b.jsonl", texts(401, 1))
    with pytest.raises(ArtifactError, match="files changed"):
        data.prepare(run, tokenizer, out, VOCAB)
    (tmp_path / "b.jsonl").unlink()
    assert data.prepare(run, tokenizer, out, VOCAB) == out


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killing(monkeypatch, number):
    """Die at the `number`-th of all calls that change the disk or tokenise: before it when even, after it when odd."""
    calls = []

    def wrap(owner, name):
        real = getattr(owner, name)

        def wrapped(*args, **options):
            calls.append(name)
            if 2 * len(calls) - 2 == number:
                raise Killed
            answer = real(*args, **options)
            if 2 * len(calls) - 1 == number:
                raise Killed
            return answer

        monkeypatch.setattr(owner, name, wrapped)

    wrap(packing.Packer, "add")
    for name in ("fsync", "replace", "posix_fallocate", "unlink"):
        wrap(os, name)
    return calls


def test_prepare_goes_on_after_a_kill_anywhere(tmp_path, run, tokenizer, monkeypatch):
    """Within a domain too: the text tokenised before the last mark is not tokenised again, and the bytes are equal."""
    monkeypatch.setitem(corpus.WINDOW, "files", 400)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # hundreds of real ones take a minute
    run = dataclasses.replace(run, domains={"a": run.domains["a"], "b": run.domains["b"]}, calibration_tokens=600)
    with monkeypatch.context() as patch:
        calls = killing(patch, -1)
        whole = data.prepare(run, tokenizer, tmp_path / "whole", VOCAB)
    adds, total = calls.count("add"), len(calls)
    assert adds > 10 and calls.count("replace") > adds, "a mark after each window"
    expected = artifacts.read_manifest(whole)["files"]
    for number in range(0, 2 * total, 11):
        out = tmp_path / f"out{number}"
        with monkeypatch.context() as patch:
            before = killing(patch, number)
            with pytest.raises(Killed):
                data.prepare(run, tokenizer, out, VOCAB)
        assert not out.exists() or number >= 2 * total - 4  # the last two: its temporary files, after the renaming
        with monkeypatch.context() as patch:
            after = killing(patch, -1)
            data.prepare(run, tokenizer, out, VOCAB)
        assert artifacts.read_manifest(out)["files"] == expected, number
        assert before.count("add") + after.count("add") <= adds + 2, f"{number}: text was tokenised twice"
        artifacts.verify(out, hashes=True)
        assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_prepare_goes_on_after_sigkill(tmp_path, run, tokenizer, monkeypatch):
    """A real one: whatever the process had buffered is gone."""
    import subprocess

    monkeypatch.setitem(corpus.WINDOW, "files", 2000)
    whole = data.prepare(run, tokenizer, tmp_path / "whole", VOCAB)
    program = (
        "import os, signal, sys\n"
        "from readme_jax import config, corpus, data, packing\n"
        "corpus.WINDOW['files'], calls, add = 2000, [], packing.Packer.add\n"
        "def dying(*args):\n"
        "    calls.append(1)\n"
        "    return add(*args) if len(calls) < 12 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "packing.Packer.add = dying\n"
        "run = config.load_yaml(data.DataConfig, sys.argv[1])\n"
        "data.prepare(run, data.load_tokenizer(sys.argv[2]), sys.argv[3], int(sys.argv[4]))\n"
    )
    folder, out = write_tokenizer(tmp_path / "tokenizer"), tmp_path / "out"
    ran = subprocess.run([sys.executable, "-c", program, whole / "config.yaml", folder, out, str(VOCAB)])
    assert ran.returncode == -9 and not out.exists()
    marks = [json.loads(path.read_text()) for path in (tmp_path / ".out.partial").glob(".*.mark.json")]
    assert any(mark["records"] > 0 and mark["tokens"] is None for mark in marks), "killed inside a domain"
    data.prepare(run, tokenizer, out, VOCAB)
    assert artifacts.read_manifest(out)["files"] == artifacts.read_manifest(whole)["files"]


def test_unfinished_work_of_other_inputs_is_thrown_away(tmp_path, run, tokenizer, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setitem(corpus.WINDOW, "files", 2000)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, 60)
        data.prepare(run, tokenizer, out, VOCAB)
    assert list((tmp_path / ".out.partial").glob(".*.mark.json"))
    other = data.load_tokenizer(write_tokenizer(tmp_path / "other", opening=True))
    data.prepare(run, other, out, VOCAB)
    for name in "abc":
        assert data.open_records(out, "train")[name].ids[0, 0] == BOS


@pytest.mark.parametrize("vocab, seq, expected", [(VOCAB, 32, "u2 u2"), (1 << 16, 32, "u2 u2"), (65537, 32, "i4 u2")])
def test_records_take_two_bytes_where_that_is_enough(tmp_path, tokenizer, vocab, seq, expected):
    domain = write_jsonl(tmp_path / "a.jsonl", texts(200))
    paths = packing.record_paths(tmp_path, "a", "train")
    tokens = packing.fill(
        lambda after: corpus.windows("a", domain, "train", after=after), tokenizer, paths, seq, 3000, vocab, where="a"
    )
    ids_NT, segments_NT = pack(documents("a", domain, "train"), tokenizer, seq, 3000)
    stored = [np.load(path) for path in paths]
    assert " ".join(array.dtype.str[1:] for array in stored) == expected
    assert np.array_equal(stored[0], ids_NT) and np.array_equal(stored[1], segments_NT)
    assert tokens == np.count_nonzero(segments_NT)
    assert packing.dtypes(1 << 16, VOCAB)[1] == np.int32, "a record of more tokens may have more segments"


def test_memory_of_preparing_is_a_window(tmp_path, tokenizer, monkeypatch):
    """Neither the text nor the tokens of a split are held."""
    import tracemalloc

    monkeypatch.setitem(corpus.WINDOW, "files", 50_000)
    monkeypatch.setattr(packing, "TOKENISE", 10_000)
    domain = write_jsonl(tmp_path / "a.jsonl", texts(15_000))
    paths = packing.record_paths(tmp_path, "a", "train")
    tracemalloc.start()
    tokens = packing.fill(
        lambda after: corpus.windows("a", domain, "train", after=after),
        tokenizer,
        paths,
        64,
        2_000_000,
        VOCAB,
        where="a",
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(path.stat().st_size for path in paths) > 4 * tokens * 0.99 and peak < 1_500_000 < tokens


def test_prepare_refuses_before_work(tmp_path, run, tokenizer):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="vocab=200"):
        data.prepare(run, tokenizer, out, 200)
    gone = dataclasses.replace(
        run, domains={**run.domains, "z": DomainConfig(source="files", path=str(tmp_path / "no.txt"))}
    )
    with pytest.raises(SourceError, match="domain z: path=.*no.txt matches no file"):
        data.prepare(gone, tokenizer, out, VOCAB)
    assert not out.exists() and not (tmp_path / ".out.partial").exists()
    with pytest.raises(DataError, match=r"domain a \(train\): \d+ tokens, 10000000 asked"):
        data.prepare(dataclasses.replace(run, train_tokens=10_000_000), tokenizer, out, VOCAB)
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    empty = {"e": DomainConfig(source="files", path=str(tmp_path / "empty.jsonl"))}
    with pytest.raises(DataError, match=r"domain e \(train\): no text, 1000 tokens asked"):
        data.prepare(dataclasses.replace(run, domains=empty), tokenizer, out, VOCAB)
    assert not out.exists()


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_full_disk(tmp_path, run, tokenizer, monkeypatch, call):
    """Met when the files are made, before any text is tokenised; or, where blocks cannot be taken, when written."""
    with monkeypatch.context() as patch:
        patch.setattr(os, call, no_space)
        patch.setattr(artifacts, "write_text", lambda path, text: path.write_text(text))
        patch.setattr(packing.Packer, "add", lambda *a: pytest.fail("work began") if call != "fsync" else add(*a))
        with pytest.raises(ArtifactError, match="the disk is full"):
            data.prepare(run, tokenizer, tmp_path / "out", VOCAB)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()

    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, "not on this file system")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    data.prepare(run, tokenizer, tmp_path / "out", VOCAB)


add = packing.Packer.add


def test_open_refuses(tmp_path, run, tokenizer):
    with pytest.raises(ArtifactError, match="not a finished result"):
        data.open_records(tmp_path, "train")
    out = data.prepare(dataclasses.replace(run, eval_tokens=0), tokenizer, tmp_path / "out", VOCAB)
    with pytest.raises(DataError, match="no test records; it was prepared with eval_tokens=0"):
        data.open_records(out, "test")
    with pytest.raises(ConfigError, match="split='valid' is not one of"):
        data.open_records(out, "valid")  # type: ignore[arg-type]
    path = out / "b.train.ids.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="b.train.ids.npy: .* bytes, the manifest says"):
        data.open_records(out, "train")


# ---- batches ----------------------------------------------------------------------------------


def make_records(counts, seq=8):
    """Records whose every token is the record's number over all domains."""
    start, found = 0, {}
    for name, count in counts.items():
        ids_NT = np.repeat(np.arange(start, start + count, dtype=np.int32)[:, None], seq, 1)
        found[name] = Records(ids_NT, np.ones_like(ids_NT) + (np.arange(seq) >= seq // 2))
        start += count
    return found


COUNTS = {"a": 30, "b": 50, "c": 20}
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_batch_shapes_and_content():
    records = make_records(COUNTS)
    batch = Batches(records, WEIGHTS, batch=3, accum=2, seed=1, seq=8)[5]
    assert {key: value.shape for key, value in batch.items()} == {
        "ids": (2, 3, 8),
        "segments": (2, 3, 8),
        "domains": (2, 3),
        "index": (2, 3),
    }
    assert all(value.dtype == np.int32 for value in batch.values())
    assert np.array_equal(batch["ids"], np.repeat(batch["index"][..., None], 8, -1))
    assert np.array_equal(batch["domains"], np.searchsorted([30, 80, 100], batch["index"], side="right"))
    assert (batch["segments"] == [1] * 4 + [2] * 4).all()


def test_batches_are_a_function_of_the_step():
    records = make_records(COUNTS)
    batches = Batches(records, WEIGHTS, batch=4, seed=7)
    forward = [batches[step] for step in range(30)]
    again = Batches(records, WEIGHTS, batch=4, seed=7)
    for step in reversed(range(30)):
        assert same(again[step], forward[step])
    # accum only folds the same records into microbatches
    folded = Batches(records, WEIGHTS, batch=2, accum=2, seed=7)
    assert all(np.array_equal(folded[s]["ids"].reshape(4, 8), forward[s]["ids"][0]) for s in range(30))


def test_batches_are_the_same_in_another_process(tmp_path):
    import subprocess

    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_data as t\n"
        "b = t.Batches(t.make_records(t.COUNTS), t.WEIGHTS, batch=4, seed=7)\n"
        "print(b[11]['index'].tolist())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "123", "JAX_PLATFORMS": "cpu"},
    )
    assert ran.stdout.split("\n")[0] == str(
        Batches(make_records(COUNTS), WEIGHTS, batch=4, seed=7)[11]["index"].tolist()
    )


def test_mixture_and_epochs():
    batches = Batches(make_records(COUNTS), WEIGHTS, batch=10, seed=3)
    drawn = np.concatenate([batches[step]["index"].ravel() for step in range(100)])
    domain = np.searchsorted([30, 80, 100], drawn, side="right")
    assert np.bincount(domain) / len(drawn) == pytest.approx([0.5, 0.3, 0.2], abs=0.002)
    orders = []
    for at, (name, count) in enumerate(COUNTS.items()):
        own = drawn[domain == at]
        first = sum(list(COUNTS.values())[:at])
        for epoch in range(len(own) // count):
            one = own[epoch * count : (epoch + 1) * count]
            assert sorted(one) == list(range(first, first + count)), f"{name}, epoch {epoch}"
            orders.append(tuple(one))
    assert len(set(orders)) == len(orders) > 20  # every epoch has its own order


def test_seeds_differ_and_weight_zero_leaves_out():
    records = make_records(COUNTS)
    one, other = (Batches(records, WEIGHTS, batch=8, seed=seed) for seed in (0, 1))
    assert not any(np.array_equal(one[s]["index"], other[s]["index"]) for s in range(10))
    without = Batches(records, WEIGHTS | {"b": 0.0}, batch=7, seed=0)
    seen = collections.Counter(np.concatenate([without[s]["domains"].ravel() for s in range(10)]).tolist())
    assert seen == {0: 50, 2: 20}


def test_batches_refuse():
    records = make_records(COUNTS)
    with pytest.raises(ConfigError, match=r"weights name \['a'\], the records \['a', 'b', 'c'\]"):
        Batches(records, {"a": 1.0}, batch=2)
    with pytest.raises(ConfigError, match="must be 0 or more, one above 0"):
        Batches(records, dict.fromkeys(COUNTS, 0.0), batch=2)
    with pytest.raises(ConfigError, match="must be 0 or more, one above 0"):
        Batches(records, WEIGHTS | {"a": -1.0}, batch=2)
    with pytest.raises(ConfigError, match="batch=0 and accum=1"):
        Batches(records, WEIGHTS, batch=0)
    with pytest.raises(ConfigError, match="seq=16, the records were packed with 8"):
        Batches(records, WEIGHTS, batch=2, seq=16)
    with pytest.raises(DataError, match="different lengths"):
        Batches(records | make_records({"c": 4}, seq=16), WEIGHTS, batch=2)
    with pytest.raises(DataError, match="domain c: no records"):
        Batches(records | make_records({"c": 0}), WEIGHTS, batch=2)
    with pytest.raises(IndexError):
        Batches(records, WEIGHTS, batch=2)[-1]


def test_rows_of_a_step(monkeypatch):
    batches = Batches(make_records(COUNTS), WEIGHTS, batch=6, accum=2, seed=3)
    whole, taken = batches[9], []
    assert np.array_equal(batches.index(9), whole["index"])
    real = Records.take
    monkeypatch.setattr(Records, "take", lambda self, rows: (taken.extend(rows), real(self, rows))[1])
    for start, stop in ((0, 6), (0, 2), (2, 5), (5, 6)):
        taken.clear()
        part = batches.rows(9, start, stop)
        assert same(part, {key: value[:, start:stop] for key, value in whole.items()})
        assert all(value.dtype == np.int32 for value in part.values())
        assert len(taken) == 2 * (stop - start), "rows of other hosts are not read"
    for start, stop in ((-1, 2), (2, 2), (4, 7), (3, 1)):
        with pytest.raises(IndexError, match=f"rows {start} .. {stop} lie in 0 .. 6"):
            batches.rows(9, start, stop)


def test_take_by_number():
    records = make_records(COUNTS)
    found = Batches(records, WEIGHTS, batch=2).take(np.array([[99, 0], [30, 79], [29, 80]]))
    assert found["ids"].shape == found["segments"].shape == (3, 2, 8)
    assert found["ids"][..., 3].tolist() == [[99, 0], [30, 79], [29, 80]]


def mapped(path):
    """(flags, resident kB) of every mapping of a file in this process."""
    blocks, inside = [], False
    for line in open("/proc/self/smaps"):
        key, *values = line.split()
        if not key.endswith(":"):
            inside = line.rstrip().endswith(str(path))
            blocks += [{}] if inside else []
        elif inside:
            blocks[-1][key[:-1]] = values
    return [(set(b["VmFlags"]), int(b["Rss"][0])) for b in blocks]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_virtual_set_of_100_gb(tmp_path, monkeypatch):
    """50 M records of 512 tokens (100 GB of text), as holes: memory stays flat, nothing is listed."""
    records, paths = {}, []
    for name, count in (("a", 20_000_000), ("b", 30_000_000)):
        own = packing.record_paths(tmp_path, name, "train")
        for path in own:
            with open(path, "wb") as file:
                header = {"descr": "<u2", "fortran_order": False, "shape": (count, 512)}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + count * 1024)
        records[name] = Records(*(np.load(path, mmap_mode="r") for path in own))
        paths += own
    assert sum(path.stat().st_size for path in paths) > 102e9
    whole = Batches({n: Records(r.ids[:9], r.segments[:9]) for n, r in records.items()}, {"a": 1, "b": 2}, batch=4)[0]
    assert whole["ids"].shape == (1, 4, 512)  # slices of the maps are advised too

    def resident():
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return [int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile")]

    before = resident()
    monkeypatch.setattr(data, "FORGET", 1 << 22)
    batches = Batches(records, {"a": 0.5, "b": 0.5}, batch=64, seed=1)
    seen = np.concatenate([batches[step * 1_000_003]["index"].ravel() for step in range(40)])
    assert len(set(seen.tolist())) > 0.98 * seen.size and seen.min() < 1_000_000 and seen.max() > 49_000_000
    after = resident()
    assert after[0] - before[0] < 8 and after[1] - before[1] < 8, f"MiB of memory: {before} before, {after} after"
    for path in paths:
        assert all("rr" in flags and size < 4096 for flags, size in mapped(path)), "read-ahead is off"


def test_eval_batches_cover_each_record_once():
    records = make_records({"a": 5, "b": 4, "c": 1})
    batches = list(data.eval_batches(records, 4))
    assert [b["domains"][0] for b in batches] == [0, 0, 1, 2] and all(b["ids"].shape == (4, 8) for b in batches)
    assert all(len(set(b["domains"])) == 1 for b in batches)
    real = np.concatenate([b["index"] for b in batches])
    rows = np.concatenate([b["ids"][:, 0] for b in batches])
    segments = np.concatenate([b["segments"] for b in batches])
    assert real[real >= 0].tolist() == list(range(10)) == rows[real >= 0].tolist()
    assert (segments[real < 0] == 0).all() and (segments[real >= 0] > 0).all() and (real < 0).sum() == 6
