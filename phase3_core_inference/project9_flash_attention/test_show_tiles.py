"""Tests of the script: its drawing, its arithmetic, and what it refuses."""

import re

import pytest

from phase3_core_inference.project9_flash_attention import show_tiles


def run(tmp_path, capsys, *flags):
    show_tiles.main(["--lengths", "32", "64", "--tile", "16", "--head_size", "8", "--out_dir", str(tmp_path), *flags])
    return capsys.readouterr().out


def test_it_draws_compares_and_counts(tmp_path, capsys):
    out = run(tmp_path, capsys, "--length", "8", "--queries", "2", "--keys", "4")
    drawing = [line.split()[2:] for line in out.splitlines() if line.startswith("  queries")]
    assert drawing == [["/", "."], ["/", "."], ["#", "/"], ["#", "/"]]
    assert "8 tiles: 2 full, 4 masked, 2 skipped; 75% of the matrix is computed" in out
    gaps = re.search(r"largest differences .*: o (\S+), dq (\S+), dk (\S+), dv (\S+)", out)
    assert all(float(gap) < 1e-12 for gap in gaps.groups())
    last, whole = re.search(r" 4-7 .* (-?[\d.]+)\n  softmax over the whole row: +(-?[\d.]+)", out).groups()
    assert last == whole
    plain, tiled = ([float(x) for x in re.findall(r"^ +64 +(.*)$", out, re.MULTILINE)[0].split()][i] for i in (0, 2))
    assert plain > tiled
    assert (tmp_path / "memory.png").stat().st_size > 1000


def test_documents_and_windows_leave_tiles_out(tmp_path, capsys):
    out = run(tmp_path, capsys, "--length", "16", "--documents", "8", "8", "--window", "4")
    drawing = [line.split()[2:] for line in out.splitlines() if line.startswith("  queries")]
    assert drawing == [["/", ".", ".", "."], ["/", "/", ".", "."], [".", ".", "/", "."], [".", ".", "/", "/"]]


@pytest.mark.parametrize(
    "flags", [["--documents", "8", "9"], ["--window", "0"], ["--queries", "0"], ["--length", "2000"]]
)
def test_what_cannot_be_drawn_is_refused(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, capsys, *flags)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


if __name__ == "__main__":
    show_tiles.main(["--lengths", "64", "128"])
    raise SystemExit(pytest.main([__file__]))
