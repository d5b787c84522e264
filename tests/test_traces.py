"""Traces: files of every format and what is wrong with them, generated ones, real prompts, experts."""

import dataclasses
import json

import numpy as np
import pytest

from readme_jax.config import ConfigError, DataError
from readme_jax.packing import Records
from readme_jax.serving.request import SamplingParams
from readme_jax.serving.trace_files import RoutingRecorder, read_routing, read_trace, write_trace
from readme_jax.serving.traces import (
    ArrivalsConfig,
    RouterConfig,
    TraceRequest,
    arriving,
    as_request,
    at_rate,
    clip,
    generate,
    route,
    with_prompts,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:48.0000000,7,0
2023-11-16 18:15:47.6805900,12,3
"""
BURST = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,a,1.0,ChatGPT,472,18,490,Conversation log
45,b,1.0,ChatGPT,1087,230,1317,API log
46,b,1.0,GPT-4,10,0,10,API log
"""
SHARE = [
    {"id": "1", "conversations": [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}]},
    {"id": "2", "conversations": [{"from": "gpt", "value": "begins wrong"}]},
    {"id": "3", "conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "a"}]},
    {"id": "4", "conversations": [{"from": "user", "value": "a b c"}, {"from": "assistant", "value": "d e"}] * 2},
    {"id": "5", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "answer"}]},
]


def encode(text):
    return [len(word) for word in text.split()]


def lengths(trace):
    return [(round(r.arrival, 6), r.prompt_tokens, r.output_tokens) for r in trace]


def saved(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


# ---- files ----------------------------------------------------------------------------------------


def test_azure(tmp_path):
    trace = read_trace(saved(tmp_path, "a.csv", AZURE))
    assert lengths(trace) == [(0, 374, 44), (1, 12, 3), (4.314579, 396, 109)]
    zoned = AZURE.replace("00,", "00+00:00,").replace("90,", "90+00:00,")
    assert lengths(read_trace(saved(tmp_path, "b.csv", "\ufeff" + zoned))) == lengths(trace)


def test_burstgpt(tmp_path):
    assert lengths(read_trace(saved(tmp_path, "b.csv", BURST))) == [(0, 472, 18), (40, 1087, 230)]
    plain = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n3.5,GPT-4,1,2,3,API log\n"
    assert lengths(read_trace(saved(tmp_path, "c.csv", plain), kind="burstgpt")) == [(0, 1, 2)]


def test_sharegpt(tmp_path):
    trace = read_trace(saved(tmp_path, "s.json", SHARE), encode)
    assert [(r.arrival, r.prompt, r.output_tokens) for r in trace] == [(0, [3, 3], 1), (0, [1, 1, 1], 2)]


def test_our_own_format_comes_back(tmp_path):
    trace = [
        TraceRequest(0.0, 2, 5, prompt=[7, 8], session=3, domain="code"),
        TraceRequest(0.25, 10, 1),
    ]
    write_trace(tmp_path / "t.jsonl", trace)
    assert read_trace(tmp_path / "t.jsonl") == trace
    text = saved(tmp_path, "u.jsonl", '{"arrival": 1, "prompt": "ab c", "output_tokens": 4}\n\n')
    assert read_trace(text, encode) == [TraceRequest(0.0, 2, 4, prompt=[2, 1])]


JSONL = '{"arrival": 0, "prompt_tokens": 1, "output_tokens": 1}\n'


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", AZURE.replace("396", "3x6"), r"a\.csv:3: ContextTokens='3x6' must be a whole number of tokens"),
        ("a.csv", AZURE.replace("396,109", "396"), r"a\.csv:3: GeneratedTokens=None must be a whole"),
        ("a.csv", AZURE.replace(",374,", ",0,"), r"a\.csv:2: prompt_tokens=0 must be at least 1"),
        ("a.csv", AZURE.replace("16 18:15:50", "16 18:75:50"), r"a\.csv:3: TIMESTAMP='2023-11-16 18:75:.*' is neither"),
        ("a.csv", AZURE.replace("ContextTokens", "Tokens"), r"a\.csv:1: neither \.json, \.jsonl nor a CSV with"),
        ("a.csv", "", r"a\.csv:1: neither"),
        ("a.csv", AZURE.splitlines()[0], r"a\.csv: no request in it"),
        ("b.csv", BURST.replace("\n45", "\n-45"), r"b\.csv:3: arrival=-45\.0 must be a time of 0 s or later"),
        ("b.csv", BURST.replace("\n45", "\ninf"), r"b\.csv:3: arrival=inf must be"),
        ("t.jsonl", JSONL.replace("0", "1" + 400 * "0", 1), r"t\.jsonl:1: arrival=1000.* is too large"),
        ("t.jsonl", JSONL.replace("0", 5000 * "1", 1), r"t\.jsonl:1: not JSON: Exceeds the limit"),
        ("t.jsonl", JSONL + 100_000 * "[", r"t\.jsonl:2: not JSON"),
        ("s.json", 100_000 * "[", r"s\.json: not JSON"),
        ("t.jsonl", JSONL + "{", r"t\.jsonl:2: not JSON"),
        ("t.jsonl", JSONL + "\n[1]", r"t\.jsonl:3: not a JSON object"),
        ("t.jsonl", JSONL.replace("arrival", "time"), r"t\.jsonl:1: unknown time; known are arrival"),
        ("t.jsonl", JSONL.replace("0", '"0"', 1), r"t\.jsonl:1: arrival='0' must be a number of seconds"),
        ("t.jsonl", JSONL.replace("1}", "1.5}"), r"t\.jsonl:1: output_tokens=1\.5 must be a whole"),
        ("t.jsonl", JSONL.replace("1}", '1, "prompt": [1, 2]}'), r"t\.jsonl:1: prompt has 2 tokens, prompt_tokens=1"),
        ("t.jsonl", JSONL.replace("1}", '1, "prompt": [-1]}'), r"t\.jsonl:1: prompt=\[-1\] must be a text or a list"),
        ("t.jsonl", JSONL.replace("1}", '1, "prompt": "x"}'), r"t\.jsonl:1: the prompt is a text; a tokenizer"),
        ("t.jsonl", JSONL.replace("1}", '1, "session": "x"}'), r"t\.jsonl:1: session='x' must be a number"),
        ("s.json", '[{"id": 1}]', r"s\.json: conversation 1: has no list `conversations`"),
        ("s.json", '[\n{"id": ]', r"s\.json:2: not JSON"),
        ("s.json", "{}", r"s\.json:1: not a list of conversations"),
        ("s.json", SHARE, r"s\.json: conversation 1: the prompt is a text; a tokenizer is needed"),
    ],
)
def test_what_is_broken_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message) as caught:
        read_trace(saved(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_token_ids_of_another_vocabulary(tmp_path):
    path = saved(tmp_path, "t.jsonl", JSONL + JSONL.replace("1}", '1, "prompt": [7]}'))
    assert read_trace(path, vocab=8)[1].prompt == [7]
    with pytest.raises(DataError, match=r"t\.jsonl:2: token id 7 is outside the vocabulary of 7"):
        read_trace(path, vocab=7)


def test_other_bytes_and_no_file(tmp_path):
    (tmp_path / "x.csv").write_bytes(AZURE.encode() + b"\xff\xfe\n")
    with pytest.raises(DataError, match=r"x\.csv:6: not UTF-8 text"):
        read_trace(tmp_path / "x.csv")
    with pytest.raises(DataError, match="no such file"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="trace kind='other' is not one of azure, burstgpt, sharegpt, jsonl"):
        read_trace(tmp_path / "x.csv", kind="other")


# ---- generated ------------------------------------------------------------------------------------


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness):
    trace = generate(ArrivalsConfig(requests=20_000, rate=8.0, burstiness=burstiness, seed=1))
    gaps = np.diff([r.arrival for r in trace])
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)  # of a Gamma distribution
    assert np.mean([r.output_tokens for r in trace]) == pytest.approx(211, rel=0.03)
    assert np.log([r.prompt_tokens for r in trace]).std() == pytest.approx(0.99, rel=0.03)
    assert trace[0].arrival == 0 and len(trace) == 20_000


def test_equal_seeds_give_equal_traces():
    config = ArrivalsConfig(requests=50, rate=1.0, turns=2.0)
    assert generate(config) == generate(config)
    assert generate(config) != generate(dataclasses.replace(config, seed=1))


def test_sessions_grow_and_keep_the_rate():
    trace = generate(ArrivalsConfig(requests=5000, rate=5.0, turns=3.0, think=10.0, prompt_sigma=0, prompt_mean=100))
    by_session = {}
    for r in trace:
        by_session.setdefault(r.session, []).append(r)
    for turns in by_session.values():
        for before, after in zip(turns, turns[1:]):
            assert after.prompt_tokens == before.prompt_tokens + before.output_tokens + 100
    assert len(trace) / trace[-1].arrival == pytest.approx(5, rel=0.1)
    assert sum(r.arrival < trace[-1].arrival / 4 for r in trace) == pytest.approx(1250, rel=0.15)
    pauses = [b.arrival - a.arrival for turns in by_session.values() for a, b in zip(turns, turns[1:])]
    assert np.mean(pauses) == pytest.approx(10, rel=0.1)


def test_scaled_to_a_rate_the_pattern_stays():
    trace = [TraceRequest(float(t), 1, 1) for t in (0, 1, 5)]
    assert [r.arrival for r in at_rate(trace, 4.0)] == pytest.approx([0, 0.1, 0.5])
    with pytest.raises(DataError, match="a trace of 1 requests that all come at once has no rate"):
        at_rate(trace[:1], 4.0)
    with pytest.raises(ConfigError, match="rate=0 must be positive"):
        at_rate(trace, 0)
    times = [r.arrival for r in arriving([trace[0]] * 4001, 10.0, 0.5)]
    assert times[-1] == pytest.approx(400, rel=0.1) and times == sorted(times) and times[0] == 0


def test_clipped_to_the_context():
    trace = [TraceRequest(0.0, 90, 90, prompt=list(range(90))), TraceRequest(0.0, 10, 5), TraceRequest(0.0, 98, 2)]
    clipped = clip(trace, 99)
    assert [(r.prompt_tokens, r.output_tokens) for r in clipped] == [(50, 49), (10, 5), (97, 2)]
    assert clipped[0].prompt == list(range(50))
    with pytest.raises(ConfigError, match="context=1 must be at least 2"):
        clip(trace, 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"requests": 0}, "requests=0 must be at least 1"),
        ({"rate": 0.0}, "rate=0.0 must be positive"),
        ({"burstiness": -1.0}, "burstiness=-1.0 must be positive"),
        ({"turns": 0.5}, "turns=0.5 must be at least 1"),
        ({"output_sigma": 9.0}, "output_sigma=9.0 must be in"),
    ],
)
def test_the_generator_checks_its_numbers(change, message):
    with pytest.raises(ConfigError, match=message):
        ArrivalsConfig(**{"requests": 1, "rate": 1.0} | change)


# ---- prompts --------------------------------------------------------------------------------------


def records(first, rows=6, seq=8):
    """Ids count up from `first` over all records; the last two places of every record are padding."""
    ids_NT = np.arange(first, first + rows * seq, dtype=np.uint16).reshape(rows, seq)
    segments_NT = np.ones((rows, seq), np.uint16)
    segments_NT[:, -2:] = 0
    return Records(ids_NT, segments_NT)


def test_prompts_are_text_of_one_domain_without_padding():
    trace = [TraceRequest(0.0, count, 1) for count in (1, 6, 7, 30, 100)] * 5
    filled = with_prompts(trace, {"a": records(0), "b": records(1000)}, seed=3)
    for asked, r in zip(trace, filled):
        assert len(r.prompt) == asked.prompt_tokens == r.prompt_tokens
        assert all((token >= 1000) == (r.domain == "b") and token % 8 < 6 for token in r.prompt)
        steps = set(np.diff(r.prompt[:36]))
        assert steps <= {1, 3, -45}  # on in the record, on in the next one, on from the last to the first
    assert {r.domain for r in filled} == {"a", "b"}
    assert filled == with_prompts(trace, {"a": records(0), "b": records(1000)}, seed=3)
    assert {r.domain for r in with_prompts(trace, {"a": records(0), "b": records(9)}, weights={"a": 0})} == {"b"}


def test_prompts_of_a_session_begin_alike_and_given_ones_stay():
    trace = [
        TraceRequest(0.0, 5, 1, session=1),
        TraceRequest(1.0, 20, 1, session=1),
        TraceRequest(2.0, 1, 1, prompt=[9]),
    ]
    first, second, third = with_prompts(trace, {"a": records(0), "b": records(1000)})
    assert second.prompt[:5] == first.prompt and third.prompt == [9] and third.domain is None


def test_text_that_is_not_there():
    trace = [TraceRequest(0.0, 5, 1)]
    with pytest.raises(DataError, match="needs records"):
        with_prompts(trace, {})
    with pytest.raises(DataError, match="domain a has no records"):
        with_prompts(trace, {"a": Records(np.zeros((0, 8), np.uint16), np.zeros((0, 8), np.uint16))})
    with pytest.raises(DataError, match="domain a has records of padding only"):
        with_prompts(trace, {"a": Records(np.zeros((2, 8), np.uint16), np.zeros((2, 8), np.uint16))})
    with pytest.raises(ConfigError, match=r"weights of \['z'\]: the domains are a"):
        with_prompts(trace, {"a": records(0)}, weights={"z": 1})


def test_a_trace_becomes_requests_of_the_engine():
    r = as_request(TraceRequest(2.5, 2, 9, prompt=[4, 5]), SamplingParams(temperature=0.5, seed=3))
    assert (r.prompt, r.arrival) == ([4, 5], 2.5)
    assert (r.sampling.max_new_tokens, r.sampling.ignore_eos, r.sampling.temperature) == (9, True, 0.5)
    with pytest.raises(DataError, match="has no prompt"):
        as_request(TraceRequest(2.5, 2, 9), SamplingParams())


# ---- experts --------------------------------------------------------------------------------------


def test_the_made_up_router_keeps_its_two_numbers():
    config = RouterConfig(experts=5, stay=0.6, zipf=1.0, domains=1, seed=2)
    trace = [TraceRequest(0.0, 1500, 500)] * 40
    routed = list(route(trace, config))
    experts = np.stack([np.concatenate([r.prompt_experts, r.output_experts]) for r in routed])
    assert experts.shape == (40, 2000) and experts.dtype == np.int16 and len(routed[0].prompt_experts) == 1500
    assert (experts[:, 1:] == experts[:, :-1]).mean() == pytest.approx(0.6, abs=0.01)
    shares = np.sort(np.bincount(experts.ravel(), minlength=5) / experts.size)[::-1]
    assert shares == pytest.approx(config.popularity, abs=0.015)


def test_domains_and_sessions_have_their_own_popular_experts():
    config = RouterConfig(experts=8, stay=0.8, zipf=3.0, domains=50)
    trace = [TraceRequest(0.0, 200, 1, domain=name) for name in "abcabcabc"] + [
        TraceRequest(0.0, 200, 1, session=number) for number in (1, 2, 1, 2)
    ]
    most = [np.bincount(r.prompt_experts).argmax() for r in route(trace, config)]
    assert most[:3] == most[3:6] == most[6:9] and len(set(most[:3])) > 1 and most[9:11] == most[11:]
    assert {int(e) for r in route(trace, RouterConfig(experts=1, stay=1.0)) for e in r.prompt_experts} == {0}


@pytest.mark.parametrize("change, message", [({"stay": 0.1}, r"must be in \[0\.1"), ({"experts": 0}, "experts=0 must")])
def test_the_router_checks_its_numbers(change, message):
    with pytest.raises(ConfigError, match=message):
        RouterConfig(**change)


def test_a_routing_trace_is_recorded_and_read(tmp_path):
    r = as_request(TraceRequest(2.5, 2, 3, prompt=[4, 5]), SamplingParams())
    r.tokens += [6, 7, 8]
    r.experts = [0, 1, 1, 3, 2]
    cancelled = as_request(TraceRequest(2.5, 2, 3, prompt=[4, 5]), SamplingParams())
    made = next(route([TraceRequest(1.0, 4, 2)], RouterConfig(experts=4)))
    with RoutingRecorder(tmp_path / "r.jsonl", 4) as recorder:
        recorder.add(r)
        recorder.add(cancelled)
        recorder.write(made)
    experts, (first, second) = read_routing(tmp_path / "r.jsonl")
    assert experts == 4 and (first.arrival, second.arrival) == (1.0, 2.5)
    assert np.array_equal(first.prompt_experts, made.prompt_experts) and first.prompt_experts.dtype == np.int16
    assert second.prompt_experts.tolist() == [0, 1] and second.output_experts.tolist() == [1, 3, 2]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"arrival": 0}', r"r\.jsonl:1: a routing trace begins with \{'experts': number\}"),
        ('{"experts": 2}', r"r\.jsonl: no request in it"),
        (
            '{"experts": 2}\n{"arrival": 0, "prompt": [2], "output": [0]}',
            r"r\.jsonl:2: prompt=\[2\] must be .* in 0..1",
        ),
        ('{"experts": 2}\n{"arrival": 0, "prompt": [1]}', r"r\.jsonl:2: output=None must be a list of experts"),
        ('{"experts": 2}\n{"prompt": [1], "output": [1]}', r"r\.jsonl:2: arrival=None must be a time"),
        ('{"experts": 2}\n{"arr', r"r\.jsonl:2: not JSON"),
        (
            '{"experts": 2}\n{"arrival": 1%s, "prompt": [1], "output": [1]}' % (400 * "0"),
            r"r\.jsonl:2: arrival=1000.* is too large",
        ),
    ],
)
def test_a_broken_routing_trace_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_routing(saved(tmp_path, "r.jsonl", text))
