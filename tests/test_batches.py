"""Batches as a function of the step: shapes, mixture, order, rows of a process, a set larger than memory."""

import collections
import os
import sys

import numpy as np
import pytest

from readme_jax import data, packing
from readme_jax.config import (
    ConfigError,
    DataError,
)
from readme_jax.data import Batches, Records


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


def test_records_cut_are_the_same_tokens_in_shorter_rows():
    records = {"a": Records(np.arange(24).reshape(3, 8), np.repeat([[1, 2, 0, 0]], 3, 0).repeat(2, 1))}
    cut = {name: own.cut(4) for name, own in records.items()}
    assert len(cut["a"]) == 12 and np.shares_memory(cut["a"].ids, records["a"].ids)
    batches = Batches(cut, {"a": 1.0}, batch=4)
    rows = np.concatenate([batches[step]["ids"][0] for step in range(3)])
    assert sorted(rows.tolist()) == np.arange(24).reshape(12, 2).tolist(), "every row once"
    for step in range(3):
        batch = batches[step]
        assert (batch["segments"][..., 0] == np.array([1, 2, 0, 0])[batch["index"] % 4]).all()
    with pytest.raises(ConfigError, match="experts.cut=3 does not divide records of 8 tokens"):
        records["a"].cut(3)


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
        "import sys; sys.path.insert(0, sys.argv[1]); import test_batches as t\n"
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
