"""Plots: PNG files appear, whole, in the size of the shared style."""

import struct

import pytest

from common import plots


def size_of(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data.rstrip().endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def test_curves(tmp_path):
    path = tmp_path / "new" / "loss.png"
    series = {"train": (range(1, 101), [3 / i for i in range(1, 101)]), "validation": ([1, 50, 100], [3.1, 0.2, 0.1])}
    assert plots.curves(path, series, "step", "loss", "Loss", hlines={"target": 0.15}, logx=True, logy=True) == path
    assert size_of(path) == (792, 462)
    assert [p.name for p in path.parent.iterdir()] == ["loss.png"]


def test_more_series_than_colours_and_fixed_limits(tmp_path):
    series = {f"run {i}": ([0, 1], [i, i + 1]) for i in range(9)}
    plots.curves(tmp_path / "a.png", series, "x", "y", "Many", ylim=(0, 10))
    size_of(tmp_path / "a.png")


def test_bars_with_a_hole(tmp_path):
    path = plots.bars(tmp_path / "b.png", ["ours", "peer"], {"CPU": [1.0, 2.0], "GPU": [3.0, None]}, "MB/s", "Speed")
    assert size_of(path) == (792, 462)


def test_a_plot_is_replaced_not_appended_and_pixels_depend_on_the_data(tmp_path):
    path = tmp_path / "c.png"
    pictures = []
    for last in (1, 1, 5):
        plots.curves(path, {"a": ([0, 1], [0, last])}, "x", "y", "t", ylim=(0, 6))
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]


def test_timelines_stand_below_each_other(tmp_path):
    spans = [(0, 0, 1, 0, True), (0, 1, 9, 0, False), (1, 2, 3, 1, True), (1, 3, 4.5, 1, False), (3, 5, 9, 12, False)]
    one = plots.timeline(tmp_path / "a.png", {"alone": spans}, "step", "row", "Who is where")
    two = plots.timeline(tmp_path / "b.png", {"one": spans, "none": []}, "step", "row", "Who is where")
    assert size_of(one)[0] == size_of(two)[0] == 792 and size_of(one)[1] < size_of(two)[1]
    moved = [(row, start, stop, owner, not strong) for row, start, stop, owner, strong in spans]
    other = plots.timeline(tmp_path / "c.png", {"alone": moved}, "step", "row", "Who is where")
    assert one.read_bytes() != other.read_bytes()  # strong and pale look different


def test_no_figure_stays_open(tmp_path):
    from matplotlib import pyplot

    plots.timeline(tmp_path / "e.png", {"a": [(0, 0, 1, 0, True)]}, "x", "y", "t")
    plots.curves(tmp_path / "d.png", {"a": ([0, 1], [0, 1])}, "x", "y", "t")
    assert pyplot.get_fignums() == []


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
