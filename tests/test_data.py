"""The data stage: its config, packing against a plain recount, prepared artifacts and their resumption."""

import dataclasses
import errno
import json
import os
import sys

import numpy as np
import pytest
from texts import BOS, EOS, VOCAB, texts, write_jsonl, write_tokenizer

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
from readme_jax.data import DataConfig, DomainConfig, documents, pack


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return data.load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


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
