"""The allocator against a plain model of it: counts, the free list, and requests that must change nothing."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from phase4_advanced_inference.project13_paged_attention.block_allocator import BlockAllocator, OutOfBlocks

SIZE = 7
some_blocks = st.lists(st.integers(-1, SIZE), max_size=5)


class Books(RuleBasedStateMachine):
    """An allocator, and a dict that says how many owners each block should have."""

    def __init__(self):
        super().__init__()
        self.allocator, self.owners = BlockAllocator(SIZE), dict.fromkeys(range(SIZE), 0)

    @rule(n=st.integers(0, SIZE + 1))
    def allocate(self, n):
        free = [block for block, count in self.owners.items() if not count]
        if n > len(free):
            with pytest.raises(OutOfBlocks, match=f"{n} blocks were asked for, and {len(free)} of {SIZE}"):
                self.allocator.allocate(n)
            return
        blocks = self.allocator.allocate(n)
        assert len(set(blocks)) == n and set(blocks) <= set(free)
        self.owners.update(dict.fromkeys(blocks, 1))

    @rule(blocks=some_blocks)
    def share(self, blocks):
        if any(not self.owners.get(block) for block in blocks):
            with pytest.raises(ValueError, match="nobody's to share"):
                self.allocator.share(blocks)
            return
        self.allocator.share(blocks)
        for block in blocks:
            self.owners[block] += 1

    @rule(blocks=some_blocks)
    def release(self, blocks):
        if any(blocks.count(block) > self.owners.get(block, 0) for block in blocks):
            with pytest.raises(ValueError, match="nobody's to share"):
                self.allocator.release(blocks)
            return
        self.allocator.release(blocks)
        for block in blocks:
            self.owners[block] -= 1

    @invariant()
    def the_books_are_right(self):
        assert [self.allocator.references(block) for block in range(SIZE)] == list(self.owners.values())
        assert self.allocator.n_free == list(self.owners.values()).count(0)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_what_was_given_back_is_given_out_again():
    allocator = BlockAllocator(3)
    blocks = allocator.allocate(3)
    allocator.release(blocks[1:2])
    assert allocator.allocate() == blocks[1:2]


def test_no_blocks_at_all_are_refused():
    with pytest.raises(ValueError, match="more memory"):
        BlockAllocator(0)


if __name__ == "__main__":
    allocator = BlockAllocator(4)
    mine = allocator.allocate(3)
    allocator.share(mine[:1])
    allocator.release(mine)
    print(f"of 4 blocks {allocator.n_free} are free: {mine[0]} still has {allocator.references(mine[0])} owner")
    raise SystemExit(pytest.main([__file__]))
