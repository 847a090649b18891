"""Devices: names for people and for files, and an error for one that is not here."""

import pytest
import torch

from common import device


def test_the_device_picked_can_be_used():
    assert torch.ones(2, device=device.pick_device()).sum() == 2


@pytest.mark.parametrize("name", ["cpu", torch.device("cpu")])
def test_check_device_accepts_what_is_here(name):
    assert device.check_device(name) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xla", ""])
def test_check_device_refuses_what_is_not(name):
    with pytest.raises(ValueError, match=f"DEVICE='{name}' cannot be used here: use {device.pick_device()}"):
        device.check_device(name)


@pytest.mark.parametrize(
    ("name", "slug", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", 989e12),
        ("NVIDIA H200", "h200", 989e12),
        ("NVIDIA A100-SXM4-40GB", "a100", 312e12),
        ("NVIDIA GeForce RTX 4090", "4090", 165e12),
        ("Some Card (2030)", "some_card_2030", None),
    ],
)
def test_gpus_by_name(monkeypatch, name, slug, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    assert device.device_slug("cuda") == slug
    assert device.peak_flops("cuda") == flops
    assert (device.memory_bandwidth("cuda") is None) == (flops is None)


def test_the_cpu():
    assert device.device_slug("cpu") == "cpu"
    assert "CPU" in device.device_name("cpu")
    assert device.peak_flops("cpu") is None
    device.synchronize("cpu")
    device.reset_peak_memory("cpu")
    before = device.peak_memory("cpu")
    if before is not None:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        assert device.peak_memory("cpu") >= max(before, block.numel())


if __name__ == "__main__":
    print(device.device_name(device.pick_device()), "->", device.device_slug(device.pick_device()))
    raise SystemExit(pytest.main([__file__]))
