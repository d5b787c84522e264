"""A runner without a model: the next token is a digest of the tokens that the pages hold, so every page must be right.

It keeps real expert pages in its slots and compares them with the host's before each pass reads them.
"""

import hashlib

import jax
import numpy as np

from readme_jax.serving.sampling import Score

VOCAB = 384
EXPERTS = 5
EMPTY = -1


def digest(tokens, salt):
    """A number that depends on all tokens and their order."""
    state = hashlib.blake2b(salt, digest_size=4)
    state.update(np.asarray(tokens, np.int64).tobytes())
    return int.from_bytes(state.digest(), "little")


def next_token(tokens):
    """What follows these tokens; never 0, which ends a text, unless it is due to."""
    value = digest(tokens, b"token")
    return 0 if value % 23 == 0 else 1 + value % (VOCAB - 1)


def expert_of(tokens):
    """The expert of the last of these tokens; mostly that of the one before."""
    return digest(tokens[-2:-1] if digest(tokens, b"keep") % 4 else tokens, b"expert") % EXPERTS


def expected(prompt, room):
    """Output of a prompt, one at a time."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + room:
        token = next_token(tokens)
        if token == 0:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


class FakeRunner:
    """See the module. The interface is that of `serving.runner.Runner`."""

    resident = False  # it checks loads at every budget

    def __init__(
        self, folder, bank, *, slots, kv_pages, kv_page, router_pages, limits, context, dtype, load_sizes, resident
    ):
        del resident
        rng = np.random.default_rng(0)
        width, depth = int(bank.order_LR.max()) + 1, bank.page_bytes // (12 * bank.page)
        self.host_weights = tuple(rng.normal(size=(bank.layers, width, depth)).astype(np.float32) for _ in range(3))
        self.device = jax.devices()[0]
        self.bank, self.page, self.limits = bank, kv_page, limits
        self.kv = np.full(kv_pages * kv_page, EMPTY)
        self.router_kv = np.full(router_pages * kv_page, EMPTY)
        self.pool = np.full((slots, 3 * bank.page, depth), np.nan, np.float32)
        self.routed = self.ran = self.programs = self.compiles = 0
        self.device_s = 0.0

    def compile(self, progress):
        pass

    def _write(self, kv, pages, start, tokens):
        for place, token in enumerate(tokens, start):
            kv[pages[place // self.page] * self.page + place % self.page] = token

    def _read(self, kv, pages, end):
        used = np.asarray(pages[: -(-end // self.page)])
        found = kv.reshape(-1, self.page)[used].ravel()[:end].tolist()
        assert EMPTY not in found, "a page that nobody wrote"
        return found

    def route(self, tokens, first, pages):
        assert tokens
        self._write(self.router_kv, pages, first, tokens)
        known = self._read(self.router_kv, pages, first + len(tokens))
        self.routed += len(tokens)
        return [self._expert(known[: place + 1]) for place in range(first, len(known))]

    def _expert(self, known):
        return expert_of(known) % self.bank.experts

    def fetch_experts(self, handle):
        return handle

    def insert(self, slots, pages_SQD):
        self.pool[slots] = np.asarray(pages_SQD)[: len(slots)]

    def _check_pages(self, plan, index):
        page, weights = self.bank.page, self.host_weights
        for item, slot in zip(*plan.reads_of(index)):
            layer, number = divmod(int(item), self.bank.pages)
            assert layer == plan.layers[index]
            rows = np.maximum(self.bank.order_LR[layer, number * page : (number + 1) * page], 0)
            np.testing.assert_array_equal(self.pool[slot], np.concatenate([w[layer][rows] for w in weights]))

    def step(self, batch, plan, before_pass):
        limits = self.limits
        assert len(batch.works) <= limits.batch_requests and batch.tokens <= limits.batch_tokens
        read = [set() for _ in range(self.bank.layers)]
        for index in range(plan.passes):
            before_pass(index)
            self._check_pages(plan, index)
            items = (plan.reads_of(index)[0] % self.bank.pages).tolist()
            assert not read[plan.layers[index]].intersection(items), "a page counts once"
            read[plan.layers[index]].update(items)
        results = []
        for work in batch.works:
            request, end = work.request, work.start + work.count
            for place in range(work.start, end):
                needed = np.flatnonzero(self.bank.touch_LPE[:, :, request.experts[place]].any(1))
                for layer in needed:
                    pages = np.flatnonzero(self.bank.touch_LPE[layer, :, request.experts[place]])
                    assert read[layer].issuperset(pages.tolist()), "all pages of the token's expert are read"
                break  # one token of each work: the check is the dear part
            tokens = request.tokens[work.start : end]
            self._write(self.kv, request.pages, work.start, tokens)
            self.ran += len(tokens)
            results.append(None)
            if work.samples:
                known = self._read(self.kv, request.pages, end)
                assert known == request.tokens[:end]
                token = next_token(known)
                expert = 0
                if len(self.router_kv):
                    self._write(self.router_kv, request.router_pages, end, [token])
                    expert = self._expert(self._read(self.router_kv, request.router_pages, end + 1))
                results[-1] = Score(token, expert, 0.0, ())
        return results

    def fetch(self, handle):
        return handle

    def close(self):
        pass
