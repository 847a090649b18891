"""Tests of the choice of tiles: the table's first that fits, or the fastest where tuning is asked for."""

import pytest

from phase3_core_inference.project9_flash_attention import tiles
from phase3_core_inference.project9_flash_attention.tiles import CANDIDATES, Tile, launch_best, tuning, width_of

errors = pytest.importorskip("triton.runtime.errors")


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(tiles, "_chosen", {})


def test_widths_are_powers_of_two():
    assert [width_of(*sizes) for sizes in ((1,), (16,), (17,), (64, 96), (256, 8))] == [16, 16, 32, 128, 256]


def test_the_table_holds_what_the_hardware_takes():
    for kind, table in CANDIDATES.items():
        assert set(table) == {32, 64, 128, 256}, kind
        for tile in (tile for candidates in table.values() for tile in candidates):
            assert tile.m >= 16 and tile.n >= 16 and not tile.m & (tile.m - 1) and not tile.n & (tile.n - 1), tile
            assert tile.warps in (4, 8) and 1 <= tile.stages <= 4, tile
        assert all(len(set(candidates)) == len(candidates) for candidates in table.values()), kind


def test_the_first_that_fits_is_taken_and_remembered():
    tried = []

    def launch(tile):
        tried.append(tile)
        if tile.m > 64:
            raise errors.OutOfResources(300_000, 232_448, "shared memory")

    fitting = next(tile for tile in CANDIDATES["forward"][128] if tile.m <= 64)
    launch_best("forward", 128, 1000, launch)
    assert tried[0] == CANDIDATES["forward"][128][0] and tried[-1] == fitting and len(tried) > 1
    launch_best("forward", 128, 1000, launch)
    assert tried[-2:] == [fitting, fitting]  # nothing else is tried again
    launch_best("forward", 16, 1000, tried.append)
    assert tried[-1] == CANDIDATES["forward"][32][0]  # the narrowest there is


def test_where_nothing_fits_that_is_said():
    def launch(tile):
        raise errors.OutOfResources(300_000, 65_536, "shared memory")

    with pytest.raises(ValueError, match=r"no tile of 'keys' for heads of 256 fits this GPU: use smaller heads"):
        launch_best("keys", 256, 100, launch)


def test_tuning_keeps_the_fastest_by_length(monkeypatch):
    asked = []

    def fastest(candidates, launch):
        asked.append(candidates)
        return candidates[-1]

    monkeypatch.setattr(tiles, "fastest", fastest)
    launched = []
    with tuning():
        launch_best("forward", 64, 1000, launched.append)
    launch_best("forward", 64, 1023, launched.append)  # of the same length up to a factor of two
    launch_best("forward", 64, 5000, launched.append)
    last, first = CANDIDATES["forward"][64][-1], CANDIDATES["forward"][64][0]
    assert launched == [last, last, first] and asked == [CANDIDATES["forward"][64]]


def test_each_size_may_be_tuned_when_it_is_first_used(monkeypatch):
    asked, launched = [], []
    monkeypatch.setattr(tiles, "fastest", lambda candidates, launch: asked.append(candidates) or candidates[-1])
    monkeypatch.setattr(tiles, "_when", "never")  # restored after the test
    launch_best("forward", 64, 1000, launched.append)
    tiles.tune_at_first_use()
    for T in (1000, 1000, 5000):
        launch_best("forward", 64, T, launched.append)
    first, last = CANDIDATES["forward"][64][0], CANDIDATES["forward"][64][-1]
    assert launched == [first, last, last, last] and len(asked) == 2


def test_the_fastest_is_measured_among_those_that_fit(monkeypatch):
    times = {Tile(64, 64, 4, 2): 3.0, Tile(32, 64, 4, 2): 1.0, Tile(16, 64, 4, 2): 2.0}

    def bench(call, **options):
        return call()

    def launch(tile):
        if tile.m == 64:
            raise errors.OutOfResources(300_000, 65_536, "shared memory")
        return times[tile]

    monkeypatch.setattr("triton.testing.do_bench", bench)
    assert tiles.fastest(list(times), launch) == Tile(32, 64, 4, 2)
    assert tiles.fastest([Tile(64, 64, 4, 2)], launch) == Tile(64, 64, 4, 2)


if __name__ == "__main__":
    for kind, table in CANDIDATES.items():
        print(f"{kind}: " + ", ".join(f"{width}: {tuple(found[0])}" for width, found in table.items()))
    raise SystemExit(pytest.main([__file__]))
