"""Pages of KV cache: who uses which, and which hold a prefix that another request can read. Ids only, no arrays.

A full page is known by a digest of all tokens up to its end, so two requests whose prompts begin alike read the same
pages and nothing is copied: only full pages are shared, and a request writes behind those it was given.
"""

import array
import hashlib
from collections import OrderedDict

from readme_jax.config import require


class PagePool:
    """`pages` pages of `page_tokens` tokens each. A page is in use (one user or more), cached, or empty.

    reuse: whether full pages are found again by their tokens. salt: what else the contents depend on, so that equal
    digests mean equal contents where pools of several models exist side by side. first: id of the first page, so that
    pages of several devices have ids of their own. A page whose last user goes stays
    readable (cached) until its room is needed; the one unused for longest goes first. ConfigError for sizes below 1.
    """

    def __init__(self, pages: int, page_tokens: int, *, reuse: bool = True, salt: bytes = b"", first: int = 0):
        require(pages >= 1, f"pages={pages} must be at least 1")
        require(page_tokens >= 1, f"page_tokens={page_tokens} must be at least 1")
        self.pages, self.page_tokens, self.reuse = pages, page_tokens, reuse
        self.reused_tokens = 0  # read from pages found by digest, over all requests
        self.evictions = 0  # cached pages given up for room
        self._root = hashlib.blake2b(b"kv %d " % page_tokens + salt, digest_size=16).digest()
        self._users = [0] * (first + pages)
        self._digest: list[bytes | None] = [None] * (first + pages)
        self._page_of: dict[bytes, int] = {}
        self._empty = list(range(first + pages - 1, first - 1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def available(self) -> int:
        """Pages that nobody uses."""
        return len(self._empty) + len(self._cached)

    def users(self, page: int) -> int:
        """How many requests hold this page."""
        return self._users[page]

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_tokens)

    def digest(self, tokens: list[int], digests: list[bytes]) -> None:
        """Append to `digests` those of the full pages of `tokens` that it lacks (16 bytes each, chained)."""
        size = self.page_tokens
        for block in range(len(digests), len(tokens) // size if self.reuse else 0):
            state = hashlib.blake2b(digests[-1] if digests else self._root, digest_size=16)
            state.update(array.array("q", tokens[block * size : (block + 1) * size]))
            digests.append(state.digest())

    def share(self, held: list[int], digests: list[bytes], most: int) -> int:
        """Append to `held` the known pages that follow it, so that it holds `most` at most; the number of new pages.

        held: pages of the tokens that `digests` begin with, all full.
        """
        found = 0
        for digest in digests[len(held) : most]:
            page = self._page_of.get(digest)
            if page is None:
                break
            if not self._users[page]:
                del self._cached[page]
            self._users[page] += 1
            held.append(page)
            found += 1
        self.reused_tokens += found * self.page_tokens
        return found

    def known(self, digests: list[bytes]) -> int:
        """How many tokens of the pages with these digests, from the first on, `share` would find."""
        found = next((i for i, digest in enumerate(digests) if digest not in self._page_of), len(digests))
        return found * self.page_tokens

    def lacking(self, held: list[int], tokens: int) -> int:
        """Pages that `held` is short of to hold this many tokens."""
        return max(0, self.pages_for(tokens) - len(held))

    def grow(self, held: list[int], tokens: int) -> bool:
        """Append pages to `held` until it holds this many tokens; False, with nothing changed, if too few are left."""
        lacking = self.lacking(held, tokens)
        if lacking > self.available:
            return False
        for _ in range(lacking):
            if self._empty:
                page = self._empty.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
                self.evictions += 1
            self._users[page] = 1
            held.append(page)
        return True

    def seal(self, held: list[int], digests: list[bytes], start: int, end: int) -> None:
        """Tokens start .. end of `held` have been computed: pages that are full now can be found by others.

        A page equal to one that is known already stays private.
        """
        if self.reuse:
            for block in range(start // self.page_tokens, end // self.page_tokens):
                page, digest = held[block], digests[block]
                if self._digest[page] is None and digest not in self._page_of:
                    self._digest[page] = digest
                    self._page_of[digest] = page

    def release(self, held: list[int]) -> None:
        """Give up all pages of `held`, the last first (a prefix is of use without its end, not the other way round)."""
        while held:
            page = held.pop()
            self._users[page] -= 1
            if not self._users[page]:
                if self._digest[page] is None:
                    self._empty.append(page)
                else:
                    self._cached[page] = None

    def forget_cached(self) -> None:
        """Empty every cached page."""
        for page in self._cached:
            self._forget(page)
        self._empty.extend(self._cached)
        self._cached.clear()

    def _forget(self, page: int) -> None:
        digest = self._digest[page]
        assert digest is not None
        del self._page_of[digest]
        self._digest[page] = None
