"""The serving engine: requests in, text out. A step: route what arrived, choose a batch, plan its pages, run, sample.

    with Engine("runs/tuned", expert_memory="0.5x") as engine:
        print(engine.generate("The capital of France is", SamplingParams(max_new_tokens=8)).text)

The router runs on arrival for the whole prompt and on each sampled token, so the experts of everything that waits are
known before the layers run: the scheduler batches by them, the residency evicts by them, transfers go ahead of their
use. One engine belongs to one thread. Greedy output depends on none of the options.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from readme_jax import api
from readme_jax.config import DataError, require
from readme_jax.serving.options import EngineOptions
from readme_jax.serving.outputs import Choice, Completion, Update, Usage
from readme_jax.serving.parts import Parts
from readme_jax.serving.recorder import Recorder
from readme_jax.serving.request import Batch, Reason, Request, SamplingParams
from readme_jax.serving.sampling import Score
from readme_jax.serving.text import TextStream, decoder_of

Prompt = str | Sequence[int]
DEPTH = 2  # batches on the device at most: the results of one are fetched while the next one runs


@dataclasses.dataclass(slots=True)
class _Asked:
    """One `add_request`. open: its requests that have not ended. later: choices that start when the first one's prompt
    lies in the pages, so that it is computed once."""

    id: int
    sampling: SamplingParams
    stop: frozenset[int]
    open: dict[Request, TextStream]
    later: list[Request]


class _Growing:
    """The continuations of one request as their news come in."""

    def __init__(self, prompt: list[int], sampling: SamplingParams):
        self.prompt, self.sampling = prompt, sampling
        self.updates: list[list[Update]] = [[] for _ in range(sampling.n)]

    def done(self) -> Completion:
        return Completion(self.prompt, [self._choice(updates) for updates in self.updates])

    def _choice(self, updates: list[Update]) -> Choice:
        reason, usage = updates[-1].reason, updates[-1].usage
        assert reason is not None and usage is not None
        text, tokens = "".join([u.text for u in updates]), [t for u in updates for t in u.tokens]
        scores = None if self.sampling.logprobs is None else [s for u in updates for s in u.scores]
        return Choice(text, tokens, reason, usage, scores)


class Engine:
    """Serves one carved model on one device, or with its experts spread over several (`mesh_expert`).

    model: folder, hub name or a loaded `api.Model`. options: those of `EngineOptions`, by name. Programs are compiled
    when the engine is made (progress: with a bar), none afterwards. recorder: is told of every step and request.
    ConfigError for options, among them a budget below the least that works, and for models without experts.
    """

    def __init__(
        self,
        model: str | Path | api.Model,
        *,
        progress: bool = False,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **options: Any,
    ):
        known = {f.name for f in dataclasses.fields(EngineOptions)}
        for name in options:
            require(name in known, f"{name}: no such option of Engine; known: {', '.join(sorted(known))}")
        self.options = EngineOptions(**options)
        self.model = api.load(model, weights=False) if isinstance(model, str | Path) else model
        self.clock, self.recorder = clock, recorder
        self.parts = Parts(self.model, self.options, progress, recorder)
        self._decode = decoder_of(self.model.tokenizer)
        self._ids = itertools.count()
        self._asked: dict[int, _Asked] = {}
        self._of: dict[Request, _Asked] = {}
        self._flying: collections.deque[tuple[Batch, Any, dict]] = collections.deque()
        self._news: list[Update] = []
        self._followed: set[int] = set()  # whose news are for a stream
        self._closed, self._stuck = False, 0
        self._broken: str | None = None  # what stopped it in the middle of a step

    # ---- what a user calls ------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = False,
        on_update: Callable[[Update], None] | None = None,
    ) -> Any:
        """Continue prompts: a `Completion` for a text, a list of them for a list of texts or of lists of token ids.

        sampling: one for all or one each. chat: texts are a user's turn. on_update: called with the news as they come.
        Requests added before go on meanwhile. DataError before any work for what cannot be served.
        """
        single = isinstance(prompts, str)
        rule = f"prompts must be a text or a list, got {type(prompts).__name__}"
        require(single or hasattr(prompts, "__iter__"), rule, DataError)
        items: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        require(bool(items), "no prompt given", DataError)
        many = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(items)
        require(len(many) == len(items), f"{len(many)} sampling options for {len(items)} prompts", DataError)
        checked = [self._check(prompt, some, chat) for prompt, some in zip(items, many)]
        growing = {self._add(prompt, some): _Growing(prompt, some) for prompt, some in zip(checked, many)}
        try:
            for update in self._follow(set(growing)):
                growing[update.id].updates[update.choice].append(update)
                if on_update is not None:
                    on_update(update)
        except BaseException:
            self._abandon(set(growing))
            raise
        made = [one.done() for one in growing.values()]
        return made[0] if single else made

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None, *, chat: bool = False) -> Iterator[Update]:
        """The news of one request as they come, from when the first is asked for; DataError at once for what cannot be
        served. It is cancelled when the iterator is closed before its end."""
        sampling = sampling or SamplingParams()
        return self._stream(self._check(prompt, sampling, chat), sampling)

    def _stream(self, prompt: list[int], sampling: SamplingParams) -> Iterator[Update]:
        number = self._add(prompt, sampling)
        try:
            yield from self._follow({number})
        finally:
            self._abandon({number})

    def _abandon(self, ids: set[int]) -> None:
        """Cancel what is left of these requests, and their news: nobody waits for them."""
        for number in ids:
            self.cancel(number)
            if number in self._asked:  # of a broken engine
                for request in self._asked.pop(number).open:
                    del self._of[request]
        self._news = [update for update in self._news if update.id not in ids]

    def add_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        chat: bool = False,
        arrival: float | None = None,
    ) -> int:
        """Queue a request; its id in the updates of `step`. arrival: seconds of the engine's clock, now if None.
        DataError for what cannot be served."""
        sampling = sampling or SamplingParams()
        return self._add(self._check(prompt, sampling, chat), sampling, arrival)

    def step(self) -> list[Update]:
        """Go one step on; the news since the last call, but for those that a `stream` or `generate` waits for.

        Call it while `unfinished`. Raises what went wrong in the thread of the transfers. What stops a step, Ctrl-C
        too, leaves pages half loaded: the engine then refuses all work until `restart`.
        """
        self._advance()
        news = [update for update in self._news if update.id not in self._followed]
        self._news = [update for update in self._news if update.id in self._followed]
        return news

    def cancel(self, number: int) -> bool:
        """End a request where it is; False when there is none, or no longer. Its last news come with the next step."""
        asked = self._asked.get(number)
        if asked is None or self._broken is not None:
            return False
        for request, stream in [*asked.open.items()]:
            self._end(request, "cancelled", Update(number, request.choice, stream.finish(), ()))
        return True

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._asked)

    def stats(self) -> dict[str, Any]:
        """Counters since the engine was made or restarted: bytes by reason, hits, waits, times (docs/serving.md)."""
        return self.parts.stats()

    def restart(self, *, recorder: Recorder | None = None, **changes: Any) -> None:
        """Begin anew, with other policies on the same device memory and programs: what is left is cancelled, pages are
        empty, counters at zero. Whoever follows it gets a last update that says so. changes: of the options schedule,
        residency, mode, max_wait, lookahead and ahead. What is refused changes nothing. An engine that an error stopped
        works again."""
        for name in changes:
            good = name in ("schedule", "residency", "mode", "max_wait", "lookahead", "ahead")
            require(good, f"{name}: cannot change while the programs stay; make another Engine")
        require(not self._closed, "the engine is closed")
        options = dataclasses.replace(self.options, **changes)
        self.parts.check(options)
        self._stop()
        self.options, self.recorder, self._broken, self._stuck = options, recorder, None, 0
        self.parts.begin(self.options, recorder)

    def _stop(self) -> None:
        if self._broken is None:
            for number in [*self._asked]:
                self.cancel(number)
            while self._flying:
                self._land()
        else:  # pages and plan are not to be trusted, texts are
            for request, asked in self._of.items():
                last = Update(asked.id, request.choice, asked.open[request].finish(), ())
                self._news.append(dataclasses.replace(last, reason="cancelled", usage=self._usage(request, 0)))
        for left in (self._asked, self._of, self._flying):
            left.clear()
        self.parts.stop()

    def close(self) -> None:
        """Cancel what is left, end the transfer thread and let the device memory go. May be called twice."""
        if not self._closed:
            self._closed = True
            self._stop()
            self.parts.runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- requests come ----------------------------------------------------------------------------

    def _check(self, prompt: Prompt, sampling: SamplingParams, chat: bool) -> list[int]:
        """Token ids of a prompt that can be served."""
        self._ready()
        require(isinstance(sampling, SamplingParams), f"sampling must be SamplingParams, got {type(sampling).__name__}")
        if isinstance(prompt, str):
            ids = self.model.encode(prompt, chat)
        else:
            require(not chat, "chat=True needs text prompts", DataError)
            ids = api.whole_numbers(prompt, "a prompt must be a text or a list of token ids")
        require(len(ids) > 0, "the prompt is empty", DataError)
        vocab, context, room = self.model.config.vocab, self.parts.context, sampling.max_new_tokens
        bad = max(ids) if max(ids) >= vocab else min(ids)
        require(0 <= bad < vocab, f"token id {bad} is outside the vocabulary of {vocab}", DataError)
        message = f"{len(ids)} tokens + max_new_tokens={room} exceed the context of {context}"
        require(len(ids) + room <= context, message, DataError)
        self.parts.check_room(len(ids) + room)
        return ids

    def _add(self, prompt: list[int], sampling: SamplingParams, arrival: float | None = None) -> int:
        now, number = self.clock() if arrival is None else arrival, next(self._ids)
        stop = frozenset(sampling.stop_tokens) | (frozenset() if sampling.ignore_eos else self.model.stop_tokens)
        requests = [Request(prompt, sampling, now, choice) for choice in range(sampling.n)]
        streams = {request: TextStream(self._decode, sampling.stop) for request in requests}
        asked = _Asked(number, sampling, stop, streams, requests[1:])
        self.parts.arrive(requests[0])
        self._asked[number] = asked
        self._of |= dict.fromkeys(requests, asked)
        return number

    def _follow(self, ids: set[int]) -> Iterator[Update]:
        """News of these requests until all have ended; those of others are kept."""
        self._followed |= ids
        try:
            while True:
                mine = [update for update in self._news if update.id in ids]
                self._news = [update for update in self._news if update.id not in ids]
                yield from mine
                if not self._asked.keys() & ids and not any(update.id in ids for update in self._news):
                    return
                self._advance()
        finally:
            self._followed -= ids

    # ---- a step -----------------------------------------------------------------------------------

    def _ready(self) -> None:
        require(not self._closed, "the engine is closed")
        if self._broken is not None:
            raise RuntimeError(f"the engine stopped in the middle of a step ({self._broken}); restart() begins anew")

    def _advance(self) -> None:
        """One step. Whatever ends it early leaves plan and device apart, so that nothing may follow."""
        self._ready()
        try:
            self._advance_once()
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise

    def _advance_once(self) -> None:
        start, parts, news = time.perf_counter(), self.parts, len(self._news)
        parts.route(idle=not self._flying)
        launched = False
        # A second batch goes out before the first is back only if there is more than enough for it: half batches that
        # take turns read the weights twice as often.
        if not self._flying or len(self._flying) < DEPTH and parts.full():
            launched = self._launch()
        if self._flying and (not launched or len(self._flying) == DEPTH or not parts.full()):
            self._land()
        quiet = not launched and not self._flying and not parts.waiting and len(self._news) == news
        stuck = self._of and quiet
        self._stuck = self._stuck + 1 if stuck else 0
        if self._stuck > 2:  # must not be: rather an error than a loop that never ends
            raise RuntimeError(f"{len(self._asked)} requests wait and none can run")
        parts.counters.step_s += time.perf_counter() - start

    def _launch(self) -> bool:
        """Choose a batch and send it to the device; False when nothing can run now."""
        now = self.clock()
        launched = self.parts.launch(now)
        if launched is None:
            return False
        batch, handle, seen = launched
        self._flying.append((batch, handle, seen | {"start": now, "live": len(self._of)}))
        return True

    def _land(self) -> None:
        """Fetch the results of the oldest batch and pass them on."""
        batch, handle, seen = self._flying.popleft()
        results = self.parts.land(handle)
        now = self.clock()
        got = self.parts.complete(batch, results, now)
        of_request = {work.request: result for work, result in zip(batch.works, results) if result is not None}
        for request in got:
            self._token(request, of_request[request])
        if self.recorder is not None:
            self.recorder.step(**seen, end=now)

    def _token(self, request: Request, result: Score) -> None:
        """A request has a new token: text, and whether it ends."""
        asked = self._of[request]
        stream, sampling, token = asked.open[request], asked.sampling, result.token
        if request.choice == 0 and asked.later:
            for other in asked.later:
                self.parts.arrive(other)
            asked.later.clear()
        reason: Reason | None = None
        if token in asked.stop:
            reason, text, tokens = "stop", stream.finish(), ()
        else:
            text, tokens = stream.add(token), (token,)
            reason = "length" if request.generated >= sampling.max_new_tokens else None
            text += stream.finish() if reason else ""
            reason = "stop" if stream.stopped else reason
        scores = (result,) if sampling.logprobs is not None and tokens else ()
        update = Update(asked.id, request.choice, text, tokens, scores)
        if self.recorder is not None:
            self.recorder.token(request)
        if reason is None:
            self._news.append(update)
        else:
            self._end(request, reason, update)

    def _end(self, request: Request, reason: Reason, update: Update) -> None:
        """The request ends with this news."""
        asked = self._of.pop(request)
        del asked.open[request]
        if request in asked.later:
            asked.later.remove(request)
        if not asked.open:
            del self._asked[asked.id]
        usage = self._usage(request, self.parts.leave(request, reason))
        self._news.append(dataclasses.replace(update, reason=reason, usage=usage))
        if self.recorder is not None:
            self.recorder.ended(request)

    def _usage(self, request: Request, cached: int) -> Usage:
        """What a request took that ends now; cached: tokens of its prompt that were known."""
        taken = collections.Counter(request.experts[: request.computed])
        first = None if request.first_token is None else request.first_token - request.arrival
        return Usage(
            len(request.prompt), request.generated, cached, dict(taken), request.preempted, first,
            self.clock() - request.arrival,
        )  # fmt: skip
