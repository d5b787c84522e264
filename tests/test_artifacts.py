"""Result folders: whole or not there, never mixed with another run, every change noticed."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from readme_jax import artifacts
from readme_jax.config import ArtifactError, DataError, free
from readme_jax.metrics import NonFiniteError


@dataclasses.dataclass(frozen=True)
class Config:
    """Of a stage with one parent."""

    out: Path
    model: Path | None = None
    steps: int = 3
    minutes: float = free(5.0)


def make(out, text="tensor", parents=None, **options):
    parents = parents or {}
    config = Config(out, parents.get("model"), **options)
    with artifacts.building(out, "stage", config, parents) as work:
        (work.path / "sub").mkdir(exist_ok=True)
        (work.path / "sub" / "weights").write_text(text)
        work.info["seconds"] = 2
    return config


def finished(out, parents=None, stage="stage", **options):
    parents = parents or {}
    return artifacts.finished(out, stage, Config(out, parents.get("model"), **options), parents)


def test_a_whole_result(tmp_path):
    parent, out = tmp_path / "parent", tmp_path / "deep" / "out"
    make(parent)
    assert not finished(out, {"model": parent})
    make(out, parents={"model": parent})
    assert finished(out, {"model": parent})
    manifest = artifacts.verify(out, hashes=True)
    assert manifest["stage"] == "stage" and manifest["info"] == {"seconds": 2}
    assert manifest["parents"] == {"model": str(parent)} and {"python", "jax"} <= set(manifest["versions"])
    assert manifest["files"]["sub/weights"] == {"bytes": 6, "sha256": artifacts.sha256(out / "sub" / "weights")}
    assert sorted(manifest["files"]) == ["config.yaml", "sub/weights"]
    assert yaml.safe_load((out / "config.yaml").read_text()) == {
        "out": str(out), "model": str(parent), "steps": 3, "minutes": 5.0,
    }  # fmt: skip
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"], "nothing beside it"


def test_an_empty_folder_is_taken_another_run_is_not(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert not finished(out)
    make(out)
    assert finished(out, minutes=1.0), "how it was made does not matter"
    with pytest.raises(ArtifactError, match="belongs to another run .stage stage, steps=3 there, 4 here.; choose"):
        finished(out, steps=4)
    with pytest.raises(ArtifactError, match="belongs to another run .stage stage, other inputs"):
        finished(out, stage="other")
    with pytest.raises(OSError):
        make(out)  # a program asks `finished` first; even without, nothing is overwritten
    assert artifacts.verify(out, hashes=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not empty and was not made by readme-jax"):
        finished(tmp_path / "notes")
    with pytest.raises(ArtifactError, match="is a file, a folder is needed"):
        finished(tmp_path / "notes" / "a.txt")


def test_parents_count_by_content_not_by_place(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "out", parents={"model": tmp_path / "a"})
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert finished(tmp_path / "out", {"model": tmp_path / "copy"})
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert finished(tmp_path / "moved", {"model": tmp_path / "copy"})
    make(tmp_path / "b", text="other tensors")
    with pytest.raises(ArtifactError, match="belongs to another run .*model="):
        finished(tmp_path / "moved", {"model": tmp_path / "b"})
    with pytest.raises(ArtifactError, match="nowhere: not a finished result .manifest.json is missing."):
        make(tmp_path / "new", parents={"model": tmp_path / "nowhere"})


def test_a_kill_leaves_what_was_done_for_the_same_run(tmp_path):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"

    def begin(**options):
        with artifacts.building(out, "stage", Config(out, **options), {}) as work:
            seen = sorted(p.name for p in work.path.iterdir())
            (work.path / "half").write_text("done so far")
            raise RuntimeError(json.dumps(seen))

    marks = ["run.json", "run.lock"]
    for options, seen in (({}, marks), ({}, ["half", *marks]), ({"minutes": 1.0}, ["half", *marks])):
        with pytest.raises(RuntimeError) as stop:
            begin(**options)
        assert json.loads(str(stop.value)) == seen and partial.is_dir() and not out.exists()
    before = sorted(partial.iterdir())
    with pytest.raises(
        ArtifactError, match=r"unfinished result of another run is in .*\.out\.partial; .*steps=3 there, 4"
    ):
        begin(steps=4)
    assert sorted(partial.iterdir()) == before, "hours of work may lie in it"
    make(out)
    assert (out / "half").read_text() == "done so far" and not partial.exists()
    assert "run.json" not in artifacts.verify(out, hashes=True)["files"]


def test_a_kill_before_the_mark_is_written(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    make(tmp_path / "out")
    assert finished(tmp_path / "out")


def test_a_kill_before_the_last_tidying(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def work():
        with artifacts.building(out, "stage", Config(out), {}) as work:
            (work.path / "weights").write_text("tensor")
            (work.path / "checkpoints").mkdir()
            (work.path / "checkpoints" / "5").write_text("old")
            work.scratch.append("checkpoints")

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "_remove", lambda *_: None)
        work()
    assert (out / "checkpoints" / "5").is_file() and (out / artifacts.MARK).is_file()
    assert finished(out)
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "manifest.json", "weights"]
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(
        json.dumps(manifest | {"scratch": ["../mine", "..", "", "weights", "manifest.json"]})
    )
    (tmp_path / "mine").write_text("thesis")
    assert finished(out) and (tmp_path / "mine").is_file() and (out / "weights").is_file()


def test_one_process_at_a_time(tmp_path):
    """A second process is refused and touches nothing; one that was killed is in nobody's way."""
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    program = f"""
import dataclasses, pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_artifacts
out = pathlib.Path({str(out)!r})
with test_artifacts.artifacts.building(out, "stage", test_artifacts.Config(out), {{}}) as work:
    (work.path / "half").write_text("done")
    print("in", flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    with child:
        assert child.stdout.readline() == "in\n"
        with pytest.raises(ArtifactError, match=f"{partial}: another process is working in it"):
            make(out)
        assert (partial / "half").read_text() == "done"
        child.kill()
    make(out)
    assert finished(out) and not partial.exists()


def test_bad_input_leaves_nothing_but_what_was_there(tmp_path):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"

    def fail(error):
        with pytest.raises(type(error)):
            with artifacts.building(out, "stage", Config(out), {}) as work:
                (work.path / "half").write_text("x")
                raise error

    fail(DataError("domain news: 3 tokens, 5 asked"))
    assert list(tmp_path.iterdir()) == []
    fail(NonFiniteError("step 3: loss is nan"))  # its metrics are worth a look
    assert (partial / "half").is_file()
    fail(DataError("again"))  # hours of an earlier start are not thrown away
    assert (partial / "half").is_file()


@pytest.mark.parametrize(
    "number, message",
    [
        (errno.ENOSPC, "the disk is full; nothing was written"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "cannot be written .Permission denied."),
        (errno.EROFS, "cannot be written .Read-only file system."),
    ],
)
def test_system_errors(tmp_path, number, message):
    out = tmp_path / "out"
    with pytest.raises(ArtifactError, match=f"out={out}: {message}") as caught:
        with artifacts.building(out, "stage", Config(out), {}):
            raise OSError(number, os.strerror(number))
    assert "\n" not in str(caught.value) and not out.exists()
    if number in (errno.ENOSPC, errno.EDQUOT):
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="odd"):
        with artifacts.building(out, "stage", Config(out), {}):
            raise OSError(errno.EIO, "odd")


def test_changes_are_noticed(tmp_path):
    out = tmp_path / "out"
    make(out)
    path = out / "sub" / "weights"
    path.write_text("TENSOR")
    artifacts.verify(out)  # sizes only
    with pytest.raises(ArtifactError, match="sub/weights: sha256 differs from the manifest"):
        artifacts.verify(out, hashes=True)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        make(tmp_path / "child", parents={"model": out})
    assert not (tmp_path / ".child.partial").exists()
    path.write_text("longer than before")
    with pytest.raises(ArtifactError, match="sub/weights: 18 bytes, the manifest says 6"):
        finished(out)
    path.unlink()
    with pytest.raises(ArtifactError, match="sub/weights: listed in manifest.json but missing"):
        finished(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="manifest.json: not valid JSON; the result was damaged"):
        finished(out)
    for text in ("{}", "[]", '{"stage": 1}'):
        (out / "manifest.json").write_text(text)
        with pytest.raises(ArtifactError, match="manifest.json: must be an object with stage, fingerprint"):
            finished(out)
    (out / "manifest.json").write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match="manifest.json: not valid JSON"):
        finished(out)


def test_a_full_disk_keeps_what_earlier_starts_did(tmp_path):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "full")):
        with pytest.raises((KeyboardInterrupt, ArtifactError)) as caught:
            with artifacts.building(out, "stage", Config(out), {}) as work:
                (work.path / "half").write_text("hours of work")
                raise error
    assert "the disk is full; what is done so far is kept" in str(caught.value)
    assert (partial / "half").read_text() == "hours of work"


def test_big_files_are_read_again_only_when_touched(tmp_path, monkeypatch):
    out, read, real = tmp_path / "out", [], artifacts.sha256
    monkeypatch.setattr(artifacts, "BIG", 6)
    monkeypatch.setattr(artifacts, "sha256", lambda path: (read.append(path.name), real(path))[1])
    make(out, text="tensor")
    make(tmp_path / "small", text="wee")
    path = out / "sub" / "weights"

    def verified(hashes="changed", folder=out):
        read.clear()
        artifacts.verify(folder, hashes=hashes)
        return sorted(read)

    assert set(artifacts.read_manifest(out)["times"]) == {"config.yaml", "sub/weights"}
    assert verified() == [] and verified(True) == ["config.yaml", "weights"] and verified(False) == []
    assert verified(folder=tmp_path / "small") == ["weights"], "small files are always read"
    out.rename(tmp_path / "moved")
    assert verified(folder=tmp_path / "moved") == [], "a move changes no file"
    shutil.copytree(tmp_path / "moved", out)
    assert verified() == ["config.yaml", "weights"], "a copy has other times: its content counts"
    shutil.rmtree(out)
    (tmp_path / "moved").rename(out)
    path.write_text("TENSOR")
    with pytest.raises(ArtifactError, match="sub/weights: sha256 differs from the manifest"):
        make(tmp_path / "child", parents={"model": out})
    # Even with the time of its content set back.
    os.utime(path, ns=(0, artifacts.read_manifest(out)["times"]["sub/weights"][0]))
    with pytest.raises(ArtifactError, match="sub/weights: sha256 differs from the manifest"):
        verified()


def test_the_same_content_made_twice_is_the_same_parent(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "BIG", 1)
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert artifacts.read_manifest(tmp_path / "a")["times"] != artifacts.read_manifest(tmp_path / "b")["times"]
    manifests = [artifacts.read_manifest(tmp_path / name)["files"]["sub/weights"] for name in "ab"]
    assert manifests[0] == manifests[1] and sorted(manifests[0]) == ["bytes", "sha256"]


def test_write_text_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    artifacts.write_text(path, "first")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        artifacts.write_text(path, "second")
    assert path.read_text() == "first"
