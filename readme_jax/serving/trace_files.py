"""Traces in files: Azure and BurstGPT (CSV), ShareGPT (JSON), our own JSONL; and routing traces.

Our JSONL has one request a line: {"arrival": seconds, "prompt_tokens": n, "output_tokens": n} and, if known, "prompt"
(token ids or text, which then gives prompt_tokens), "session" (a number), "domain". A routing trace has the number of
experts on its first line, {"experts": E}, then one request a line: {"arrival", "prompt": experts, "output": experts}.
"""

import csv
import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO, get_args

import numpy as np

from readme_jax.config import DataError, require
from readme_jax.serving.request import Request
from readme_jax.serving.traces import RoutedRequest, TraceRequest, from_zero

Kind = Literal["azure", "burstgpt", "sharegpt", "jsonl"]
Encode = Callable[[str], list[int]]

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, as Python marks them
BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")


def read_trace(
    path: str | Path, encode: Encode | None = None, kind: Kind | None = None, vocab: int | None = None
) -> list[TraceRequest]:
    """The requests of a file, by arrival, the first at 0 s.

    kind: of the file; else told from its name and first line. encode: text -> token ids, for files that hold texts.
    vocab: token ids that the model has. Rows of a CSV with an output of 0 tokens failed when the trace was taken and
    are left out. ShareGPT has no times: all
    arrive at 0 s (`traces.arriving`). DataError, with file and line, for what is broken or empty.
    """
    path = Path(path)
    require(kind is None or kind in get_args(Kind), f"trace kind={kind!r} is not one of {', '.join(get_args(Kind))}")
    require(path.is_file(), f"{path}: no such file (trace)", DataError)
    kind = kind or _kind(path)
    if kind == "sharegpt":
        trace = list(_sharegpt(path, encode))
    elif kind == "jsonl":
        trace = [_own(row, f"{path}:{line}", encode, vocab) for line, row in _lines(path)]
    else:
        trace = list(_csv(path, AZURE if kind == "azure" else BURSTGPT))
    require(bool(trace), f"{path}: no request in it", DataError)
    return from_zero(trace)


def write_trace(path: str | Path, trace: Iterable[TraceRequest]) -> None:
    """The trace as our JSONL."""
    names = ("arrival", "prompt_tokens", "output_tokens", "prompt", "session", "domain")
    with open(path, "w", encoding="utf-8") as file:
        for request in trace:
            row = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
            file.write(json.dumps(row) + "\n")


def _kind(path: Path) -> Kind:
    if path.suffix == ".jsonl":
        return "jsonl"
    if path.suffix == ".json":
        return "sharegpt"
    with _open(path) as file:
        header = [name.strip() for name in file.readline().split(",")]
    if set(AZURE) <= set(header):
        return "azure"
    if set(BURSTGPT) <= set(header):
        return "burstgpt"
    known = f"{', '.join(AZURE)} (Azure) or {', '.join(BURSTGPT)} (BurstGPT)"
    raise DataError(f"{path}:1: neither .json, .jsonl nor a CSV with the columns {known}")


def _open(path: Path) -> TextIO:
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _checked(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of a file, if they are text: the decoder reads ahead and could not tell which line is not."""
    for line, text in enumerate(file, 1):
        require(text.isascii() or not _ESCAPED.search(text), f"{path}:{line}: not UTF-8 text", DataError)
        yield text


def _csv(path: Path, columns: tuple[str, str, str]) -> Iterator[TraceRequest]:
    with _open(path) as file:
        rows = csv.DictReader(_checked(file, path), skipinitialspace=True, strict=True)
        try:
            lacking = [name for name in columns if name not in (rows.fieldnames or ())]
            require(not lacking, f"{path}:1: no column {', '.join(lacking)}", DataError)
            for row in rows:
                where = f"{path}:{rows.line_num}"
                time = _seconds(row[columns[0]], where, columns[0])
                prompt, output = (_whole(row[name], where, name) for name in columns[1:])
                if output:
                    yield _request(where, time, prompt, output)
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num + 1}: {error}") from None


def _seconds(text: str | None, where: str, name: str) -> float:
    """A number of seconds, or a date and time (of UTC, where it does not say)."""
    try:
        return float(text or "")
    except ValueError:
        pass
    try:
        time = datetime.datetime.fromisoformat(text or "")
        return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()
    except ValueError:
        raise DataError(f"{where}: {name}={_short(text)} is neither seconds nor a date and time") from None


def _whole(text: Any, where: str, name: str) -> int:
    try:
        number = float(text)
        good = number == int(number) and number >= 0
    except (TypeError, ValueError, OverflowError):
        good, number = False, 0.0
    require(good, f"{where}: {name}={_short(text)} must be a whole number of tokens", DataError)
    return int(number)


def _request(where: str, arrival: float, asked: int, answered: int, **more: Any) -> TraceRequest:
    try:
        return TraceRequest(arrival, asked, answered, **more)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 40 else repr(value)[:37] + "..."


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, object) of a JSONL file; empty lines are left out."""
    with _open(path) as file:
        for line, text in enumerate(_checked(file, path), 1):
            if text.strip():
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{line}: not JSON: {getattr(error, 'msg', error)}") from None
                require(isinstance(row, dict), f"{path}:{line}: not a JSON object", DataError)
                yield line, row


def _arrival(value: float, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise DataError(f"{where}: arrival={_short(value)} is too large") from None


def _own(row: Mapping[str, Any], where: str, encode: Encode | None, vocab: int | None) -> TraceRequest:
    known = {"arrival", "prompt_tokens", "output_tokens", "prompt", "session", "domain"}
    unknown = sorted(set(row) - known)
    require(not unknown, f"{where}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}", DataError)
    arrival, prompt, session, domain = (row.get(name) for name in ("arrival", "prompt", "session", "domain"))
    number = isinstance(arrival, int | float) and not isinstance(arrival, bool)
    require(number, f"{where}: arrival={_short(arrival)} must be a number of seconds", DataError)
    if isinstance(prompt, str):
        prompt = _encoded(prompt, where, encode)
    if prompt is not None:
        good = isinstance(prompt, list) and all(type(token) is int and token >= 0 for token in prompt)
        require(good, f"{where}: prompt={_short(prompt)} must be a text or a list of token ids", DataError)
        highest = max(prompt, default=0)
        fits = vocab is None or highest < vocab
        require(fits, f"{where}: token id {_short(highest)} is outside the vocabulary of {vocab}", DataError)
        count = _whole(row.get("prompt_tokens", len(prompt)), where, "prompt_tokens")
    else:
        count = _whole(row.get("prompt_tokens"), where, "prompt_tokens")
    output = _whole(row.get("output_tokens"), where, "output_tokens")
    require(session is None or type(session) is int, f"{where}: session={_short(session)} must be a number", DataError)
    require(domain is None or isinstance(domain, str), f"{where}: domain={_short(domain)} must be a name", DataError)
    assert arrival is not None
    return _request(where, _arrival(arrival, where), count, output, prompt=prompt, session=session, domain=domain)


def _encoded(text: str, where: str, encode: Encode | None) -> list[int]:
    require(encode is not None, f"{where}: the prompt is a text; a tokenizer is needed to read it", DataError)
    assert encode is not None
    return list(encode(text))


def _sharegpt(path: Path, encode: Encode | None) -> Iterator[TraceRequest]:
    """The first question of each conversation as the prompt, the length of the answer as the output's.

    Conversations that do not begin with both are left out, as are empty ones (`vllm bench serve` does the same).
    """
    with _open(path) as file:
        try:
            conversations = json.loads("".join(_checked(file, path)))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON: {error}") from None
    require(isinstance(conversations, list), f"{path}:1: not a list of conversations (ShareGPT)", DataError)
    for number, conversation in enumerate(conversations, 1):
        where = f"{path}: conversation {number}"
        turns: Any = conversation.get("conversations") if isinstance(conversation, dict) else None
        require(isinstance(turns, list), f"{where}: has no list `conversations`", DataError)
        turns = [turn for turn in turns if not (isinstance(turn, dict) and turn.get("from") == "system")][:2]
        for turn in turns:
            good = isinstance(turn, dict) and isinstance(turn.get("value"), str)
            require(good, f"{where}: {_short(turn)} is not a turn with `from` and `value`", DataError)
        if [turn.get("from") for turn in turns] in (["human", "gpt"], ["user", "assistant"]):
            prompt, answer = (_encoded(turn["value"], where, encode) for turn in turns)
            if prompt and answer:
                yield _request(where, 0.0, len(prompt), len(answer), prompt=prompt)


# ---- routing --------------------------------------------------------------------------------------


class RoutingRecorder:
    """Writes a routing trace, request by request as they finish; a context manager.

    experts: of the model. Arrivals are kept as they are.
    """

    def __init__(self, path: str | Path, experts: int):
        self._file = open(path, "w", encoding="utf-8")
        self._file.write(json.dumps({"experts": experts}) + "\n")

    def add(self, request: Request) -> None:
        """A request of an engine that has ended. One that was cancelled before its first token is left out."""
        experts, prompt = np.array(request.experts, np.int16), len(request.prompt)
        if request.generated:
            self.write(RoutedRequest(request.arrival, experts[:prompt], experts[prompt:]))

    def write(self, routed: RoutedRequest) -> None:
        """One more line."""
        lists = {"prompt": routed.prompt_experts.tolist(), "output": routed.output_experts.tolist()}
        self._file.write(json.dumps({"arrival": routed.arrival, **lists}) + "\n")

    def __enter__(self) -> "RoutingRecorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._file.close()


def read_routing(path: str | Path) -> tuple[int, list[RoutedRequest]]:
    """(experts, requests by arrival) of a routing trace. DataError, with file and line, for what is broken or empty."""
    path = Path(path)
    require(path.is_file(), f"{path}: no such file (routing trace)", DataError)
    experts, requests = 0, []
    for line, row in _lines(path):
        where = f"{path}:{line}"
        if not experts:
            good = type(row.get("experts")) is int and 1 <= row["experts"] <= 32767
            require(good, f"{where}: a routing trace begins with {{'experts': number}}, not {_short(row)}", DataError)
            experts = row["experts"]
            continue
        arrival: Any = row.get("arrival")
        good = type(arrival) in (int, float) and 0 <= arrival < float("inf")
        require(good, f"{where}: arrival={_short(arrival)} must be a time of 0 s or later", DataError)
        lists = (_experts(row.get(name), experts, where, name) for name in ("prompt", "output"))
        requests.append(RoutedRequest(_arrival(arrival, where), *lists))
    require(bool(requests), f"{path}: no request in it", DataError)
    return experts, sorted(requests, key=lambda request: request.arrival)


def _experts(values: Any, experts: int, where: str, name: str) -> np.ndarray:
    good = isinstance(values, list) and len(values) > 0
    good = good and all(type(value) is int and 0 <= value < experts for value in values)
    require(good, f"{where}: {name}={_short(values)} must be a list of experts in 0..{experts - 1}", DataError)
    return np.array(values, np.int16)
