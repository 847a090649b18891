"""The allocator against a plain model of it: counts, the free list, and requests that must change nothing."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phase4_advanced_inference.project13_paged_attention.block_allocator import BlockAllocator, OutOfBlocks

SIZE = 7
some_blocks = st.lists(st.integers(-1, SIZE), max_size=5)
places = st.lists(st.integers(0, 99), min_size=1, max_size=5)


class Books(RuleBasedStateMachine):
    """An allocator, and a dict that says how many owners each block should have."""

    def __init__(self):
        super().__init__()
        self.allocator, self.owners = BlockAllocator(SIZE), dict.fromkeys(range(SIZE), 0)

    def refuse(self, call, *arguments, error=ValueError, match="nobody's to share"):
        """It is refused, and nothing has changed, not even what is given out next."""
        before = self.allocator.counts.tolist(), self.allocator._free[:]
        with pytest.raises(error, match=match):
            call(*arguments)
        assert before == (self.allocator.counts.tolist(), self.allocator._free)

    def owned(self, places):
        """Blocks that somebody has, some of them perhaps several times."""
        taken = [block for block, count in self.owners.items() if count]
        return [taken[place % len(taken)] for place in places]

    @rule(n=st.integers(0, SIZE + 1))
    def allocate(self, n):
        free = [block for block, count in self.owners.items() if not count]
        if n > len(free):
            said = f"{n} blocks were asked for, and {len(free)} of {SIZE}"
            self.refuse(self.allocator.allocate, n, error=OutOfBlocks, match=said)
            return
        blocks = self.allocator.allocate(n)
        assert len(set(blocks)) == n and set(blocks) <= set(free)
        self.owners.update(dict.fromkeys(blocks, 1))

    @rule(blocks=some_blocks)
    def share(self, blocks):
        if any(not self.owners.get(block) for block in blocks):
            self.refuse(self.allocator.share, blocks)
            return
        self.allocator.share(blocks)
        for block in blocks:
            self.owners[block] += 1

    @rule(blocks=some_blocks)
    def release(self, blocks):
        if any(blocks.count(block) > self.owners.get(block, 0) for block in blocks):
            self.refuse(self.allocator.release, blocks)
            return
        self.allocator.release(blocks)
        for block in blocks:
            self.owners[block] -= 1

    @precondition(lambda self: any(self.owners.values()))
    @rule(places=places, releases=st.booleans())
    def share_or_release_owned(self, places, releases):
        (self.release if releases else self.share)(self.owned(places))

    @precondition(lambda self: any(self.owners.values()))
    @rule(places=places, bad=st.sampled_from(["free", -1, SIZE, 10 * SIZE]), at=st.integers(0, 5))
    def a_wrong_one_anywhere_spoils_all(self, places, bad, at):
        blocks, free = self.owned(places), self.allocator._free
        if bad == "free" and not free:
            return
        blocks.insert(at, free[at % len(free)] if bad == "free" else bad)
        self.refuse(self.allocator.share, blocks)
        self.refuse(self.allocator.release, blocks)

    @precondition(lambda self: any(self.owners.values()))
    @rule(places=places)
    def more_often_than_it_has_owners(self, places):
        blocks = self.owned(places)
        self.refuse(self.allocator.release, blocks + [blocks[0]] * self.owners[blocks[0]])

    @invariant()
    def the_books_are_right(self):
        free = [block for block, count in self.owners.items() if not count]
        assert sorted(self.allocator._free) == free
        assert [self.allocator.references(block) for block in range(SIZE)] == list(self.owners.values())
        assert self.allocator.n_free == list(self.owners.values()).count(0)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_what_was_given_back_is_given_out_again():
    allocator = BlockAllocator(3)
    blocks = allocator.allocate(3)
    allocator.release(blocks[1:2])
    assert allocator.allocate() == blocks[1:2]


def test_one_owner_cannot_give_a_block_back_twice():
    allocator = BlockAllocator(3)
    one, other = allocator.allocate(2)
    with pytest.raises(ValueError, match=f"block {one} .* has not 2 owners"):
        allocator.release([one, other, one])
    assert allocator.n_free == 1 and allocator.references(one) == allocator.references(other) == 1
    allocator.share([one, one])  # twice at once: two owners more
    assert allocator.references(one) == 3
    allocator.release([one, other, one, one])
    assert allocator.n_free == 3


@pytest.mark.parametrize("n", [0, -1])
def test_no_blocks_at_all_are_refused(n):
    with pytest.raises(ValueError, match=f"n_blocks={n} must be at least 1: give the cache more memory"):
        BlockAllocator(n)


if __name__ == "__main__":
    allocator = BlockAllocator(4)
    mine = allocator.allocate(3)
    allocator.share(mine[:1])
    allocator.release(mine)
    print(f"of 4 blocks {allocator.n_free} are free: {mine[0]} still has {allocator.references(mine[0])} owner")
    raise SystemExit(pytest.main([__file__]))
