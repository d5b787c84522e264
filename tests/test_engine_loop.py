"""The engine's loop over a runner that checks every page: admission, preemption, sharing, cancels, waves, no leaks."""

import gc

import numpy as np
import pytest
import served
from fake_runner import VOCAB, FakeRunner, expected, expert_of

from readme_jax import api
from readme_jax.config import ConfigError, DataError
from readme_jax.serving import parts
from readme_jax.serving.engine import Engine
from readme_jax.serving.options import RESIDENCIES, SCHEDULES
from readme_jax.serving.recorder import Recorder
from readme_jax.serving.request import SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return api.load(served.write(tmp_path_factory.mktemp("served")))


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(parts, "Runner", FakeRunner)


SMALL = dict(
    kv_memory="64KiB", router_memory="80KiB", kv_page=4, expert_page=4, batch_requests=4, batch_tokens=24, chunk=10,
    max_live=8, context=120,
)  # fmt: skip


def prompts(rng, count):
    """Of all lengths, many with the same beginning."""
    stems = [rng.integers(1, VOCAB, 30).tolist() for _ in range(3)]
    made = []
    for _ in range(count):
        stem = stems[rng.integers(3)][: rng.integers(0, 30)] if rng.random() < 0.6 else []
        made.append(stem + rng.integers(1, VOCAB, rng.integers(1, 30)).tolist())
    return made


def check_empty(engine):
    """Nothing is left behind."""
    parts = engine.parts
    assert engine.unfinished == 0 and not engine._of and not engine._flying
    assert parts.scheduler.unfinished == 0 and parts.scheduler.flying == 0 and not parts._cached and not parts._routing
    for pool in (*parts.pools, *parts.router_pools):
        assert pool.available == pool.pages
    assert parts.transfers.pending == 0 and parts.transfers._room == engine.options.ahead


def run(engine, rng, count, cancel=0.06):
    """Serve requests that come while others run, some cancelled; compare all tokens with one at a time."""
    wanted, got, ended = {}, {}, {}
    todo = prompts(rng, count)
    while todo or engine.unfinished:
        for _ in range(min(len(todo), int(rng.integers(0, 3)))):
            prompt, room, n = todo.pop(), int(rng.integers(1, 25)), int(rng.choice([1, 1, 1, 3]))
            number = engine.add_request(prompt, SamplingParams(max_new_tokens=room, n=n))
            for choice in range(n):
                wanted[number, choice] = prompt, expected(prompt, room)
                got[number, choice] = []
        if rng.random() < cancel and engine.unfinished:
            engine.cancel(int(rng.choice([*engine._asked])))
        for update in engine.step():
            assert (update.id, update.choice) not in ended
            got[update.id, update.choice] += update.tokens
            if update.reason:
                ended[update.id, update.choice] = update
    assert ended.keys() == wanted.keys()
    for key, (prompt, tokens) in wanted.items():
        reason, usage = ended[key].reason, ended[key].usage
        if reason == "cancelled":
            assert tokens[: len(got[key])] == got[key]
        else:
            assert got[key] == tokens
            assert usage.completion_tokens == len(tokens) + (reason == "stop") and usage.prompt_tokens == len(prompt)
            every = (prompt + tokens + [0])[: len(prompt) + usage.completion_tokens - 1]
            experts = [expert_of(every[: i + 1]) for i in range(len(every))]
            assert usage.experts == {e: experts.count(e) for e in set(experts)}
    return [u.reason for u in ended.values()]


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_output_depends_on_no_policy(model, schedule, residency):
    rng = np.random.default_rng(SCHEDULES.index(schedule) * 4 + RESIDENCIES.index(residency))
    memory = rng.choice(["0.3x", "0.5x", "1.0x"])
    options = SMALL | dict(expert_memory=str(memory), batch_requests=int(rng.choice([2, 4])))
    with Engine(model, schedule=schedule, residency=residency, **options) as engine:
        reasons = run(engine, rng, 40)
        assert {"stop", "length", "cancelled"} <= set(reasons)
        check_empty(engine)
        moved, planned = engine.parts.transfers.moved, engine.parts.residency.counters
        assert moved.loads == planned.loads and moved.bytes == planned.bytes_loaded > 0


def test_the_runs_above_meet_what_they_are_for(model):
    """Preemption, shared prefixes, two batches in flight, waves: none of them is left out by chance."""
    depth = []
    options = SMALL | dict(
        expert_memory="0.25x", schedule="prefill-first", kv_memory="48KiB", batch_requests=2, chunk=24
    )
    with Engine(model, **options) as engine:
        step = engine.parts.runner.step

        def stepped(*args):
            depth.append(len(engine._flying))
            return step(*args)

        engine.parts.runner.step = stepped
        run(engine, np.random.default_rng(7), 60)
        stats = engine.stats()
        check_empty(engine)
    assert stats["preemptions"] > 0 and stats["tokens_from_prefix"] > 0 and stats["waves"] > 0
    assert set(depth) == {0, 1}, "a full batch is sent before the one before it is back"


def test_column_mode_and_separate_experts(tmp_path):
    model = api.load(served.write(tmp_path / "separate", storage="separate"))
    for options in (dict(mode="column", expert_memory="0.4x"), dict(mode="layer", expert_memory="0.21x")):
        with Engine(model, **SMALL, **options) as engine:
            run(engine, np.random.default_rng(8), 30)
            check_empty(engine)


def test_one_expert_without_a_router(tmp_path):
    model = api.load(served.write(tmp_path / "static", experts=1, routed=False))
    with Engine(model, **SMALL) as engine:
        out = engine.generate([[5, 6, 7]], SamplingParams(max_new_tokens=5))[0]
        assert out.tokens == expected([5, 6, 7], 5) and out.choices[0].reason == "length"
        assert out.choices[0].usage.experts == {0: 3 + 5 - 1}
        (pool,) = engine.parts.pools
        assert pool.available == pool.pages and engine.parts.router_pools == []


def test_every_request_moves_on_though_router_pages_are_few(model):
    options = SMALL | dict(router_memory="24KiB")  # one or two requests at a time
    with Engine(model, **options) as engine:
        run(engine, np.random.default_rng(9), 30, cancel=0.3)
        check_empty(engine)


def test_a_known_prefix_is_neither_routed_nor_run_again(model):
    prompt = np.random.default_rng(1).integers(1, VOCAB, 40).tolist()
    with Engine(model, **SMALL) as engine:
        first = engine.generate([prompt], SamplingParams(max_new_tokens=4))[0].choices[0]
        routed, ran = engine.parts.runner.routed, engine.parts.runner.ran
        again = engine.generate([prompt], SamplingParams(max_new_tokens=4))[0].choices[0]
        assert again.tokens == first.tokens == expected(prompt, 4)
        assert engine.parts.runner.routed == routed, "40 tokens are 10 whole pages"
        assert engine.parts.runner.ran - ran == 4 + 3, "the last page is run for its last token's sake"
        assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 36)
        assert engine.stats()["tokens_from_prefix"] == 36


def test_choices_share_their_prompt(model):
    prompt = np.random.default_rng(2).integers(1, VOCAB, 40).tolist()
    with Engine(model, **SMALL) as engine:
        out = engine.generate([prompt], SamplingParams(max_new_tokens=3, n=3))[0]
        assert [choice.tokens for choice in out.choices] == [expected(prompt, 3)] * 3
        assert [choice.usage.cached_tokens for choice in out.choices] == [0, 36, 36]
        check_empty(engine)


def test_generate_takes_what_model_generate_takes(model):
    with Engine(model, **SMALL) as engine:
        one = engine.generate("one two", SamplingParams(max_new_tokens=6))
        ids = model.encode("one two")
        assert one.prompt == ids and one.tokens == expected(ids, 6)
        assert one.text == model.tokenizer.decode(one.tokens, skip_special_tokens=True)
        two = engine.generate(["one two", [9, 9]], [SamplingParams(max_new_tokens=6), SamplingParams(max_new_tokens=2)])
        assert two[0].text == one.text and two[1].tokens == expected([9, 9], 2)
        chat = engine.generate("one", SamplingParams(max_new_tokens=2), chat=True)
        assert chat.prompt == model.encode("one", chat=True)
        assert one.choices[0].scores is None


def test_streams_side_by_side_and_step_between(model):
    """News are never lost to whoever else moves the engine."""
    with Engine(model, **SMALL) as engine:
        sampling = SamplingParams(max_new_tokens=12)
        other = engine.add_request([4, 5], sampling)
        a, b = engine.stream("one two three", sampling), engine.stream([7, 8, 9], sampling)
        texts, tokens, rest = {"a": "", "b": ""}, {"a": [], "b": []}, []
        open_streams = {"a": a, "b": b}
        while open_streams:
            for name in [*open_streams]:
                update = next(open_streams[name], None)
                if update is None:
                    del open_streams[name]
                else:
                    texts[name] += update.text
                    tokens[name] += update.tokens
            rest += engine.step() if engine.unfinished else []
        rest += engine.step()
        assert tokens["a"] == expected(model.encode("one two three"), 12) and tokens["b"] == expected([7, 8, 9], 12)
        assert texts["b"] == model.tokenizer.decode(tokens["b"], skip_special_tokens=True)
        mine = [update for update in rest if update.id == other]
        assert [t for u in mine for t in u.tokens] == expected([4, 5], 12) and len(rest) == len(mine)


def test_a_stream_that_is_left_is_cancelled(model):
    with Engine(model, **SMALL) as engine:
        stream = engine.stream([7, 8, 9], SamplingParams(max_new_tokens=20))
        next(stream)
        assert engine.unfinished == 1
        stream.close()
        assert engine.unfinished == 0 and engine.step() == [], "nobody waits for its news"
        check_empty(engine)


def test_stop_tokens_and_strings(model):
    prompt = [11, 12, 13]
    tokens = expected(prompt, 24)
    text = model.tokenizer.decode(tokens, skip_special_tokens=True)
    with Engine(model, **SMALL) as engine:

        def run(**options):
            return engine.generate([prompt], SamplingParams(max_new_tokens=24, **options))[0].choices[0]

        by_token = run(stop_tokens=(tokens[5],))
        assert by_token.reason == "stop" and by_token.tokens == tokens[: tokens.index(tokens[5])]
        part = text[len(text) // 2 :][:3]
        by_text = run(stop=(part,))
        assert by_text.reason == "stop" and by_text.text == text[: text.index(part)]
        assert tokens[: len(by_text.tokens)] == by_text.tokens
        assert run().reason == ("length" if len(tokens) == 24 else "stop") and run().text == text


def test_what_ends_a_text_can_be_told_to_go_on(model):
    rng = np.random.default_rng(3)
    while True:
        prompt = rng.integers(1, VOCAB, 5).tolist()
        if len(expected(prompt, 20)) < 10:
            break
    with Engine(model, **SMALL) as engine:
        ends = engine.generate([prompt], SamplingParams(max_new_tokens=20))[0].choices[0]
        assert ends.reason == "stop" and ends.tokens == expected(prompt, 20)
        goes_on = engine.generate([prompt], SamplingParams(max_new_tokens=20, ignore_eos=True))[0].choices[0]
        assert goes_on.reason == "length" and len(goes_on.tokens) == 20


def test_closing_with_work_on_the_device(model):
    engine = Engine(model, **SMALL)
    for _ in range(12):
        engine.add_request([3, 4, 5], SamplingParams(max_new_tokens=9, n=2))
    for _ in range(3):
        engine.step()
    engine.close()
    engine.close()
    assert engine.unfinished == 0 and not engine.parts.transfers._thread.is_alive()
    with pytest.raises(ConfigError, match="the engine is closed"):
        engine.generate([[3]])


def test_an_engine_that_nobody_closes_leaves_no_thread(model):
    engine = Engine(model, **SMALL)
    thread = engine.parts.transfers._thread
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_an_error_of_the_transfers_comes_out_of_step(model):
    with Engine(model, **SMALL, expert_memory="0.3x") as engine:
        engine.add_request([3, 4, 5])

        def broken(items, out_NQD):
            raise OSError("the disk is gone")

        object.__setattr__(engine.parts.transfers.host, "gather", broken)
        with pytest.raises(RuntimeError, match="the disk is gone"):
            for _ in range(9):
                engine.step()


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_an_interrupted_step_is_never_gone_on_from(model, monkeypatch, nth):
    """Pages that the plan counts as loaded may not be there: nothing but a restart is served."""
    with Engine(model, **SMALL, expert_memory="0.3x", schedule="fcfs") as engine:
        alone = [out.choices[0].tokens for out in engine.generate([[3, 4, 5], [7, 8]])]
        insert, calls = engine.parts.runner.insert, []

        def interrupted(slots, pages_SQD):
            calls.append(slots)
            if len(calls) == nth:
                raise KeyboardInterrupt
            insert(slots, pages_SQD)

        engine.restart()
        monkeypatch.setattr(engine.parts.runner, "insert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[3, 4, 5], [7, 8]])
        for call in (lambda: engine.generate([[3, 4, 5]]), engine.step, lambda: engine.add_request([3])):
            with pytest.raises(RuntimeError, match=r"in the middle of a step \(KeyboardInterrupt\); restart\(\)"):
                call()
        engine.restart()
        assert [out.choices[0].tokens for out in engine.generate([[3, 4, 5], [7, 8]])] == alone
        check_empty(engine)


def test_a_restart_tells_everyone_who_waits(model, monkeypatch):
    """After a step that broke too: streams and callers of `step` hear that their requests are over."""
    sampling = SamplingParams(max_new_tokens=30, ignore_eos=True, n=2)
    with Engine(model, **SMALL) as engine:
        open_stream, number = engine.stream([3, 4, 5], sampling), engine.add_request([7, 8], sampling)
        said = [next(open_stream)]
        step = engine.parts.runner.step
        monkeypatch.setattr(engine.parts.runner, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            while True:
                engine.step()
        monkeypatch.setattr(engine.parts.runner, "step", step)
        engine.restart()
        said += open_stream
        ended = {update.choice for update in said if update.reason == "cancelled"}
        assert ended == {0, 1} and all(update.usage for update in said if update.reason)
        assert (number, "cancelled") in {(update.id, update.reason) for update in engine.step()}
        assert engine.unfinished == 0
        check_empty(engine)


def test_an_engine_works_again_after_an_error_of_the_transfers(model, monkeypatch):
    with Engine(model, **SMALL, expert_memory="0.3x") as engine:
        alone = engine.generate([[3, 4, 5]])[0].choices[0].tokens
        engine.restart()

        def broken(items, out_NQD):
            raise OSError("the disk is gone")

        object.__setattr__(engine.parts.transfers.host, "gather", broken)
        with pytest.raises(RuntimeError, match="the disk is gone"):
            engine.generate([[3, 4, 5]])
        with pytest.raises(RuntimeError, match="in the middle of a step .*the disk is gone"):
            engine.generate([[3, 4, 5]])
        engine.restart()
        assert engine.generate([[3, 4, 5]])[0].choices[0].tokens == alone
        check_empty(engine)


def test_a_refused_restart_changes_nothing(model):
    with Engine(model, **SMALL, expert_memory="0.3x") as engine:
        with pytest.raises(ConfigError, match="expert_memory|column"):
            engine.restart(mode="column")
        with pytest.raises(ConfigError, match="schedule"):
            engine.restart(schedule="nobody")
        assert engine.options.mode == "layer" and engine.generate([[3, 4, 5]])[0].choices[0].tokens
    with pytest.raises(ConfigError, match="closed"):
        engine.restart()


def test_news_that_nobody_waits_for_are_dropped(model):
    with Engine(model, **SMALL) as engine:
        with pytest.raises(DataError, match="prompts must be a text or a list, got int"):
            engine.generate(5)
        for _ in range(5):
            stream = engine.stream([3, 4, 5])
            next(stream)
            stream.close()

        def stop(update):
            raise LookupError

        with pytest.raises(LookupError):
            engine.generate([[3, 4, 5], [6]], on_update=stop)
        assert engine._news == [] and engine.generate([[3, 4, 5]])[0].choices[0].tokens
        check_empty(engine)


def test_a_recorder_hears_of_everything(model):
    recorder = Recorder()
    with Engine(model, **SMALL, expert_memory="0.3x", recorder=recorder) as engine:
        reasons = run(engine, np.random.default_rng(5), 30)
        stats = engine.stats()
    assert len(recorder.served) == len(reasons) and not recorder._times
    assert sum(served.cancelled for served in recorder.served) == reasons.count("cancelled")
    assert (
        len(recorder.steps) == stats["steps"]
        and sum(len(s.tokens) for s in recorder.served) == stats["tokens_generated"]
    )
    assert sum(s.prefill + s.decode for s in recorder.steps) == stats["tokens_run"]
    assert (
        sum(s.moved for s in recorder.steps) == stats["bytes_loaded"] == stats["bytes_demand"] + stats["bytes_prefetch"]
    )
    assert all(a.end <= b.end and a.start < a.end for a, b in zip(recorder.steps, recorder.steps[1:]))
    assert sum(stats[f"requests_{reason}"] for reason in set(reasons)) == len(reasons)


def test_another_pair_of_policies_on_the_same_device(model):
    with Engine(model, **SMALL, expert_memory="0.45x", schedule="fcfs", residency="lru") as engine:
        run(engine, np.random.default_rng(5), 15)
        first, runner = engine.stats(), engine.parts.runner
        engine.add_request([3, 4, 5])
        engine.step()
        recorder = Recorder()
        engine.restart(schedule="expert-aware", residency="lookahead", recorder=recorder)
        assert engine.parts.runner is runner and engine.unfinished == 0 and engine.stats()["steps"] == 0
        assert [update.reason for update in engine._news] == ["cancelled"]
        engine._news.clear()
        run(engine, np.random.default_rng(5), 15)
        assert len(recorder.steps) == engine.stats()["steps"] and first["steps"] > 0
        check_empty(engine)
        with pytest.raises(ConfigError, match="kv_page: cannot change while the programs stay"):
            engine.restart(kv_page=8)
