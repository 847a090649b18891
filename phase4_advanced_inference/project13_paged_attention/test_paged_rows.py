"""Rows of a paged cache in any order of calls, against lists of what was written: contents, owners, refusals."""

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase4_advanced_inference.project13_paged_attention.block_allocator import OutOfBlocks
from phase4_advanced_inference.project13_paged_attention.paged_cache import PagedCache

ROWS, LONG = 4, 48
SPEC = Transformer(PRESETS["gpt2"](vocab_size=61, block_size=LONG, n_layer=1, n_head=4, n_embd=32)).specs[0]
rows, at = st.integers(0, ROWS - 1), st.integers(0, 99)
filled = precondition(lambda self: any(self.held))


class Shelves(RuleBasedStateMachine):
    """Rows of one small layer, in which numbers are written that can be told apart, and what they should hold.

    A library keeps full blocks of rows beside them, as the tree of beginnings does.
    """

    @initialize(page=st.sampled_from([1, 4, 4, 16]))
    def begin(self, page):
        self.specs, self.page = [SPEC], page
        self.n_blocks = 56 // page + 1
        self.cache = PagedCache(self.specs, ROWS, LONG, page=page, n_blocks=self.n_blocks)
        self.held, self.next = [[] for _ in range(ROWS)], 1.0
        self.boxes, self.library = [], []  # (box, numbers), (blocks, numbers)

    @staticmethod
    def one_of(held, row):
        """The row, or the next one that holds something."""
        return next(r % ROWS for r in range(row, row + ROWS) if held[r % ROWS])

    def state(self):
        """All that must be as it was when something is refused."""
        c = self.cache
        tables = [c.blocks(row) for row in range(ROWS)]
        return c.lengths[:], c.n_held[:], c._reserved[:], tables, c.allocator.counts.tolist(), c.allocator._free[:]

    def try_to(self, call, needed):
        """Whether it could be done: exactly if as many blocks are free as it needs; else nothing has changed."""
        before, keys = self.state(), self.cache.stores[0].keys.clone()
        if needed > self.cache.allocator.n_free:
            with pytest.raises(OutOfBlocks, match="free a row"):
                call()
            assert before == self.state() and torch.equal(keys, self.cache.stores[0].keys)
            return False
        call()
        assert self.cache.allocator.n_free == len(before[-1]) - needed
        return True

    def needed(self, work):
        """Blocks behind the ends of rows, and copies: of a block with so many owners all but one take their own."""
        c, new, writers = self.cache, 0, []
        for row, n, _ in work:
            blocks = c.blocks(row)
            new += max(0, -(-(c.lengths[row] + n) // self.page) - len(blocks))
            writers += blocks[c.lengths[row] // self.page :][:1]
        return new + sum(min(writers.count(b), c.allocator.references(b) - 1) for b in set(writers))

    def numbers(self, n):
        """So many new ones, as keys or values of the layer."""
        spec, values = self.specs[0], torch.arange(self.next, self.next + n)
        self.next += n
        return values.tolist(), values.view(n, 1, 1).expand(n, spec.n_kv_head, spec.head_size)

    @rule(
        news=st.permutations(range(ROWS)).flatmap(
            lambda order: st.tuples(*(st.tuples(st.just(row), st.sampled_from([0, 1, 1, 5, 17])) for row in order))
        )
    )
    def write(self, news):
        work = [(row, n, 0) for row, n in news if n and len(self.held[row]) + n <= LONG]
        plans, before = [], [self.cache.blocks(row) for row in range(ROWS)]
        if not work or not self.try_to(lambda: plans.append(self.cache.plan(work)), self.needed(work)):
            return
        plan = plans[0]
        assert (self.cache.allocator.counts[plan.slots // self.page] == 1).all()  # nobody else reads what is written
        values, written = self.numbers(plan.n_tokens)
        self.cache.stores[0].write(plan.slots[: plan.n_tokens], written, -written)
        for row, n, _ in work:
            full = len(self.held[row]) // self.page
            assert self.cache.blocks(row)[:full] == before[row][:full]
            self.held[row] += values[:n]
            del values[:n]

    @rule()
    def decode(self):
        self.write([(row, 1) for row in range(ROWS) if self.held[row]])

    @rule(row=rows, n=st.sampled_from([0, 1, 9, 20]))
    def reserve(self, row, n):
        if len(self.held[row]) + n <= LONG:
            needed = self.needed([(row, n, 0)]) if n else 0
            assert self.cache.missing(row, n) == needed
            if self.try_to(lambda: self.cache.reserve(row, n), needed):
                assert self.cache.missing(row, n) == 0

    @filled
    @rule(row=rows, other=rows, n=st.integers(1, 9))
    def append(self, row, other, n):
        """Append to a row what another one begins with."""
        other = self.one_of(self.held, other)
        n = min(n, len(self.held[other]), LONG - len(self.held[row]))
        if n:
            read = self.cache.read_tokens(other, 0, n)
            if self.try_to(lambda: self.cache.append_tokens(row, read), self.needed([(row, n, 0)])):
                self.held[row] += self.held[other][:n]

    @filled
    @rule(row=rows, n=st.sampled_from([0, 1, 2, 7, LONG]))
    def take_back(self, row, n):
        row = self.one_of(self.held, row)
        length = max(0, len(self.held[row]) - n)
        self.cache.truncate(row, length)
        del self.held[row][length:]
        assert self.cache.n_held[row] == -(-length // self.page)

    def put(self, row, call, needed):
        """Whether something could be put into a row: it must be empty, and as many blocks be free as it needs."""
        if not self.cache.n_held[row]:
            return self.try_to(call, needed)
        before = self.state()
        with pytest.raises(ValueError, match="free it first"):
            call()
        assert before == self.state()
        return False

    @filled
    @rule(row=rows, other=rows)
    def fork(self, row, other):
        row = self.one_of(self.held, row)
        if self.put(other, lambda: self.cache.fork(row, other), 0):
            self.held[other] = list(self.held[row])
            assert self.cache.blocks(other) == self.cache.blocks(row)[: self.cache.n_held[other]]

    @filled
    @rule(row=rows, kind=st.sampled_from(["fork", "fork", "fork", "adopt", "box"]))
    def begin_from(self, row, kind):
        """The first empty row goes on from another."""
        row, empty = self.one_of(self.held, row), [r for r in range(ROWS) if not self.cache.n_held[r]]
        if empty and kind == "fork":
            self.fork(row, empty[0])
        elif empty and kind == "adopt":
            self.keep(row, 9)
            self.adopt(empty[0], -1)
        elif empty:
            self.pack(row)
            self.unpack(empty[0], -1)

    @filled
    @rule(row=rows, n=st.integers(1, 9))
    def keep(self, row, n):
        row = self.one_of(self.held, row)
        n = min(n, len(self.held[row]) // self.page)
        blocks = self.cache.blocks(row)[:n]
        self.cache.allocator.share(blocks)
        self.library.append((blocks, self.held[row][: n * self.page]))

    @precondition(lambda self: self.library)
    @rule(row=rows, at=at)
    def adopt(self, row, at):
        blocks, numbers = self.library[at % len(self.library)]
        if self.put(row, lambda: self.cache.adopt(row, blocks), 0):
            self.held[row] = list(numbers)

    @precondition(lambda self: self.library)
    @rule(at=at)
    def forget(self, at):
        self.cache.allocator.release(self.library.pop(at % len(self.library))[0])

    @filled
    @rule(row=rows)
    def pack(self, row):
        row = self.one_of(self.held, row)
        box = self.cache.swap_out(row)
        assert box.nbytes == -(-len(self.held[row]) // self.page) * self.cache.block_bytes
        self.boxes.append((box, self.held[row]))
        self.held[row] = []

    @precondition(lambda self: self.boxes)
    @rule(row=rows, at=at)
    def unpack(self, row, at):
        box, numbers = self.boxes[at % len(self.boxes)]
        if self.put(row, lambda: self.cache.swap_in(row, box), -(-len(numbers) // self.page)):
            self.held[row] = list(numbers)
            self.boxes.pop(at % len(self.boxes))

    @invariant()
    def everything_is_where_it_should_be(self):
        if not hasattr(self, "cache"):
            return
        c, owners, filled = self.cache, [0] * self.n_blocks, {}
        assert c.lengths == [len(numbers) for numbers in self.held]
        for row, numbers in enumerate(self.held):
            blocks = c.blocks(row)
            assert len(set(blocks)) == len(blocks) >= -(-len(numbers) // self.page)
            for i, block in enumerate(blocks):
                owners[block] += 1
                filled.setdefault(block, set()).update(range(len(numbers[i * self.page :][: self.page])))
            ((k, v),) = c.read_tokens(row, 0, len(numbers))
            assert k[:, 0, 0].tolist() == numbers == (-v[:, -1, -1]).tolist()
        for blocks, numbers in self.library:
            for block in blocks:
                owners[block] += 1
            k, _ = c.stores[0].take(torch.tensor(blocks, dtype=torch.long))
            assert k[:, :, 0, 0].flatten().tolist() == numbers
        assert owners == c.allocator.counts.tolist() and owners.count(0) == c.allocator.n_free
        places = sum(map(len, filled.values())) / (len(filled) * self.page) if filled else 1
        assert c.waste == pytest.approx(1 - places)


TestShelves = Shelves.TestCase
TestShelves.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(24))
def test_random_steps(seed):
    """The same steps with chances of their own: hypothesis seldom forks a row that goes on."""
    r, shelves = random.Random(seed), Shelves()
    shelves.begin([1, 4, 4, 16][seed % 4])
    steps = {
        "write": lambda: shelves.write([(row, r.choice([0, 1, 1, 5, 17])) for row in r.sample(range(ROWS), 3)]),
        "decode": shelves.decode,
        "reserve": lambda: shelves.reserve(r.randrange(ROWS), r.choice([0, 1, 9, 20])),
        "append": lambda: shelves.append(r.randrange(ROWS), r.randrange(ROWS), r.randint(1, 9)),
        "take_back": lambda: shelves.take_back(r.randrange(ROWS), r.choice([0, 1, 2, 7, LONG])),
        "fork": lambda: shelves.fork(r.randrange(ROWS), r.randrange(ROWS)),
        "begin_from": lambda: shelves.begin_from(r.randrange(ROWS), r.choice(["fork", "fork", "adopt", "box"])),
        "keep": lambda: shelves.keep(r.randrange(ROWS), r.randint(1, 9)),
        "adopt": lambda: shelves.adopt(r.randrange(ROWS), r.randrange(100)),
        "forget": lambda: shelves.forget(r.randrange(100)),
        "pack": lambda: shelves.pack(r.randrange(ROWS)),
        "unpack": lambda: shelves.unpack(r.randrange(ROWS), r.randrange(100)),
    }
    for _ in range(150):
        name = r.choice([*steps, "write", "decode", "decode", "begin_from", "take_back", "forget"])
        needs = {"write": True, "decode": True, "reserve": True, "adopt": shelves.library, "forget": shelves.library,
                 "unpack": shelves.boxes}.get(name, any(shelves.held))  # fmt: skip
        if needs:
            steps[name]()
            shelves.everything_is_where_it_should_be()


if __name__ == "__main__":
    cache = PagedCache([SPEC], ROWS, LONG, page=4)
    cache.plan([(0, 6, 0)])
    cache.fork(0, 1)
    print(f"a row of 6 tokens, and its fork: {cache.blocks(0)}, {cache.blocks(1)}")
    cache.plan([(1, 1, 0)])
    print(f"after one token more for the fork: {cache.blocks(0)}, {cache.blocks(1)}")
    raise SystemExit(pytest.main([__file__]))
