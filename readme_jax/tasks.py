"""A model of this package as an lm-evaluation-harness model: log-likelihoods and greedy text, routed where it routes.

Needs the extra `tasks`; tokens, truncation and stop strings are those of the harness's own HFLM.
"""

import functools
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.api import Model, hidden
from readme_jax.config import ConfigError, DataError, require
from readme_jax.metrics import progress
from readme_jax.models import backbone
from readme_jax.routing import bucket

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
except ImportError:
    raise ConfigError('tasks: lm_eval is not installed; pip install -e ".[tasks]"') from None

WIDTH_STEP = 16  # texts are padded to a ladder of lengths: most are shorter than 64 tokens
TARGET_STEP = 16  # scored positions are padded to a ladder of multiples of this; the head runs on so many at a time
GENERATED = 256  # tokens to generate at most where a task names no limit, as in the harness
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature"}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(cfg, router_cfg, weights, ids_BT, segments_BT, place_BK, target_BK):
    """(log-probability [B, K] of each target after the position `place`, whether it is the likeliest token)."""
    x_BTD = hidden(cfg, router_cfg, weights, ids_BT, segments_BT)
    x_BKD = jnp.take_along_axis(x_BTD, place_BK[:, :, None], axis=1)
    logp, greedy = [], []
    for start in range(0, place_BK.shape[1], TARGET_STEP):  # logits of the whole text are never held at once
        target_BC = target_BK[:, start : start + TARGET_STEP]
        logits_BCV = backbone.unembed(weights["params"], x_BKD[:, start : start + TARGET_STEP])
        chosen_BC = jnp.take_along_axis(logits_BCV, target_BC[:, :, None], axis=2)[:, :, 0]
        logp.append(chosen_BC - jax.nn.logsumexp(logits_BCV, -1))
        greedy.append(jnp.argmax(logits_BCV, -1) == target_BC)
    return jnp.concatenate(logp, 1), jnp.concatenate(greedy, 1)


class _Stopped(Exception):
    """Every row of a batch has come to a stop string."""


class TaskModel(TemplateLM):
    """A loaded model for `lm_eval.simple_evaluate`. batch: rows of one forward pass, split over the devices of the
    model's mesh. tokens counts what was run, without padding."""

    def __init__(self, model: Model, batch: int = 8):
        super().__init__()
        require(batch >= 1, f"batch={batch} must be at least 1")
        self.model, self.batch, self.tokens = model, batch, 0
        self.tokenizer = model.tokenizer
        self.max_length = model.config.max_position

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text without context: the tokenizer's first token, or its last."""
        bos = self.tokenizer.bos_token_id
        found = self.eot_token_id if bos is None else bos
        require(found is not None, f"{self.model.folder}: the tokenizer has neither a bos nor an eos token", DataError)
        return found

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.folder).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless told or the text starts with the prefix."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each (texts, context ids, continuation ids)."""
        rows = []
        for texts, context, target in requests:
            require(len(context) > 0 and len(target) > 0, f"no tokens to score in {str(texts)[:80]!r}", DataError)
            fits = len(target) <= self.max_length
            require(fits, f"{len(target)} tokens to score exceed the context of {self.max_length}", DataError)
            ids = [*context, *target][-(self.max_length + 1) :]
            rows.append((ids[:-1], target))
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]), rows[i]))
        out: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with progress(len(rows), "score", unit="texts") as bar:
            for start in range(0, len(order), self.batch):
                chosen = order[start : start + self.batch]
                for i, result in zip(chosen, self._score_rows([rows[i] for i in chosen])):
                    out[i] = result
                bar.update(len(chosen))
        for (texts, _, _), result in zip(requests, out):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return out

    def _score_rows(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        width = bucket(max(len(ids) for ids, _ in rows), WIDTH_STEP)
        scored = bucket(max(len(target) for _, target in rows), TARGET_STEP)
        ids_BT, segments_BT = np.zeros((2, self.batch, width), np.int32)
        place_BK, target_BK = np.zeros((2, self.batch, scored), np.int32)
        segments_BT[:, 0] = 1  # rows that fill the batch hold one token
        for row, (ids, target) in enumerate(rows):
            ids_BT[row, : len(ids)] = ids
            segments_BT[row, : len(ids)] = 1
            place_BK[row, : len(target)] = np.arange(len(ids) - len(target), len(ids))
            target_BK[row, : len(target)] = target
            self.tokens += len(ids)
        logp_BK, greedy_BK = self.model.run(_score, ids_BT, segments_BT, place_BK, target_BK)
        counts = [len(target) for _, target in rows]
        return [
            (float(logp_BK[r, :n].sum(dtype=np.float64)), bool(greedy_BK[r, :n].all())) for r, n in enumerate(counts)
        ]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows as long as the context that overlap by one token."""
        windows, owner = [], []
        for i, request in enumerate(requests):
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, target in map(utils.make_disjoint_window, found):
                windows.append((None, context, target))
                owner.append(i)
        out = [0.0] * len(requests)
        for i, (logp, _) in zip(owner, self._loglikelihood_tokens(windows)):
            out[i] += logp
        for request, total in zip(requests, out):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return out

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy text of each (context, options) up to its first stop string. ConfigError for other options."""
        groups: dict[tuple, list[int]] = defaultdict(list)
        contexts = []
        for i, request in enumerate(requests):
            context, options = request.args
            stops, room = self._options(options)
            ids = self.tok_encode(context)[-(self.max_length - room) :]
            require(len(ids) > 0, "a context to continue is empty", DataError)
            contexts.append(ids)
            groups[stops, room].append(i)
        out = [""] * len(requests)
        with progress(len(requests), "generate", unit="texts") as bar:
            for (stops, room), members in groups.items():
                members.sort(key=lambda i: (-len(contexts[i]), contexts[i]))
                for start in range(0, len(members), self.batch):
                    chosen = members[start : start + self.batch]
                    for i, text in zip(chosen, self._continue([contexts[i] for i in chosen], stops, room)):
                        out[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(chosen))
        return out

    def _options(self, options: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """(stop strings, tokens to generate at most) of a task's generation options."""
        unknown = sorted(options.keys() - KNOWN)
        require(not unknown, f"generation option {', '.join(unknown)} is not one of {', '.join(sorted(KNOWN))}")
        sampled = options.get("do_sample", float(options.get("temperature") or 0) > 0)
        require(not sampled, "a task that samples (do_sample, temperature > 0) is not supported, only greedy text")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        good = all(isinstance(stop, str) for stop in stops)
        require(good, f"until={until!r} must be a text or a list of texts")
        room = options.get("max_gen_toks", GENERATED)
        good = type(room) is int and 1 <= room < self.max_length
        require(good, f"max_gen_toks={room!r} must be in 1 .. {self.max_length - 1}, below the model's context")
        if self.eot_token_id is not None:
            stops.append(self.tokenizer.decode(self.eot_token_id))
        return tuple(stop for stop in stops if stop), room

    def _continue(self, prompts: list[list[int]], stops: tuple[str, ...], room: int) -> list[str]:
        rows: list[list[int]] = [[] for _ in prompts]
        ended = np.zeros(len(prompts), bool)
        # The batch is filled by a text that ends when the last one does: the devices split it, and one shape compiles.
        filled = prompts + prompts[-1:] * (self.batch - len(prompts))

        def on_token(row: int, token: int) -> None:
            if row >= len(rows):
                return
            rows[row].append(token)
            tail = self.tokenizer.decode(rows[row][-32:])
            ended[row] |= any(stop in tail for stop in stops)
            if ended.all():
                raise _Stopped

        try:
            self.model.generate(filled, max_new_tokens=room, on_token=on_token)
        except _Stopped:
            pass
        self.tokens += sum(map(len, prompts)) + sum(map(len, rows))
        texts = []
        for row in rows:
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            for stop in stops:
                text = text.split(stop)[0]
            texts.append(text)
        return texts
