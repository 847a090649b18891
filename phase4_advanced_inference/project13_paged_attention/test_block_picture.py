"""The picture of blocks: tables, bars, shared blocks, those that only the tree has, and what is left out."""

import pytest
import torch

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.plans import LayerSpec
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer
from phase3_core_inference.project8_kv_cache.generation import SamplingParams
from phase4_advanced_inference.project13_paged_attention.block_picture import draw_blocks, owners
from phase4_advanced_inference.project13_paged_attention.paged_cache import PagedCache
from phase4_advanced_inference.project13_paged_attention.runner import Runner


def cache_of(n_rows=3, capacity=16, page=4, n_blocks=6):
    return PagedCache([LayerSpec(1, 1, 4, 4, None, 0.5)], n_rows, capacity, page=page, n_blocks=n_blocks)


def test_an_empty_cache_is_all_free():
    assert draw_blocks(cache_of()) == "and 6 free blocks"


def test_tables_bars_and_counts():
    cache = cache_of()
    cache.plan([(0, 8, 1), (2, 5, 1)])
    assert draw_blocks(cache, {2: "b"}).splitlines() == [
        "row 0       8 tokens  0 1",
        "row 2  b    5 tokens  2 3[#...]",
        "block 0  1  1  1  1  .  .",
    ]


def test_a_shared_block_is_marked_until_its_copy():
    cache = cache_of()
    cache.plan([(0, 6, 1)])
    cache.fork(0, 1)
    assert draw_blocks(cache).splitlines() == [
        "row 0      6 tokens  0* 1*[##..]",
        "row 1      6 tokens  0* 1*[##..]",
        "block 0  2  2  .  .  .  .",
    ]
    cache.plan([(1, 1, 1)])
    assert draw_blocks(cache).splitlines() == [
        "row 0      6 tokens  0* 1[##..]",
        "row 1      7 tokens  0* 2[###.]",
        "block 0  2  1  1  .  .  .",
    ]


def test_a_block_that_was_reserved_and_not_written_is_empty():
    cache = cache_of()
    cache.reserve(1, 5)
    assert draw_blocks(cache).splitlines()[0] == "row 1      0 tokens  0[....] 1[....]"


def test_bars_stay_short():
    cache = cache_of(capacity=64, page=64, n_blocks=2)
    cache.plan([(0, 1, 1)])
    assert "0[#...............]" in draw_blocks(cache)  # one token of 64 is seen
    cache.plan([(0, 62, 1)])
    assert "0[################]" in draw_blocks(cache)  # and a block with a bar is not full


def test_lines_of_free_blocks_are_left_out():
    cache = cache_of(capacity=256, n_rows=1, n_blocks=64)
    cache.plan([(0, 4 * 17, 1)])
    cache.allocator.share(list(range(16)))
    cache.free(0)
    assert draw_blocks(cache).splitlines() == ["block  0  " + " ".join(["+ "] * 16).rstrip(), "and 48 free blocks"]


def test_what_the_tree_has_after_the_rows_are_gone():
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320, block_size=64))
    runner = Runner(model, byte_tokenizer(), n_rows=2, page=8)
    texts = [list(range(20)), [*range(16), 99]]
    requests = [runner.add(text, SamplingParams(6, 0.0, stop_ids=())) for text in texts]
    runner.step()
    both = draw_blocks(runner.cache, {request.row: "here" for request in requests}).splitlines()
    assert both[:2] == ["row 0  here   20 tokens  0* 1* 2[####....]", "row 1  here   17 tokens  0* 1* 3[#.......]"]
    assert both[2].startswith("block  0  2+ 2+ 1  1  .")
    while runner.busy:
        runner.step()
    assert draw_blocks(runner.cache).splitlines() == ["block  0  +  +  +  .  .  .  .  .  .  .  .  .  .  .  .  ."]


@pytest.mark.parametrize(
    ("rows", "references", "said"), [(0, 0, "."), (0, 1, "+"), (1, 1, "1"), (12, 13, "12+"), (3, 3, "3")]
)
def test_owners(rows, references, said):
    assert owners(rows, references) == said


if __name__ == "__main__":
    example = cache_of()
    example.plan([(0, 6, 1)])
    example.fork(0, 1)
    print(draw_blocks(example))
    raise SystemExit(pytest.main([__file__]))
