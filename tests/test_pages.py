"""Pages of KV cache against a model that keeps the tokens themselves."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from readme_jax.config import ConfigError
from readme_jax.serving.pages import PagePool


def computed(pool, tokens, most=None):
    """Pages of a sequence taken, filled and sealed as a request would; (pages, digests, tokens found)."""
    held, digests = [], []
    pool.digest(tokens, digests)
    found = pool.share(held, digests, len(tokens) if most is None else most)
    assert pool.grow(held, len(tokens))
    pool.seal(held, digests, found * pool.page_tokens, len(tokens))
    return held, digests, found


def test_a_prefix_is_found_and_shared():
    pool = PagePool(8, 2)
    first, _, found = computed(pool, [1, 2, 3, 4, 5])
    assert found == 0 and len(first) == 3 and pool.available == 5
    second, _, found = computed(pool, [1, 2, 3, 4, 9, 9])
    assert found == 2 and second[:2] == first[:2] and second[2] not in first
    assert [pool.users(page) for page in first] == [2, 2, 1]
    assert pool.reused_tokens == 4
    pool.release(first)
    assert first == [] and [pool.users(page) for page in second] == [1, 1, 1]


def test_equal_blocks_behind_different_prefixes_are_different():
    pool = PagePool(8, 2)
    computed(pool, [1, 2, 7, 7])
    assert computed(pool, [3, 4, 7, 7])[2] == 0
    assert computed(pool, [7, 7])[2] == 0


def test_no_digest_is_shared_between_pools_of_other_contents():
    digests = []
    for salt, size in ((b"", 2), (b"other model", 2), (b"", 4)):
        mine = []
        PagePool(4, size, salt=salt).digest([1, 2, 3, 4], mine)
        digests += mine
    assert len(set(digests)) == len(digests) == 5


def test_pages_of_a_second_device_have_ids_of_their_own():
    pool = PagePool(4, 2, first=4)
    held, digests, _ = computed(pool, [1, 2, 3, 4, 5])
    assert sorted(held) == [4, 5, 6] and [pool.users(page) for page in held] == [1, 1, 1]
    assert pool.known(digests) == 4 and pool.known([b"other", *digests]) == 0 and pool.known([]) == 0
    pool.release(held)
    assert pool.grow(held, 8) and sorted(held) == [4, 5, 6, 7] and not pool.grow(held, 9)


def test_the_oldest_cached_page_goes_first_and_a_prefix_outlives_its_end():
    pool = PagePool(4, 1)
    old, _, _ = computed(pool, [1, 2])
    pool.release(old)
    new, _, _ = computed(pool, [3, 4])
    pool.release(new)
    held = []
    assert pool.grow(held, 1) and pool.evictions == 1
    digests = []
    pool.digest([1, 2], digests)
    assert pool.share([], digests, 2) == 1  # the end of the oldest is gone, its beginning is there
    digests = []
    pool.digest([3, 4], digests)
    assert pool.share([], digests, 2) == 2


def test_using_a_cached_page_makes_it_young():
    pool = PagePool(2, 1)
    for token in (1, 2):
        pool.release(computed(pool, [token])[0])
    pool.release(computed(pool, [1])[0])
    assert pool.grow([], 1)
    assert computed(pool, [1])[2] == 1


def test_too_few_pages_change_nothing():
    pool = PagePool(3, 4)
    held = []
    assert pool.grow(held, 5) and len(held) == 2
    before = list(held)
    assert not pool.grow(held, 13) and held == before and pool.available == 1
    assert pool.lacking(held, 13) == 2 and pool.grow(held, 8) and held == before


def test_without_reuse_nothing_is_found():
    pool = PagePool(8, 2, reuse=False)
    assert computed(pool, [1, 2, 3, 4])[1] == []
    assert computed(pool, [1, 2, 3, 4])[2] == 0 and pool.reused_tokens == 0


def test_cached_pages_can_be_forgotten():
    pool = PagePool(4, 2)
    held, _, _ = computed(pool, [1, 2, 3, 4])
    pool.release(held)
    pool.forget_cached()
    assert pool.available == 4 and computed(pool, [1, 2, 3, 4])[2] == 0


@pytest.mark.parametrize("sizes, message", [((0, 4), "pages=0 must be"), ((4, 0), "page_tokens=0 must be")])
def test_sizes_are_checked(sizes, message):
    with pytest.raises(ConfigError, match=message):
        PagePool(*sizes)


class Machine(RuleBasedStateMachine):
    """Random sequences come, grow, are sealed and go. `contents` is what the device would hold in each page."""

    @initialize(pages=st.integers(1, 12), size=st.integers(1, 3))
    def start(self, pages, size):
        self.pool, self.size = PagePool(pages, size), size
        self.contents: dict[int, list[int]] = {}
        self.live: list[list] = []  # [tokens, held, digests, computed]

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def come(self, tokens):
        digests, held = [], []
        self.pool.digest(tokens, digests)
        found = self.pool.share(held, digests, (len(tokens) - 1) // self.size)
        assert found == len(held)
        for block, page in enumerate(held):
            # what is read through the page is this block, behind exactly this prefix
            assert self.contents[page] == tokens[: (block + 1) * self.size]
        self.live.append([tokens, held, digests, found * self.size])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compute(self, data):
        tokens, held, digests, start = entry = data.draw(st.sampled_from(self.live))
        end = data.draw(st.integers(start, len(tokens)))
        room = self.pool.available
        before, need = list(held), self.pool.pages_for(end) - len(held)
        assert self.pool.grow(held, end) == (need <= room)
        if need > room:
            assert held == before
            return
        for page in held[len(before) :]:
            assert self.pool.users(page) == 1
        for position in range(start, end):
            page = held[position // self.size]
            assert self.pool.users(page) == 1, "tokens are written into a page that another reads"
            self.contents[page] = tokens[: position + 1]
        self.pool.seal(held, digests, start, end)
        entry[3] = end

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data, token):
        entry = data.draw(st.sampled_from(self.live))
        if entry[3] == len(entry[0]):
            entry[0] = [*entry[0], token]
            self.pool.digest(entry[0], entry[2])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def go(self, data):
        entry = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))  # by place: others may be equal to it
        self.pool.release(entry[1])
        assert entry[1] == []

    @rule()
    def forget(self):
        self.pool.forget_cached()

    @invariant()
    def users_are_those_who_hold_it(self):
        pool = getattr(self, "pool", None)
        if pool is None:
            return
        held = [page for entry in self.live for page in entry[1]]
        assert [pool.users(page) for page in range(pool.pages)] == [held.count(p) for p in range(pool.pages)]
        assert pool.available == pool.pages - len(set(held))
        for entry in self.live:
            assert len(set(entry[1])) == len(entry[1])

    def teardown(self):
        for entry in getattr(self, "live", []):
            self.pool.release(entry[1])
        if hasattr(self, "pool"):
            assert self.pool.available == self.pool.pages
            assert self.pool.grow([], self.pool.pages * self.size)  # every page is there once


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
