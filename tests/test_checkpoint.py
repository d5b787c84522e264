"""Checkpoints: what goes in comes out, bit for bit and in place; written while training goes on; damage is skipped."""

import gc
import json
import os
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from readme_jax import checkpoint, steps
from readme_jax.checkpoint import CheckpointConfig, Checkpoints, SaveError, damage
from readme_jax.config import CheckpointError, ConfigError
from readme_jax.sharding import MeshConfig, put, spec, use_mesh


def phases(seed=0, width=4):
    rng = np.random.default_rng(seed)
    params = {
        "w_up": put(rng.normal(size=(8, width)).astype(np.float32), spec("mlp", None)),
        "norm": put(rng.normal(size=width).astype(np.float32)),
    }
    return {
        "experts": steps.start(params, optax.adam(1e-3)),
        "router": steps.start({"w": put(np.ones(3))}, optax.sgd(1)),
    }


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.sharding == y.sharding and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def saved(root, *at, **options):
    """Checkpoints at the given steps, each of `phases(step)`, all on disk."""
    checkpoints = Checkpoints(root, **options)
    for step in at:
        checkpoints.save(step, phases(step))
    checkpoints.close()
    return checkpoints


def on_disk(root):
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit())


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=2, model=2)], ids=["one", "four"])
def test_round_trip(tmp_path, mesh):
    with use_mesh(mesh):
        first = phases(seed=1)
        checkpoints = Checkpoints(tmp_path / "c")
        assert checkpoints.find() is None
        checkpoints.save(12, first)
        checkpoints.close()
        again = Checkpoints(tmp_path / "c")
        assert again.find() == 12
        restored = again.restore(12, phases(seed=2))
        assert equal(restored, first) and not equal(restored, phases(seed=2))
        # arrays of its own: what is restored may be donated
        jax.jit(lambda t: jax.tree.map(lambda a: a + 1, t), donate_argnums=0)(restored)
        assert equal(again.restore(12, phases(seed=2)), first)


def test_onto_another_mesh(tmp_path):
    with use_mesh(MeshConfig(data=2, model=4)):
        saved(tmp_path / "c", 3)
        there = jax.tree.map(np.asarray, phases(3))
    for other in (MeshConfig(data=8), MeshConfig(data=1)):
        with use_mesh(other):
            like = phases(0)
            restored = Checkpoints(tmp_path / "c").restore(3, like)
            jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, restored), there)
            assert [a.sharding for a in jax.tree.leaves(restored)] == [a.sharding for a in jax.tree.leaves(like)]


@pytest.mark.parametrize("count", [1, 8])
def test_training_goes_on_and_donates_while_it_is_written(tmp_path, monkeypatch, count):
    """The writer is held until training has overwritten the donated arrays many times; what it writes is the old."""
    hold, held, mkdir = threading.Event(), threading.Event(), os.mkdir

    def waits(path, *args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            held.set()
            hold.wait()
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", waits)
    (tmp_path / "c").mkdir()
    with use_mesh(MeshConfig(data=count)):
        host = np.random.default_rng(0).normal(size=(8, 1 << 17)).astype(np.float32)  # 4 MB
        state = {"m": {"x": put(host, spec("batch", None))}}
        step = jax.jit(lambda tree: jax.tree.map(lambda a: a * -1.5 + 1, tree), donate_argnums=0)
        state = step(state)
        then = np.array(state["m"]["x"])
        checkpoints = Checkpoints(tmp_path / "c")
        checkpoints.save(1, state)
        for _ in range(20):
            state = step(state)
        jax.block_until_ready(state)
        assert held.wait(60) and not list((tmp_path / "c").rglob("d/*")), "no array is written yet"
        hold.set()
        checkpoints.close()
        np.testing.assert_array_equal(checkpoints.restore(1, state)["m"]["x"], then)
        assert not np.array_equal(state["m"]["x"], then)


def test_the_newest_and_the_best_are_kept(tmp_path, mesh):
    root = tmp_path / "c"
    checkpoints = Checkpoints(root, keep=2, keep_best=1)
    for step, score in ((1, None), (2, 3.0), (4, 1.0), (6, 2.0), (7, 2.5), (9, 4.0)):
        checkpoints.save(step, phases(step), score)
    checkpoints.save(9, phases(1))  # a step that is saved already is not written again
    checkpoints.close()
    assert on_disk(root) == [4, 7, 9]
    again = Checkpoints(root, keep=2, keep_best=1)
    assert again.find() == 9 and equal(again.restore(9, phases()), phases(9))
    assert on_disk(root) == [4, 7, 9]
    assert again.find("best") == 4 and on_disk(root) == [4], "the run goes back to it"
    again.save(5, phases(5), 0.5)
    again.save(8, phases(8), None)
    again.save(9, phases(8), None)
    again.close()
    assert on_disk(root) == [5, 8, 9] and again.find() == 9 and again.find("best") == 5


def test_a_run_goes_back_to_its_best_once(tmp_path, mesh):
    """Restarted over and over with the same command, each start a little further than the one before."""
    root, began = tmp_path / "c", []
    options = {"keep": 2, "keep_best": 1}
    assert Checkpoints(root, **options).find("best") is None
    saved(root, 1, **options)
    assert Checkpoints(root, **options).find("best") == 1, "no score yet: the newest"
    checkpoints = Checkpoints(root, **options)
    for step, score in ((2, 1.0), (3, 2.0), (4, 2.5)):
        checkpoints.save(step, phases(step), score)
    checkpoints.close()
    for _ in range(4):
        start = Checkpoints(root, **options)
        began.append(start.find("best"))
        start.save(began[-1] + 1, phases(), 3.0)
        start.close()
    assert began == [2, 3, 4, 5]
    assert Checkpoints(root, **options).find() == 6, "asked for the newest, it forgets that it went back"
    assert Checkpoints(root, **options).find("best") == 2 and on_disk(root) == [2]


def test_a_kill_while_it_goes_back_costs_nothing(tmp_path, mesh, monkeypatch):
    root, options = tmp_path / "c", {"keep": 3, "keep_best": 1}
    checkpoints = Checkpoints(root, **options)
    for step, score in ((2, 1.0), (3, 2.0), (4, 2.5)):
        checkpoints.save(step, phases(step), score)
    checkpoints.close()
    for owner, name in ((checkpoint.os, "rename"), (checkpoint.artifacts, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                Checkpoints(root, **options).find("best")
    assert Checkpoints(root, **options).find("best") == 2 and on_disk(root) == [2]


def cut(folder, name="d"):
    """The largest file below `folder` whose path holds `/name/`."""
    return max((p for p in folder.rglob("*") if p.is_file() and f"/{name}/" in str(p)), key=lambda p: p.stat().st_size)


def truncate(folder):
    path = cut(folder)
    path.write_bytes(path.read_bytes()[:-7])
    return f"{path}: {path.stat().st_size} bytes, {path.stat().st_size + 7} were written"


def flip(folder):
    path = cut(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path}: its checksum differs"


def unmark(folder):
    (folder / checkpoint.MARK).unlink()
    return "it was not written to its end"


def lose(folder):
    path = cut(folder)
    path.unlink()
    return f"{path}: missing"


def lose_tree(folder):
    shutil.rmtree(folder / "experts")
    return "experts/"


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    return "it was not written to its end"


def half_a_mark(folder):
    (folder / checkpoint.MARK).write_text((folder / checkpoint.MARK).read_text()[:-9])
    return "it was not written to its end"


def another_mark(folder):
    (folder / "whole.json").write_text('{"score": null, "files": {"a": 3}}')
    return "whole.json is missing"


def no_mark(folder):
    (folder / "whole.json").write_text("[]")
    return "whole.json is missing"


def empty_mark(folder):
    empty(folder)
    (folder / "whole.json").write_text('{"score": null, "files": {}}')
    return "whole.json is missing"


HARMS = [truncate, flip, unmark, lose, lose_tree, empty, half_a_mark, another_mark, no_mark, empty_mark]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path, mesh, capsys, harm):
    root = tmp_path / "c"
    saved(root, 3, 4, 6, keep=3)
    assert not damage(root / "6")
    said = harm(root / "6")
    checkpoints = Checkpoints(root, keep=2)
    assert checkpoints.find() == 4 and equal(checkpoints.restore(4, phases()), phases(4))
    warned = capsys.readouterr().err
    assert warned.startswith("warning: checkpoint 6 is skipped: ") and said in warned and warned.count("\n") == 1
    said = harm(root / "4")
    assert checkpoints.find() == 3
    assert capsys.readouterr().err.count("is skipped") == 2
    # it is written anew where it was, and what is damaged goes with the next whole one
    checkpoints.save(6, phases(60))
    checkpoints.close()
    assert on_disk(root) == [3, 6] and checkpoints.find() == 6 and not capsys.readouterr().err
    assert equal(checkpoints.restore(6, phases()), phases(60))


def test_what_is_whole_and_cannot_be_read_is_skipped_too(tmp_path, mesh, capsys):
    """By its mark all is there, but Orbax makes nothing of it: the one before is used. Nothing begins anew."""
    root = tmp_path / "c"
    saved(root, 3, 4, 6, keep=3)

    def spoil(folder):
        shutil.rmtree(folder / "experts")
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "whole.json"]
        checkpoint.seal(folder, [checkpoint.checksums(folder, names)])
        assert not damage(folder)

    spoil(root / "6")
    checkpoints = Checkpoints(root, keep=2)
    step, trees = checkpoints.resume("newest", phases())
    assert step == 4 and equal(trees, phases(4))
    warned = capsys.readouterr().err
    assert warned.startswith("warning: checkpoint 6 is skipped: ") and warned.count("\n") == 1
    checkpoints.save(6, phases(60))
    checkpoints.close()
    step, trees = Checkpoints(root).resume("newest", phases())
    assert step == 6 and equal(trees, phases(60)) and on_disk(root) == [4, 6]
    for step in (4, 6):
        spoil(root / str(step))
    with pytest.raises(CheckpointError, match="no checkpoint can be read: .*checkpoint 6"):
        Checkpoints(root).resume("newest", phases())
    step, trees = Checkpoints(tmp_path / "none").resume("newest", like := phases())
    assert step == 0 and trees is like


def test_left_overs_of_a_kill_are_cleared(tmp_path, mesh, capsys):
    root = tmp_path / "c"
    saved(root, 3)
    shutil.copytree(root / "3", root / "4.orbax-checkpoint-tmp-17")
    shutil.copytree(root / "3", root / ".removed-2")
    (root / "2.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(root)
    assert checkpoints.find() == 3 and not capsys.readouterr().err
    assert [p.name for p in root.iterdir()] == ["3"]
    for step in (4, 5):
        checkpoints.save(step, phases(step))
    checkpoints.close()
    assert on_disk(root) == [4, 5]
    assert Checkpoints(tmp_path / "none").find() is None
    for step in (4, 5):
        truncate(root / str(step))
    assert checkpoints.find() is None, "with none whole the run begins anew"


def test_what_does_not_fit_is_an_error(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(CheckpointError, match="checkpoint 3: "):
        checkpoints.restore(3, phases())
    checkpoints.save(3, phases(3))
    checkpoints.close()
    like = phases(width=5)
    with pytest.raises(CheckpointError, match="checkpoint 3: ") as caught:
        checkpoints.restore(3, like)
    assert "\n" not in str(caught.value)
    more = phases()
    with pytest.raises(CheckpointError, match="checkpoint 3: "):
        checkpoints.restore(3, more | {"third": {"w": jnp.ones(2)}})


def test_what_cannot_be_written_is_said_at_the_next_save(tmp_path, mesh, monkeypatch, capfd, caplog):
    root = tmp_path / "c"
    checkpoints = saved(root, 3)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.artifacts, "write_text", full)
        checkpoints.save(4, phases(4))
        with pytest.raises(SaveError, match="checkpoint 4 cannot be written: .*No space left") as caught:
            checkpoints.save(5, phases(5))
    assert caught.value.exit_code == 2
    assert Checkpoints(root).find() == 3
    before = threading.current_thread()
    gc.collect()  # asyncio tells of what nobody asked for, of a test before, when it is collected
    capfd.readouterr()
    caplog.clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # what the library itself fails at
        checkpoints.save(4, phases(4))
        with pytest.raises(SaveError, match="checkpoint 4 cannot be written: .*File too large") as caught:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 2, "of Orbax's error too"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "seal", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        checkpoints.save(4, phases(4))
        with pytest.raises(SaveError, match="Input/output error") as caught:
            checkpoints.wait()
    assert caught.value.exit_code == 70, "may pass"
    assert "Traceback" not in capfd.readouterr().err + caplog.text
    assert Checkpoints(root).find() == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="checkpoint 1 cannot be written"):
        blocked = Checkpoints(tmp_path / "file")
        blocked.save(1, phases())
    waiting = [thread.name for thread in threading.enumerate() if not thread.daemon and thread is not before]
    assert waiting == [], "nothing keeps the process alive"


@pytest.mark.parametrize(
    "bad, said",
    [
        ({"keep": 0}, "checkpoint.keep=0 must be at least 1"),
        ({"minutes": -1.0}, "checkpoint.minutes=-1.0"),
        ({"steps": -1}, "checkpoint.steps=-1"),
        ({"window": 0}, "checkpoint.window=0"),
        ({"resume": "best"}, "checkpoint.resume=best needs checkpoint.keep_best"),
    ],
)
def test_bad_policies(bad, said):
    with pytest.raises(ConfigError, match=said):
        CheckpointConfig(**bad)


def test_each_process_sums_what_it_wrote(tmp_path):
    """By Orbax's names; what nobody else owns is of process 0, and the mark of nobody."""
    names = ("a/d/1", "a/manifest.ocdbt", "a/ocdbt.process_0/d/2", "a/ocdbt.process_1/d/3", "a/ocdbt.process_12/d/4")
    names += ("b/array_metadatas/process_1", "b/ocdbt.process_1.old/d/5", "whole.json")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    parts = [checkpoint.written_by(tmp_path, process, 3) for process in range(3)]
    assert parts[1:] == [["a/ocdbt.process_1/d/3", "b/array_metadatas/process_1"], []]
    assert sorted(sum(parts, [])) == sorted(set(names) - {"whole.json"})
    assert checkpoint.written_by(tmp_path, 12, 13) == ["a/ocdbt.process_12/d/4"]
    # what one process cannot read makes no checkpoint, and what one forgot is in the mark all the same
    told = [checkpoint.checksums(tmp_path, part) for part in parts]
    with pytest.raises(OSError, match="process 1: no such disk"):
        checkpoint.seal(tmp_path, [told[0], "no such disk", told[2]])
    assert (tmp_path / "whole.json").read_text() == "whole.json"
    checkpoint.seal(tmp_path, [told[0], {}, told[2]], 2.0)
    assert not damage(tmp_path)
    (tmp_path / "a/ocdbt.process_1/d/3").write_text("A" * len(names[3]))
    assert "a/ocdbt.process_1/d/3: its checksum differs" in damage(tmp_path)


def test_reading_back_is_shared_out(tmp_path, monkeypatch):
    """Every file is read once, by one process, whoever wrote it; each has about as many bytes to read."""
    files = {f"f{i}": [size, 0] for i, size in enumerate((900, 10, 300, 300, 290, 5, 0, 1))}
    for processes in (1, 2, 3, 11):
        parts = checkpoint.shares(files, processes)
        assert len(parts) == processes and sorted(sum(parts, [])) == sorted(files)
        loads = [sum(files[name][0] for name in part) for part in parts]
        assert max(loads) <= max(900, sum(loads) / processes + 10)
    # process 1 of two reads its half, and believes process 0 of the other
    names = [f"{i}" for i in range(6)]
    for name in names:
        (tmp_path / name).write_text(name)
    checkpoint.seal(tmp_path, [checkpoint.checksums(tmp_path, names)])
    read, real = [], checkpoint._checksum
    monkeypatch.setattr(checkpoint, "_checksum", lambda path: read.append(path.name) or real(path))
    monkeypatch.setattr(checkpoint.distributed, "count", lambda: 2)
    monkeypatch.setattr(checkpoint.distributed, "rank", lambda: 1)
    monkeypatch.setattr(checkpoint.distributed, "everyone", lambda mine: ["said by 0", mine])
    assert damage(tmp_path) == "said by 0" and sorted(read) == names[1::2]
    (tmp_path / "1").write_text("x")
    monkeypatch.setattr(checkpoint.distributed, "everyone", lambda mine: ["", mine])
    assert damage(tmp_path) == f"{tmp_path / '1'}: its checksum differs from when it was written"


def test_the_mark_is_plain_json(tmp_path, mesh):
    saved(tmp_path / "c", 3)
    mark = json.loads((tmp_path / "c/3" / checkpoint.MARK).read_text())
    names = {p.relative_to(tmp_path / "c/3").as_posix() for p in (tmp_path / "c/3").rglob("*") if p.is_file()}
    assert set(mark) == {"score", "files"} and set(mark["files"]) == names - {checkpoint.MARK}
