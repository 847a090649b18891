"""Blocks as a capacity: who is let in, what the tree gives back, what is swapped; refusals change nothing."""

import pytest

from phase1_foundation.project3_pretrain.plans import LayerSpec
from phase3_core_inference.project8_kv_cache.generation import SamplingParams
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase4_advanced_inference.project12_dynamic_batching.request import Request
from phase4_advanced_inference.project13_paged_attention import block_capacity
from phase4_advanced_inference.project13_paged_attention.block_capacity import Blocks, BlockSpan
from phase4_advanced_inference.project13_paged_attention.paged_cache import PagedCache

LONG, TOKENIZER = 48, NumberTokenizer(40)
SPEC = LayerSpec(n_head=1, n_kv_head=1, head_size=2, value_size=1, window=None, scale=1.0, block_size=LONG)


def blocks_of(n_blocks, n_rows=4, **options):
    """Blocks over an empty cache."""
    return Blocks(PagedCache([SPEC], n_rows, LONG, page=4, n_blocks=n_blocks), **options)


def request_of(prompt, index=0, space=0):
    """A request that wants 8 tokens more."""
    return Request(index, list(prompt), SamplingParams(8, 0.0, seed=0, stop_ids=()), TOKENIZER, LONG, space=space)


def read(blocks, request, n=None):
    """Let a request read so many tokens, as a step would; whether there was room."""
    n = request.unread if n is None else n
    if not blocks.grow(request, n):
        return False
    blocks.cache.plan([(request.row, n, 0)])
    request.fed += n
    return True


def served(blocks, prompt, index=0, space=0):
    """A request that was let in and has read its prompt."""
    request = request_of(prompt, index, space)
    assert blocks.admit(request) and read(blocks, request)
    return request


def known(blocks, prompt):
    """How many tokens of a text the tree has."""
    return blocks.tree.known(list(prompt))


def state(blocks):
    """What a refusal must not change."""
    cache = blocks.cache
    return cache.allocator.counts.tolist(), cache.lengths[:], cache.n_held[:], blocks.in_tree.tolist(), blocks._rows[:]


def test_a_span_is_references_that_can_be_split_and_given_back():
    blocks = blocks_of(8)
    span = BlockSpan(blocks, blocks.cache.allocator.allocate(3))
    blocks.in_tree[span.blocks] = True
    assert len(span) == 12 and span.nbytes == 3 * blocks.cache.block_bytes == 3 * 4 * 12
    head, tail = span.split(8)
    assert head.blocks + tail.blocks == span.blocks and (len(head), len(tail)) == (8, 4)
    tail.drop()
    assert blocks.cache.allocator.n_free == 6 and blocks.in_tree.sum() == 2 == blocks.cache.allocator.n_blocks - 6
    assert not blocks.in_tree[tail.blocks].any() and blocks.available == 8


def test_what_a_text_leaves_counts_as_free_and_goes_when_it_is_needed():
    blocks = blocks_of(6)
    blocks.release(served(blocks, range(10)))  # two full blocks stay, the third is free
    assert blocks.cache.allocator.n_free == 4 and blocks.available == 6 and known(blocks, range(10)) == 8
    other = served(blocks, range(20, 39))  # five blocks
    assert blocks.available == 1 and known(blocks, range(10)) == 4  # the end went, the beginning is worth more
    assert read(blocks, other, 4) and blocks.available == 0 and known(blocks, range(10)) == 0
    before = state(blocks)
    assert not blocks.grow(other, 4) and state(blocks) == before


def test_a_large_cache_gives_back_some_blocks_at_a_time(monkeypatch):
    monkeypatch.setattr(block_capacity, "HELPING", 4)
    blocks = blocks_of(12)
    calls, evict = [], blocks.tree.evict
    monkeypatch.setattr(blocks.tree, "evict", lambda nbytes: calls.append(nbytes) or evict(nbytes))
    for start in (0, 12, 24):
        blocks.release(served(blocks, range(start, start + 12)))
    blocks.release(served(blocks, range(36, 39)))  # the twelfth block is free, the others hold three texts
    assert not calls
    other = request_of([39] * 5)
    assert blocks.admit(other)
    for _ in range(4):  # four times a block
        assert read(blocks, other, 4)
    assert len(calls) == 1 and blocks.cache.allocator.n_free == 2 and known(blocks, range(12)) == 0


def test_where_little_is_left_no_more_is_taken_than_is_needed(monkeypatch):
    monkeypatch.setattr(block_capacity, "HELPING", 1)  # as many as there are, if it were not for the others
    blocks = blocks_of(8)
    blocks.release(served(blocks, range(20, 32)))  # three blocks that only the tree has
    running = served(blocks, range(16))  # four, which the tree knows as well
    other = served(blocks, [39])
    assert blocks.available == 3 and blocks.cache.allocator.n_free == 0 and known(blocks, range(16)) == 16
    assert read(blocks, other, 4)  # one block
    assert known(blocks, range(20, 32)) == 8 and known(blocks, range(16)) == 16
    assert running.fed == 16


def test_what_was_asked_for_last_stays_longest():
    blocks = blocks_of(6)
    for start in (0, 10, 20):
        blocks.release(served(blocks, range(start, start + 8)))
    assert blocks.cache.allocator.n_free == 0
    blocks.release(served(blocks, range(9)))  # of which 8 are known; one block for the ninth
    assert [known(blocks, range(start, start + 8)) for start in (0, 10, 20)] == [8, 4, 8]


def test_what_the_tree_drops_but_a_row_uses_frees_nothing_and_is_not_counted():
    blocks = blocks_of(6)
    reader = served(blocks, range(9))  # three blocks
    blocks._tell_tree()
    assert known(blocks, range(8)) == 8 and blocks.available == blocks.cache.allocator.n_free == 3
    assert not blocks.grow(reader, 16) and known(blocks, range(8)) == 8
    idle = served(blocks, [30, 31, 32, 33])
    blocks.release(idle)
    assert blocks.available == 3 and blocks.cache.allocator.n_free == 2
    assert read(blocks, reader, 15)  # three more
    assert blocks.available == 0 and known(blocks, [30, 31, 32, 33]) == 0


def test_a_text_is_let_in_where_it_fits_beside_one_block_more_for_each_that_runs():
    blocks = blocks_of(6)
    assert not blocks.admit(request_of(range(24)))  # of 24 places all: none is left for the token that comes
    served(blocks, range(9))
    before = state(blocks)
    assert not blocks.admit(request_of(range(20, 28)))  # 9 places are three blocks, and one is kept for the runner
    assert state(blocks)[1:3] == before[1:3]  # the tree got to know of the runner's
    assert blocks.admit(request_of(range(20, 27)))


def test_known_blocks_are_not_counted_twice():
    """They are no free memory for the very text that takes them."""
    blocks = blocks_of(4)
    blocks.release(served(blocks, range(9)))
    assert blocks.available == 4 and blocks.cache.allocator.n_free == 2
    again = request_of(range(15))
    assert blocks.admit(again) and again.fed == 8 and blocks.available == 2  # 16 places are all four blocks
    assert read(blocks, again) and read(blocks, again, 1) and blocks.available == 0
    blocks.release(again)
    assert not blocks.admit(request_of(range(16)))


def test_of_a_text_that_is_known_whole_one_token_is_read():
    blocks = blocks_of(8)
    blocks.release(served(blocks, range(8)))
    again = request_of(range(8))
    assert blocks.admit(again) and again.fed == 4 and again.reading and again.unread == 4


def test_texts_of_two_spaces_share_nothing():
    blocks = blocks_of(24, n_rows=8)
    for space in (0, 1, 7):
        request = served(blocks, range(10), space=space)
        assert request.found == 0
        blocks.release(request)
    assert blocks.tree.n_tokens == 3 * 8 == blocks.tree.statistics.inserted and blocks.in_tree.sum() == 6
    others = [request_of(range(10), space=space) for space in (0, 1, 7, 2**32 - 1)]
    assert all(map(blocks.admit, others)) and [other.fed for other in others] == [8, 8, 8, 0]
    taken = [block for other in others for block in blocks.cache.blocks(other.row)]
    assert len(set(taken)) == len(taken) == 6
    for space in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"space={space} must be from 0 to"):
            request_of(range(10), space=space)


def test_what_was_found_is_what_lay_there_at_first():
    blocks = blocks_of(12)
    blocks.release(served(blocks, range(9)))
    request = served(blocks, range(14))
    assert request.found == 8 and request.fed == 14
    other = request_of(range(14), 1)
    assert blocks.fork(request, other) and other.found == 14
    blocks.preempt(request)
    assert blocks.admit(request) and request.fed == 12 and request.found == 8  # its own are there by now


def test_rows_that_are_taken_keep_others_out():
    blocks = blocks_of(12, n_rows=2)
    requests = [served(blocks, [i], i) for i in range(2)]
    assert not blocks.admit(request_of([9])) and not blocks.fork(requests[0], request_of([0]))
    blocks.release(requests[0])
    assert requests[0].row is None and blocks.admit(request_of([9]))


def test_a_fork_needs_a_row_and_a_block_for_each_that_runs():
    blocks = blocks_of(3)
    request, other = served(blocks, range(6)), request_of(range(6), 1)
    assert blocks.available == 1 and not blocks.fork(request, other) and other.row is None
    blocks = blocks_of(4)
    request, other = served(blocks, range(6)), request_of(range(6), 1)
    assert blocks.fork(request, other) and other.fed == request.fed == 6 and blocks.available == 2
    assert read(blocks, other, 1) and blocks.available == 1  # a copy of the block in which both end


def test_swapping_keeps_to_its_memory_and_leaves_the_rest_to_be_read_anew():
    blocks = blocks_of(12, swap_bytes=3 * 4 * 12)
    first, second = served(blocks, range(9)), served(blocks, range(20, 25), 1)
    blocks.preempt(first)  # three blocks
    blocks.preempt(second)
    assert first.kept.length == 9 == first.fed and second.kept is None and second.fed == 0
    assert blocks.n_swapped == 1 and blocks.cache.allocator.n_free == 9  # full blocks are remembered in any case
    assert blocks.admit(second) and second.fed == 4
    first.kept = None  # called off: its memory is there again
    blocks.preempt(second)
    assert second.kept is not None and blocks.n_swapped == 2


def test_a_token_that_was_taken_back_meanwhile_is_not_swapped_in():
    blocks = blocks_of(12, swap_bytes=10**6)
    request = served(blocks, range(9))
    blocks.preempt(request)
    request.fed = 7
    assert blocks.admit(request) and blocks.cache.lengths[request.row] == 7 and request.kept is None
    assert len(blocks.cache.blocks(request.row)) == 2 and not list(blocks._swapped)


@pytest.mark.parametrize("broken", ["swap_in", "put"])
def test_a_copy_that_fails_takes_no_row_and_no_block(monkeypatch, broken):
    blocks = blocks_of(12, swap_bytes=10**6)
    request = served(blocks, range(9))
    blocks.preempt(request)
    owner = blocks.cache if broken == "swap_in" else blocks.cache.stores[0]
    with monkeypatch.context() as patch:
        patch.setattr(owner, broken, lambda *_: 1 / 0)
        before = state(blocks)
        with pytest.raises(ZeroDivisionError):
            blocks.admit(request)
    assert state(blocks) == before and request.row is None and request.kept is not None
    assert blocks.admit(request)


def test_without_a_tree_nothing_is_remembered():
    blocks = blocks_of(6, share=False)
    blocks.release(served(blocks, range(12)))
    assert blocks.available == blocks.cache.allocator.n_free == 6
    blocks.clear()
    again = request_of(range(12))
    assert blocks.admit(again) and again.fed == 0 and read(blocks, again) and not blocks.grow(again, 13)


def test_what_can_never_fit_is_refused():
    with pytest.raises(ValueError, match="a text of 28 tokens will never fit in rows of 24"):
        blocks_of(6).check(request_of(range(20)))
    blocks_of(7).check(request_of(range(20)))


if __name__ == "__main__":
    example = blocks_of(6)
    example.release(served(example, range(10)))
    print(f"{known(example, range(10))} of 10 tokens stay known, and {example.available} of 6 blocks can be had")
    raise SystemExit(pytest.main([__file__]))
