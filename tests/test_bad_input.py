"""What bad input gets: one line `error: ...` with file, field and rule, exit code 2, and a disk as it was before."""

import errno
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import tiny
from stages import ONE, differing, tree
from test_sources import write_gguf

from readme_jax import artifacts, cli
from readme_jax import carve as carving
from readme_jax.teacher import RecordCache
from readme_jax.train import alternate, calibrate

LAST = "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("README_JAX_CACHE", str(folder))
    return folder


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(words, *argv): the command fails as it should, its line holds the words, tmp_path is left as it was."""

    def check(words, *argv, early=True):
        before = tree(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(cli.dispatch, [str(word) for word in argv])
        text = capsys.readouterr().err
        assert stop.value.code == 2, text
        lines = [line for line in re.split("[\r\n]", text) if line.startswith("error: ")]
        assert len(lines) == 1 and text.endswith(lines[0] + "\n") and "Traceback" not in text, text
        if early:
            assert text == lines[0] + "\n", "no work was begun"
        for word in words:
            assert str(word) in lines[0], f"{word!r} is not in {lines[0]}"
        assert tree(tmp_path) == before, "nothing half-written"
        return lines[0]

    return check


@pytest.fixture
def model(stages, tmp_path):
    """A copy of the source checkpoint to damage."""
    return shutil.copytree(stages.source, tmp_path / "model")


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    for key, value in changes.items():
        data = {k: v for k, v in data.items() if k != key} | ({} if value is None else {key: value})
    path.write_text(json.dumps(data))


def edit_header(path, change):
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def move_offset(header):
    header[LAST]["data_offsets"] = [n + 4 for n in header[LAST]["data_offsets"]]


# ---- the checkpoint ---------------------------------------------------------------------------

DAMAGE = {
    "unknown family": (
        lambda m: edit_json(m / "config.json", model_type="mamba"),
        ["model/config.json", "model_type='mamba'", "known: llama, mistral, qwen2, qwen3"],
    ),
    "missing field": (
        lambda m: edit_json(m / "config.json", hidden_size=None),
        ["model/config.json", "hidden_size", "missing"],
    ),
    "field out of range": (
        lambda m: edit_json(m / "config.json", num_key_value_heads=3),
        ["model/config.json", "num_attention_heads=4", "multiple of num_key_value_heads=3"],
    ),
    "more layers than names fit into memory": (
        lambda m: edit_json(m / "config.json", num_hidden_layers=10**12),
        ["model/config.json", "num_hidden_layers=1000000000000 must be at most 10000"],
    ),
    "more layers than there are": (
        lambda m: edit_json(m / "config.json", num_hidden_layers=9_999),
        ["model.layers.2.", "is missing"],
    ),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), ["model/config.json", "not valid JSON"]),
    "no config": (lambda m: (m / "config.json").unlink(), ["model", "config.json"]),
    "truncated": (
        lambda m: os.truncate(m / "model.safetensors", 90_000),
        ["model/model.safetensors", "truncated", "90000 bytes"],
    ),
    "truncated in the header": (
        lambda m: os.truncate(m / "model.safetensors", 100),
        ["model/model.safetensors", "truncated", "file has 100"],
    ),
    "tampered header": (
        lambda m: edit_header(m / "model.safetensors", move_offset),
        ["model/model.safetensors", LAST, "gap"],
    ),
    "tampered shape": (
        lambda m: edit_header(m / "model.safetensors", lambda h: h[LAST].update(shape=[32, 16])),
        ["model/model.safetensors", LAST, "shape (32, 16)", "needs (16, 32)"],
    ),
    "renamed tensor": (
        lambda m: edit_header(m / "model.safetensors", lambda h: h.update(other=h.pop(LAST))),
        ["model", LAST, "missing"],
    ),
    "pickled": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        ["model/pytorch_model.bin", "pickled weights are refused", "run any code", "safetensors"],
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["model", "no weights", "model.safetensors"]),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint(model, refused, tmp_path, damage, words):
    damage(model)
    refused(words, "import", "--source", model, "--out", tmp_path / "out")


@pytest.mark.parametrize("command", ["generate", "data", "carve", "export"])
def test_other_programs_look_as_closely(stages, model, refused, tmp_path, command):
    edit_json(model / "config.json", model_type="mamba")
    argv = {
        "generate": ["--prompts", "one"],
        "data": ["--config", stages.yaml("data", tmp_path / "out"), "--out", tmp_path / "out"],
        "carve": ["--statistics", stages.statistics, "--out", tmp_path / "out"],
        "export": ["--out", tmp_path / "out"],
    }[command]
    words = ["model/config.json", "model_type='mamba'"]
    refused(words, command, "--model", model, *argv)


@pytest.mark.parametrize("source", ["nowhere/at/all", "/no/such/folder", "file.gguf"])
def test_no_such_model(refused, tmp_path, source):
    refused([source, "no such folder or file"], "import", "--source", source, "--out", tmp_path / "out")


def test_truncated_gguf(refused, tmp_path, cache):
    path = write_gguf(tmp_path / "m.gguf")
    whole = path.stat().st_size
    for size in (whole - 100, 2000, 10):
        os.truncate(path, size)
        refused(["m.gguf"], "import", "--source", path, "--out", tmp_path / "out", early=False)
        assert not [p for p in cache.rglob("*") if p.is_file() or p.name.startswith(".")], "nothing in the cache either"


def test_tampered_gguf(refused, tmp_path):
    raw = bytearray(write_gguf(tmp_path / "m.gguf").read_bytes())
    at = raw.index(b"blk.1.attn_q.weight")
    raw[at + 5 : at + 6] = b"9"
    (tmp_path / "m.gguf").write_bytes(raw)
    refused(["m.gguf", "blk."], "import", "--source", tmp_path / "m.gguf", "--out", tmp_path / "out", early=False)
    raw[:4] = b"GGML"
    (tmp_path / "m.gguf").write_bytes(raw)
    refused(["m.gguf"], "import", "--source", tmp_path / "m.gguf", "--out", tmp_path / "out", early=False)


def test_tampered_results_are_found_by_their_hash(stages, refused, tmp_path):
    """One bit of a tensor or of a record: sizes and headers are right, only the manifest knows."""
    for name in ("dense", "tuned", "data", "statistics"):
        folder = shutil.copytree(getattr(stages, name), tmp_path / name)
        path = next(p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".npy"))
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        words, out = [f"{name}/{path.name}", "sha256 differs from the manifest"], ["--out", tmp_path / "out"]
        if name == "dense":
            refused(words, "carve", "--model", folder, "--statistics", stages.statistics, *out)
            refused(words, "calibrate", "--model", folder, "--data", stages.data, *out, *ONE)
        elif name == "tuned":
            refused(words, "generate", "--model", folder, "--prompts", "one")
            refused(words, "export", "--model", folder, *out)
            refused(words, "evaluate", "--model", folder, "--data", stages.data, *out, *ONE)
        elif name == "data":
            refused(words, "alternate", "--config", stages.yaml("alternate", tmp_path / "out", data=folder))
        else:
            refused(words, "carve", "--model", stages.dense, "--statistics", folder, *out)
    os.truncate(tmp_path / "tuned" / "model.safetensors", 100)
    refused(
        ["tuned/model.safetensors", "100 bytes, the manifest says"],
        "generate",
        "--model",
        tmp_path / "tuned",
        "--prompts",
        "one",
    )
    (tmp_path / "data" / "animals.calibration.ids.npy").unlink()
    refused(
        ["animals.calibration.ids.npy", "listed in manifest.json but missing"],
        "alternate", "--config", stages.yaml("alternate", tmp_path / "out", data=tmp_path / "data"),
    )  # fmt: skip


# ---- text -------------------------------------------------------------------------------------


def test_text(stages, refused, tmp_path):
    out = tmp_path / "out"

    def data(words, early=True, **changes):
        refused(words, "data", "--config", stages.yaml("data", out, **changes), early=early)

    empty, broken, other = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl", tmp_path / "other.jsonl"
    empty.write_text('{"text": ""}\n{"text": "  "}\n')
    broken.write_text('{"text": "one"}\n{"text": \n')
    other.write_text('{"body": "one"}\n')
    files = {"source": "files"}
    data(["domain animals", "no text"], early=False, data__domains={"animals": files | {"path": str(empty)}})
    data(
        ["domain animals", "broken.jsonl line 2", "not JSON"],
        False,
        data__domains__animals=files | {"path": str(broken)},
    )
    data(["domain animals", "'text' is missing", "body"], False, data__domains__animals=files | {"path": str(other)})
    data(["domain colours", "nothing.jsonl", "no file"], data__domains__colours=files | {"path": "nothing.jsonl"})
    line = "domain animals (train): "
    data([line, " tokens, 9999999 asked"], False, data__train_tokens=9_999_999)
    data(["domains is empty"], data__domains={})
    data(["data.seq=1024", "context of 512"], data__seq=1024)
    data(
        ["data.domains.animals.source", "'hbu'", "'fallback', 'hub', 'files'"], data__domains__animals={"source": "hbu"}
    )
    assert not out.exists()


def test_tokenizer_that_does_not_fit(stages, model, refused, tmp_path):
    size = len(json.loads((model / "tokenizer.json").read_text())["model"]["vocab"])
    edit_json(model / "config.json", vocab_size=size - 1)
    rule = [f"{size} ids do not fit", f"vocab_size={size - 1}", str(model)]
    refused(rule, "data", "--config", stages.yaml("data", tmp_path / "out", model=model))
    (model / "tokenizer.json").write_text("{}")
    refused([str(model), "no tokenizer"], "data", "--config", stages.yaml("data", tmp_path / "out", model=model))


def test_records_of_a_larger_vocabulary(stages, refused, tmp_path):
    data = shutil.copytree(stages.data, tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["info"]["inputs"]["vocab"] = 500
    (data / "manifest.json").write_text(json.dumps(manifest))
    rule = [str(data), "vocabulary of 500", "vocab_size=384"]
    refused(rule, "calibrate", "--model", stages.dense, "--data", data, "--out", tmp_path / "out", *ONE)
    refused(rule, "evaluate", "--model", stages.tuned, "--data", data, "--out", tmp_path / "out", *ONE)
    refused(rule, "alternate", "--config", stages.yaml("alternate", tmp_path / "out", data=data))


# ---- options and YAML -------------------------------------------------------------------------


def test_yaml(stages, refused, tmp_path):
    path = tmp_path / "run.yaml"
    good = open(stages.yaml("alternate", tmp_path / "out")).read()
    for text, words in (
        (good + "stepz: 3\n", ["stepz: no such key", "known keys: model, data, out"]),
        (good.replace("steps: 2", "stpes: 2", 1), ["experts.stpes: no such key", "known keys: steps, batch"]),
        (good.replace("steps: 2", "steps: many", 1), ["experts.steps", "expected a number", "'many'"]),
        (good.replace("rounds: 2", ""), ["rounds: missing"]),
        (good.replace("rounds: 2", "rounds: 0"), ["rounds=0 must be at least 1"]),
        ("a: [1, 2", ["not YAML"]),
        ("[]: 1\n", ["not YAML"]),
        ("- 1\n", ["expected a mapping"]),
    ):
        path.write_text(text)
        refused([path, *words], "alternate", "--config", path)
    path.write_bytes(b"\xff\xfe\x00")
    refused([path, "not YAML"], "alternate", "--config", path)
    refused(["/no/run.yaml", "no such config file"], "alternate", "--config", "/no/run.yaml")
    refused(["--stepz"], "carve", "--stepz", "3", "--model", "a", "--statistics", "b", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "fraction, words",
    [
        ("0.001", ["fraction=0.001 of 48 channels gives 0 channels", "from 1 to 48"]),
        ("0", ["fraction=0.0 must be above 0 and at most 1"]),
        ("1.5", ["fraction=1.5 must be above 0 and at most 1"]),
        ("nan", ["fraction=nan must be above 0"]),
    ],
)
def test_fraction_without_a_channel(stages, refused, tmp_path, fraction, words):
    argv = ["--model", stages.dense, "--statistics", stages.statistics, "--out", tmp_path / "out"]
    refused(words, "carve", *argv, "--fraction", fraction)


def test_stages_that_do_not_follow(stages, refused, tmp_path):
    """The result of another stage, or of another model, where an input belongs."""
    out = ["--out", tmp_path / "out"]
    refused(["carved already"], "carve", "--model", stages.carved, "--statistics", stages.statistics, *out)
    refused(["carved already"], "calibrate", "--model", stages.carved, "--data", stages.data, *out, *ONE)
    refused(["stage 'import', not 'data'"], "calibrate", "--model", stages.dense, "--data", stages.dense, *out, *ONE)
    refused([stages.data, "a model folder needs config.json"], "generate", "--model", stages.data, "--prompts", "one")
    refused([stages.data], "calibrate", "--model", stages.data, "--data", stages.data, *out, *ONE)
    refused(
        ["statistics.safetensors", "no such file"], "carve", "--model", stages.dense, "--statistics", stages.data, *out
    )
    tiny.write_model(tmp_path / "wide", mlp=64)
    cli.dispatch(["import", "--source", str(tmp_path / "wide"), "--out", str(tmp_path / "other")])
    rule = ["2 layers of 48 channels", "has 2 of 64"]
    refused(rule, "carve", "--model", tmp_path / "other", "--statistics", stages.statistics, *out)
    refused(["batch=1 must be a multiple of 8"], "calibrate", "--model", stages.dense, "--data", stages.data, *out)
    no_calibration = stages.yaml("data", tmp_path / "none", data__calibration_tokens=0)
    cli.dispatch(["data", "--config", no_calibration])
    rule = ["no calibration records", "calibration_tokens=0"]
    refused(rule, "calibrate", "--model", stages.dense, "--data", tmp_path / "none", *out, *ONE)


def test_alternate(stages, refused, tmp_path, monkeypatch):
    def alternate(words, early=True, **changes):
        refused(words, "alternate", "--config", stages.yaml("alternate", tmp_path / "out", **changes), early=early)

    alternate([stages.dense, "not carved", "readme-jax carve"], model=stages.dense)
    alternate(["router.steps must be 0 for a model with one expert"], model=stages.static)
    alternate([stages.carved, "has no router and router.steps is 0"], router__steps=0)
    alternate(["router.steps, experts.steps and experts.refit are all 0"], router__steps=0, experts__steps=0)
    alternate(["kd_weight=0.0, ce_weight=0.0", "not both 0"], experts__kd_weight=0)
    plain = {"experts__kd_weight": 0, "experts__ce_weight": 1}
    alternate(["experts", "teacher_topk=4 needs kd_weight > 0 and steps > 0"], experts__teacher_topk=4, **plain)
    alternate(["teacher_topk=-1 must not be negative"], experts__teacher_topk=-1)
    alternate(["experts.teacher_topk=500", "has 384 tokens"], experts__teacher_topk=500)
    for name, module, value in (("tensorboard", "tensorboardX", True), ("wandb", "wandb", "project")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            alternate([f"{name} needs the extra: pip install 'readme-jax[{name}]'"], **{name: value})
    rule = ["experts.teacher_dtype=bfloat16 has no meaning"]
    alternate(rule, experts__teacher_dtype="bfloat16", router__teacher="current", **plain)
    alternate(["experts.optim", "rounding=nearest has no meaning"], experts__optim={"lr": 1, "rounding": "nearest"})
    alternate(["router.batch=2 must be a multiple of the mesh's 8"], mesh__data=0)
    alternate(["mesh data=9", "needs 9 devices, there are 8"], mesh__data=9)
    alternate(["mesh.data=-1 must be at least 1"], mesh__data=-1)
    alternate(["3 devices do not divide the 8", "mesh.data=2 would use 6"], mesh__data=0, mesh__expert=3)
    alternate(["mlp=48 FFN channels must be a multiple of mesh.model=5"], mesh__data=1, mesh__model=5)
    alternate(["hosts", "hosts.process=2 must be below hosts.processes=2"], hosts={"processes": 2, "process": 2})
    alternate(["hosts.coordinator, hosts.process: needed too"], hosts={"processes": 2})
    alternate(["hosts", "hosts.coordinator='here' must be host:port"], hosts={"coordinator": "here"})
    alternate(["profile", "profile.steps=-1 must not be negative"], profile={"steps": -1})
    rule = ["router", "label_batch=2 has no meaning with teacher=current"]
    alternate(rule, router__label_batch=2, router__teacher="current")
    alternate(["experts.way=grouped runs on one device"], mesh__data=2, experts__way="grouped")
    alternate(["router width=10 must be a multiple of 2 * heads=4"], router__shape__width=10)
    alternate(["experts.optim", "lr=-1.0 must be positive"], experts__optim__lr=-1)
    alternate(["experts.optim", "lr=inf must be positive and finite"], experts__optim__lr=float("inf"))
    alternate(["experts.optim", "b1=2.0 must be at least 0 and below 1"], experts__optim__b1=2)
    alternate(["experts.optim", "b2=1.0 must be at least 0 and below 1"], experts__optim__b2=1)
    alternate(["experts.optim", "weight_decay=-3.0 must not be negative"], experts__optim__weight_decay=-3)
    alternate(["experts.batch=1000000000, experts.accum=1: the phase has only"], experts__batch=10**9)
    alternate(["experts", "cut=0 must be at least 1"], experts__cut=0)
    alternate(["experts.cut=5 does not divide records of 32 tokens"], experts__cut=5)
    rule = ["router.batch=4, router.accum=1: the phase has only 3 rows"]
    alternate(rule, router__records=1, router__batch=4)
    alternate(["router: balance=-1.0 must be finite and at least 0"], router__balance=-1.0)
    separate = tmp_path / "separate"
    carving.to_separate(stages.tuned, separate)
    alternate(["kd_weight needs the dense teacher"], model=separate, router__steps=0)
    alternate(["experts.way=parallel needs separate experts"], experts__way="parallel")
    mesh = {"mesh__data": 1, "mesh__expert": 2, "experts__way": "parallel", "router__steps": 0}
    rule = ["experts=3 must be a multiple of", "expert=2"]
    alternate(rule, model=separate, experts__kd_weight=0, experts__ce_weight=1, early=False, **mesh)
    alternate(["router.steps needs labels of a dense run"], model=separate, experts__kd_weight=0, experts__ce_weight=1)


def test_evaluate(stages, refused, tmp_path):
    def evaluate(words, folder, *argv):
        refused(words, "evaluate", "--model", folder, "--data", stages.data, "--out", tmp_path / "out", *ONE, *argv)

    evaluate(["arms=('dense', 'routed')", "a dense model has only the arm dense"], stages.dense)
    evaluate(["arm routed", "has 3 experts and no router"], stages.carved)
    evaluate(
        ["arm own_domain", "no expert is named 'animals'", "experts: static"], stages.static, "--arms", "own_domain"
    )
    evaluate(["'routd'", "arms"], stages.tuned, "--arms", "routd")
    evaluate(["arms=('dense', 'dense') names an arm twice"], stages.tuned, "--arms", "dense", "dense")
    evaluate(["its experts differ"], stages.tuned, "--router", stages.static)
    evaluate(
        ["router: has no meaning without the arm routed"], stages.tuned, "--router", stages.tuned, "--arms", "dense"
    )
    evaluate(["agreement=true", "one choice for every token"], stages.static, "--agreement")
    evaluate(["labels: have no meaning without agreement=true"], stages.tuned, "--labels.kind", "overlap")
    evaluate(["arm oracle", "one choice for every token"], stages.static, "--arms", "oracle")
    evaluate(["a dense model has only the arm dense"], stages.dense, "--arms", "oracle_layers")
    evaluate(["agreement=true needs the arms dense and routed"], stages.tuned, "--agreement", "--arms", "dense")
    evaluate(["labeller: has no meaning without"], stages.tuned, "--labeller", str(stages.carved))
    asked = ["--arms", "oracle", "--labeller"]
    evaluate([f"labeller={stages.static}", "its shapes or experts differ"], stages.tuned, *asked, str(stages.static))
    separate = tmp_path / "separate"
    carving.to_separate(stages.tuned, separate)
    evaluate(["arm dense: separate storage has no dense form"], separate)
    evaluate(["arm oracle_layers: separate storage has no dense form"], separate, "--arms", "routed", "oracle_layers")


def test_generate(stages, refused):
    def generate(words, *argv, folder=stages.tuned, early=True):
        refused(words, "generate", "--model", folder, *argv, early=early)

    for option, value, rule in (
        ("--top-p", 0, "top_p=0.0 must be in (0, 1]"),
        ("--top-p", 1.5, "top_p=1.5 must be in (0, 1]"),
        ("--top-k", -1, "top_k=-1 must not be negative"),
        ("--temperature", -0.5, "temperature=-0.5 must not be negative"),
        ("--max-new-tokens", 0, "max_new_tokens=0 must be at least 1"),
        ("--seed", -1, "seed=-1 must be in 0 .. 2**32 - 1"),
    ):
        generate([rule], "--prompts", "one", option, value)
    generate(["prompt 1 is empty"], "--prompts", "one", "", early=False)
    rule = ["prompt 0", "tokens + max_new_tokens=510 exceed the context of 512"]
    generate(rule, "--prompts", "one two three four", "--max-new-tokens", 510, early=False)
    generate(["3 experts but no router"], "--prompts", "one", folder=stages.carved)
    generate(["is dense, it has none"], "--prompts", "one", "--experts", folder=stages.dense)
    generate(["/no/model", "no such folder or file"], "--prompts", "one", folder="/no/model")


def test_generate_without_prompt_or_template(stages, model, refused, monkeypatch):
    monkeypatch.setattr("sys.stdin", iter(["\n"]))
    refused(["prompts: none given"], "generate", "--model", stages.tuned)
    argv = ["--model", model, "--prompts", "one", "--chat"]
    for template, rule in (
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no system turn') }}", "no sys"),
    ):
        edit_json(model / "tokenizer_config.json", chat_template=template)
        refused([model, "the chat template fails", rule], "generate", *argv, early=False)
    edit_json(model / "tokenizer_config.json", chat_template=None)
    refused([model, "no chat template"], "generate", *argv, early=False)


def test_export_of_a_dense_model(stages, refused, tmp_path):
    refused(["config.json", "nothing to export"], "export", "--model", stages.dense, "--out", tmp_path / "out")


def test_quickstart(refused, tmp_path):
    refused(["minutes=0.0 must be positive"], "quickstart", "--minutes", "0", "--out", tmp_path / "out")
    refused(["seed=99999999999 must be in 0 .. 2**32 - 2"], "quickstart", "--seed", "99999999999")
    refused(["fraction=2.0 must be above 0 and at most 1"], "quickstart", "--fraction", "2", "--out", tmp_path / "out")


# ---- the output folder ------------------------------------------------------------------------


def commands(stages, out):
    """Every stage with an output folder, as a command that would succeed."""
    model, data = ["--model", stages.dense], ["--data", stages.data]
    return {
        "import": ["--source", stages.source, "--out", out],
        "data": ["--config", stages.yaml("data", out)],
        "calibrate": [*model, *data, "--out", out, *ONE],
        "carve": [*model, "--statistics", stages.statistics, "--out", out],
        "alternate": ["--config", stages.yaml("alternate", out)],
        "evaluate": ["--model", stages.tuned, *data, "--out", out, *ONE],
        "separate": ["--model", stages.tuned, "--out", out],
        "export": ["--model", stages.tuned, "--out", out],
    }


STAGES = ["import", "data", "calibrate", "carve", "separate", "alternate", "evaluate", "export"]


@pytest.mark.parametrize("stage", STAGES)
def test_output_folder_of_another_run(stages, refused, tmp_path, stage):
    out = tmp_path / "out"
    argv = commands(stages, out)[stage]
    other = "carved" if stage != "carve" else "static"
    shutil.copytree(getattr(stages, other), out)
    refused([f"out={out}", "belongs to another run", "choose another folder"], stage, *argv)
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    refused([f"out={out}", "not empty and was not made by readme-jax"], stage, *argv)
    shutil.rmtree(out)
    out.write_text("a file")
    refused([f"out={out}", "a folder is needed"], stage, *argv)


def test_an_unfinished_run_with_other_options_is_kept(stages, refused, tmp_path, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "versions", die)
        with pytest.raises(SystemExit):
            cli.run(cli.dispatch, ["alternate", "--config", stages.yaml("alternate", out)])
    assert (partial / "checkpoints").is_dir()
    other = stages.yaml("alternate", out, seed=7)
    refused([partial, "unfinished result of another run", "seed=0 there, 7 here"], "alternate", "--config", other)
    other = stages.yaml("alternate", out, experts__optim__clip=0.5)
    refused([partial, "experts.optim.clip=1.0 there, 0.5 here"], "alternate", "--config", other)
    cli.dispatch(["alternate", "--config", stages.yaml("alternate", out, checkpoint__minutes=1.5)])
    assert differing(out, stages.tuned) == set(), "another pace of checkpoints is the same run"


def test_import_notices_a_changed_source(stages, model, refused, tmp_path):
    argv = ["--source", str(model), "--out", str(tmp_path / "out")]
    cli.dispatch(["import", *argv])
    for path in model.iterdir():
        os.utime(path, (1, 1))
    cli.dispatch(["import", *argv])  # another time alone is no change
    weights = model / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    refused([weights, "changed since it was imported"], "import", *argv)
    shutil.rmtree(model)
    refused([model, "no such"], "import", "--source", model, "--out", tmp_path / "new")


@pytest.mark.parametrize("stage", STAGES)
def test_full_disk(stages, refused, tmp_path, monkeypatch, stage):
    """The disk is full when the first file of a result is flushed."""
    argv = commands(stages, tmp_path / "out")[stage]

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    if stage == "alternate":  # the failing write is that of the labels
        monkeypatch.undo()
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: full(0))
    refused([f"out={tmp_path / 'out'}", "the disk is full; nothing was written"], stage, *argv, early=False)


def test_disk_that_fills_up_late(stages, refused, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    rule = [f"out={tmp_path / 'out'}", "the disk is full"]
    argv = commands(stages, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "save_statistics", full)
        refused(rule, "calibrate", *argv["calibrate"], early=False)
    with monkeypatch.context() as patch:
        patch.setattr(alternate, "write", full)
        with pytest.raises(SystemExit) as stop:
            cli.run(cli.dispatch, ["alternate", *argv["alternate"]])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert all(word in last for word in (*rule, "what is done so far is kept in")), last
    assert [p.name for p in (tmp_path / ".out.partial/checkpoints").iterdir() if p.name == "8"], "and so it is"
    cli.dispatch(["alternate", *argv["alternate"]])
    assert differing(tmp_path / "out", stages.tuned) == set()


@pytest.mark.parametrize("stage", STAGES)
def test_output_folder_that_cannot_be_made(stages, refused, tmp_path, stage):
    (tmp_path / "file").write_text("")
    argv = commands(stages, tmp_path / "out")[stage]
    argv = [*argv, "--out", tmp_path / "file" / "out"] if "--config" in argv else [
        tmp_path / "file" / "out" if word == tmp_path / "out" else word for word in argv
    ]  # fmt: skip
    refused([tmp_path / "file", "Not a directory"], stage, *argv)


def test_system_errors_are_one_line(capsys):
    for error, line in (
        (PermissionError(errno.EACCES, "Permission denied", "/x/config.json"), "/x/config.json: Permission denied"),
        (OSError("odd"), "odd"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory: Unable to allocate 9 GiB"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda _, error=error: (_ for _ in ()).throw(error), [])
        assert stop.value.code == 2 and capsys.readouterr().err == f"error: {line}\n"


def test_labels_take_their_blocks_at_once(tmp_path):
    """A sparse file would kill the process at a later write to its map."""
    cache = RecordCache(tmp_path, "labels", np.arange(50, dtype=np.int32), {"target": ((64, 3), np.float32)})
    path = tmp_path / "labels.target.npy"
    assert path.stat().st_blocks * 512 >= 50 * 64 * 3 * 4
    cache.fill(4, lambda ids_B: {"target": np.broadcast_to(ids_B[:, None, None], (4, 64, 3)).astype(np.float32)})
    assert np.load(path)[:, 0, 0].tolist() == list(range(50))
