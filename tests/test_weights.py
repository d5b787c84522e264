"""Reader and Writer of safetensors against the safetensors library, and what damaged folders get."""

import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import raises
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from readme_jax.config import CheckpointError, ConfigError
from readme_jax.weights import DTYPES, INDEX, SINGLE, Reader, Writer, read_header

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((6, 4), np.float32),
        "b": rng.standard_normal((5, 3)).astype(ml_dtypes.bfloat16),
        "c": rng.standard_normal((3, 3)).astype(np.float16),
        "d": np.arange(7, dtype=np.int32),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(3.0, np.float32),
    }


def write(folder: Path, found: dict[str, np.ndarray], max_shard_bytes: int = 1 << 30) -> Path:
    with Writer(folder, max_shard_bytes) as writer:
        for name, array in found.items():
            writer.add(name, array)
    return folder


@pytest.fixture
def single(tmp_path) -> Path:
    return write(tmp_path / "single", some_tensors())


@pytest.fixture
def sharded(tmp_path) -> Path:
    """a and b in the first shard, the others in the second."""
    folder = write(tmp_path / "sharded", some_tensors(), max_shard_bytes=130)
    assert sorted(path.name for path in folder.iterdir()) == [*SHARDS, INDEX]
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit_header(path: Path, edit) -> None:
    """Rewrite the header of a safetensors file; the data stays as it is."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    text = edit(header)
    text = (json.dumps(header) if text is None else text).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def edit_index(folder: Path, edit) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# ---- good files -------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 300),
)
def test_any_tensors_there_and_back(tmp_path_factory, specs, max_shard_bytes):
    folder = tmp_path_factory.mktemp("any")
    rng = np.random.default_rng(0)
    made = {
        name: (rng.integers(0, 2, shape) if code == "BOOL" else rng.integers(0, 100, shape)).astype(DTYPES[code])
        for name, (code, shape) in specs.items()
    }
    write(folder, made, max_shard_bytes)
    ours, theirs = Reader(folder), {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt"}
            theirs |= {name: file.get_tensor(name) for name in file.keys()}
        data = sum(slot.nbytes for slot in read_header(path).values())
        assert data <= max(max_shard_bytes, max(a.nbytes for a in made.values()))
    assert ours.names() == sorted(made) == sorted(theirs)
    for name, array in made.items():
        got = ours.get(name)
        assert ours.shape(name) == got.shape == array.shape == theirs[name].shape
        assert ours.dtype(name) == got.dtype == array.dtype == theirs[name].dtype
        assert got.tobytes() == array.tobytes() == theirs[name].tobytes()
    shutil.rmtree(folder)


def test_reads_what_the_library_writes(tmp_path):
    save_file(some_tensors(), tmp_path / SINGLE)
    reader = Reader(tmp_path)
    for name, array in some_tensors().items():
        assert reader.get(name).tobytes() == array.tobytes() and reader.file(name) == tmp_path / SINGLE
    with pytest.raises(ValueError, match="read-only"):
        reader.get("a")[0] = 0
    with raises(CheckpointError, str(tmp_path), "nope"):
        reader.get("nope")


def test_bytes_do_not_depend_on_the_order_or_layout_of_what_was_added(tmp_path):
    made = some_tensors()
    first = files(write(tmp_path / "1", made))
    again = {name: made[name].T.copy().T for name in reversed(made)}
    assert files(write(tmp_path / "2", again)) == first


def test_header_is_aligned_and_wide_dtypes_come_first(single):
    slots = read_header(single / SINGLE)
    assert all(slot.start % slot.dtype.itemsize == 0 for slot in slots.values())


def test_a_tensor_is_read_without_its_neighbours(tmp_path):
    """A file of 64 GiB, all hole but for its last tensor: only a reader that maps what it is asked for survives."""
    big = 1 << 34
    header = json.dumps(
        {
            "big": {"dtype": "F32", "shape": [big], "data_offsets": [0, 4 * big]},
            "small": {"dtype": "I32", "shape": [2], "data_offsets": [4 * big, 4 * big + 8]},
        }
    ).encode()
    with open(tmp_path / SINGLE, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(4 * big, 1)
        file.write(struct.pack("<2i", 7, -9))
    reader = Reader(tmp_path)
    assert reader.shape("big") == (big,)
    assert reader.get("small").tolist() == [7, -9]


def test_a_file_cut_after_opening_is_an_error_not_a_crash(single):
    reader = Reader(single)
    (single / SINGLE).write_bytes(b"")
    with raises(CheckpointError, SINGLE, "a"):
        reader.get("a")


# ---- damaged folders --------------------------------------------------------------------------


def test_every_truncation_is_found(single):
    path = single / SINGLE
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with raises(CheckpointError, str(path)):
            Reader(single)
    path.write_bytes(whole + b"\0")
    with raises(CheckpointError, str(path), "1 bytes follow"):
        Reader(single)


def test_any_flipped_header_byte_is_an_error_or_harmless(single):
    """Never another exception, and never a tensor that reaches outside the file."""
    path = single / SINGLE
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for position in range(end):
        changed = bytearray(whole)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            reader = Reader(single)
            assert sum(reader.get(name).nbytes for name in reader.names()) == len(whole) - end
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > end / 2


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda h: h["a"].update(data_offsets=[0, 88]), ["tensor a", "88 bytes", "96"]),
        (lambda h: h["a"].update(data_offsets=[4, 100]), ["tensor a", "gap"]),
        (lambda h: h["d"].update(data_offsets=[92, 120]), ["tensor d", "overlaps a"]),
        (lambda h: h["d"].update(data_offsets=[-4, 24]), ["tensor d", "data_offsets"]),
        (lambda h: h["d"].update(data_offsets=[96]), ["tensor d", "data_offsets"]),
        (lambda h: h["d"].update(shape=[7.0]), ["tensor d", "shape"]),
        (lambda h: h["d"].update(shape=[True] * 7), ["tensor d", "shape"]),
        (lambda h: h["d"].update(dtype="F8_E4M3"), ["tensor d", "F8_E4M3", "not supported"]),
        (lambda h: h["d"].update(dtype=["I32"]), ["tensor d", "dtype"]),
        (lambda h: h["d"].pop("dtype") and None, ["tensor d", "malformed"]),
        (lambda h: h.update(d=3), ["tensor d", "malformed"]),
        (lambda h: "[1]", ["header", "object"]),
        (lambda h: "{" * 100_000, ["header", "JSON"]),
        (lambda h: '{"a": ' + "9" * 5000 + "}", ["header", "JSON"]),
        (lambda h: json.dumps(h).replace('"d"', '"a"'), ["a is listed twice"]),
    ],
)
def test_tampered_header_is_named(edit, words, single):
    edit_header(single / SINGLE, edit)
    with raises(CheckpointError, str(single / SINGLE), *words):
        Reader(single)


def test_shards_must_agree_with_the_index(sharded, tmp_path):
    def case(edit, *words):
        folder = Path(shutil.copytree(sharded, tmp_path / "case"))
        edit(folder)
        with raises(CheckpointError, str(folder), *words):
            Reader(folder)
        shutil.rmtree(folder)

    assert Reader(sharded).names() == sorted(some_tensors())
    case(lambda f: (f / SHARDS[1]).unlink(), SHARDS[1], "missing")
    case(lambda f: (f / SHARDS[1]).write_bytes(b"12345678"), SHARDS[1])
    case(lambda f: edit_index(f, lambda m: m.pop("a")), "tensor a", INDEX, SHARDS[0])
    case(lambda f: edit_index(f, lambda m: m.update(z=SHARDS[0])), "tensor z", "absent")
    case(lambda f: edit_index(f, lambda m: m.update(a=SHARDS[1])), "tensor a", SHARDS[0], SHARDS[1])
    case(lambda f: edit_index(f, lambda m: m.update(z="../elsewhere.safetensors")), "../elsewhere", "plain file name")
    case(lambda f: edit_index(f, lambda m: m.update(z=["x"])), "shard")
    case(lambda f: edit_index(f, lambda m: m.clear()), INDEX, "weight_map")
    case(lambda f: (f / INDEX).write_text("{}"), INDEX, "weight_map")
    case(lambda f: (f / INDEX).write_text('{"weight_map": [1]}'), INDEX, "weight_map")
    case(lambda f: (f / INDEX).write_text("no"), INDEX, "JSON")
    case(lambda f: (f / INDEX).unlink(), "no weights", SINGLE)

    def copy_a(folder):
        found = load_file(folder / SHARDS[1]) | {"a": some_tensors()["a"]}
        save_file(found, folder / SHARDS[1])

    case(copy_a, "tensor a", SHARDS[1], "another shard")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.pth"])
def test_pickle_only_folder_is_refused_unopened(name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"\x80\x04cposix\nsystem\n.")
    monkeypatch.setattr("pickle.load", None)
    with raises(CheckpointError, name, "pickle can run any code", "safetensors"):
        Reader(tmp_path)
    # Beside safetensors it does no harm: it is not looked at.
    write(tmp_path, some_tensors())
    assert Reader(tmp_path).names() == sorted(some_tensors())


def test_folder_without_weights(tmp_path):
    with raises(CheckpointError, str(tmp_path), "no weights"):
        Reader(tmp_path)
    with raises(CheckpointError, "nowhere", "no such model folder"):
        Reader(tmp_path / "nowhere")


# ---- the writer's own failures ----------------------------------------------------------------


def test_nothing_half_written(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, 50) as writer:
        writer.add("a", np.ones(20, np.float32))
        writer.add("b", np.ones(20, np.float32))
        assert files(tmp_path).keys() == {".model-00001.safetensors.tmp"}
        raise KeyboardInterrupt
    assert not files(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    writer = Writer(tmp_path, 50)
    writer.add("a", np.ones(20, np.float32))
    writer.add("b", np.ones(20, np.float32))
    monkeypatch.setattr("readme_jax.weights.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        writer.close()
    assert not files(tmp_path)


def test_a_killed_run_leaves_no_trace_in_the_next(tmp_path):
    killed = Writer(tmp_path, 50)
    for name in "abc":
        killed.add(name, np.ones(20, np.float32))
    assert len(files(tmp_path)) == 2
    write(tmp_path, some_tensors())
    assert files(tmp_path).keys() == {SINGLE}
    write(tmp_path, some_tensors(), 130)
    assert sorted(files(tmp_path)) == [*SHARDS, INDEX]
    write(tmp_path, {"x": np.ones(3, np.float32)})
    assert files(tmp_path).keys() == {SINGLE} and Reader(tmp_path).names() == ["x"]


def test_writer_refuses_what_cannot_be_read_back(tmp_path):
    writer = Writer(tmp_path)
    with raises(CheckpointError, str(tmp_path), "no tensor"):
        writer.close()
    writer.add("a", np.ones(3, np.float32))
    with raises(CheckpointError, "tensor a", "twice"):
        writer.add("a", np.ones(3, np.float32))
    for bad in (np.ones(3, np.complex64), np.ones(3, ">f4"), np.array(["x"])):
        with raises(CheckpointError, "tensor b", str(bad.dtype)):
            writer.add("b", bad)
    with raises(CheckpointError, "__metadata__"):
        writer.add("__metadata__", np.ones(3, np.float32))
    with raises(ConfigError, "max_shard_bytes=0"):
        Writer(tmp_path, 0)
