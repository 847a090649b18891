"""Tests of rotary positions: the paper's angles, distances alone, a table that is no state."""

import pytest
import torch

from phase1_foundation.project3_pretrain import positions
from phase1_foundation.project3_pretrain.model import Transformer
from phase1_foundation.project3_pretrain.test_model import TINY, make, random_tokens


def test_rope_turns_pairs_by_the_papers_angles():
    config = TINY(head_size=8, block_size=16)
    x = torch.randn(1, 16, 3, 8, generator=torch.Generator().manual_seed(0))
    turned, _ = positions.Rotation(config)(x, x, torch.arange(16).expand(1, 16))
    angles = torch.outer(torch.arange(16.0), 10000.0 ** -(torch.arange(4.0) * 2 / 8))
    spun = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat((spun.real, spun.imag), -1))


def test_rope_sees_distances_only():
    rotation = positions.Rotation(TINY(head_size=8))
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(at_q, at_k):
        return (rotation(q, q, torch.tensor([at_q]))[0] * rotation(k, k, torch.tensor([at_k]))[0]).sum()

    torch.testing.assert_close(score(5, 2), score(43, 40))
    assert not torch.allclose(score(5, 2), score(5, 3))


def test_the_rope_table_is_no_state_and_stays_float32():
    model, tokens = make(), random_tokens(1, 8)
    table = model.blocks[0].attention.rotation.table.clone()
    assert not [name for name in model.state_dict() if "rotation" in name]
    with torch.device("meta"):
        empty = Transformer(model.config)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    torch.testing.assert_close(empty(tokens), model(tokens))
    model.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(model.blocks[0].attention.rotation.table, table)
    assert len([name for name, _ in model.named_buffers()]) == 1  # one table for all layers


if __name__ == "__main__":
    print("a pair (1, 0) at positions 0 to 3, the fastest of two pairs and the slowest:")
    pair = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 4, 1, 4)
    turned, _ = positions.Rotation(TINY(head_size=4))(pair, pair, torch.arange(4).expand(1, 4))
    for fast, slow, fast_too, slow_too in turned[0, :, 0].tolist():
        print(f"  ({fast:6.3f}, {fast_too:6.3f})  ({slow:6.3f}, {slow_too:6.3f})")
    raise SystemExit(pytest.main([__file__, "-q"]))
