"""Documents of every source and their division into splits, read in windows that can be gone on from."""

import json
import sys
import types

import pytest
from texts import every_split, texts, write_jsonl

from readme_jax import corpus
from readme_jax.config import (
    ConfigError,
    DataError,
    SourceError,
)
from readme_jax.data import DomainConfig, documents


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
