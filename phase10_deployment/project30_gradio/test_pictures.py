"""Drawings hold what they are told, no more, and nothing that a browser would take for anything else."""

import base64
import io
import re

import pytest
from PIL import Image

from phase10_deployment.project30_gradio.blocks_now import Row, Snapshot
from phase10_deployment.project30_gradio.guessing import Guess
from phase10_deployment.project30_gradio.memory_pictures import blocks_picture, guess_picture, prefix_picture
from phase10_deployment.project30_gradio.pictures import (
    attention_picture,
    heads_picture,
    odds_picture,
    png,
    shown,
    tokens_picture,
    visible_text,
)
from phase10_deployment.project30_gradio.talking import Token

EVIL = '<script>alert("${1}{{2}}`")</script>'
WORDS = [Token(7, "The"), Token(8, " king"), Token(9, "\n")]


def boxes(html, kind):
    """The texts of tokens of a kind."""
    return re.findall(rf'<span class="pg-token {kind}" title="[^"]*">([^<]*)', html)


def test_nothing_is_taken_for_markup_or_for_a_template():
    for html in (shown(EVIL), tokens_picture([Token(1, EVIL)]), attention_picture([Token(1, EVIL)], [[1.0]])):
        assert "<script" not in html and "${" not in html and "{{" not in html and "`" not in html
    assert odds_picture([EVIL], [1.0], [1.0], True).count("<script") == 0
    now = Snapshot((Row(0, EVIL, 3, (0,)),), (), 2, 16, 64, 0, 0, 0)
    assert "<script" not in blocks_picture(now, [0, 1])


def test_tokens_stand_in_order_with_their_numbers():
    html = tokens_picture(WORDS)
    assert re.findall(r'title="token (\d+)">([^<]*)<i>', html) == [("7", "The"), ("8", "␣king"), ("9", "↵")]
    assert "<b>3</b><span>tokens" in html and "<b>3.00</b><span>characters a token" in html
    assert "<i>" not in tokens_picture(WORDS, ids=False) and visible_text("\t") == "⇥"


def test_odds_show_the_likeliest_first_and_grey_what_is_cut():
    html = odds_picture(["a", "b", "c"], [0.2, 0.5, 0.3], [0.0, 0.6, 0.4], whole=True)
    rows = re.findall(r'pg-odds( pg-out)?"><code>(\w)</code>.*?<span>([\d.]+%)</span><b>([\d.]+%)</b>', html)
    assert rows == [("", "b", "50.0%", "60.0%"), ("", "c", "30.0%", "40.0%"), (" pg-out", "a", "20.0%", "0.0%")]
    assert "<b>2</b><span>tokens may be drawn, of the vocabulary" in html and "<b>20.0%</b>" in html
    assert "1.49 → 0.97" in html
    assert "which is all that the API tells" in odds_picture(["a"], [0.2], [1.0], whole=False)


def test_a_map_has_a_square_for_each_pair_and_none_above_the_diagonal():
    weights = [[1.0, 0, 0], [0.25, 0.75, 0], [0.1, 0.2, 0.7]]
    html = attention_picture(WORDS, weights)
    assert html.count('class="pg-weight"') == 6 and "␣king looks at The: 25.0%" in html
    assert [float(x) for x in re.findall(r"opacity:([\d.]+)", html)] == [1.0, 0.25, 0.75, 0.1, 0.2, 0.7]
    assert html.count("<text") == 6
    many = [Token(i, "x") for i in range(60)]
    assert "<text" not in attention_picture(many, [[1 / 60] * 60] * 60)  # they would lie on each other


def test_small_maps_are_pictures_of_their_weights():
    image = Image.open(io.BytesIO(base64.b64decode(png([[1.0, 0.0], [0.5, 0.5]]).split(",")[1])))
    assert image.size == (2, 2) and image.getpixel((0, 0)) == (29, 78, 216) and image.getpixel((1, 0))[0] > 240
    assert image.getpixel((0, 1)) == image.getpixel((1, 1))
    html = heads_picture([[[1.0]], [[1.0]]], 1)
    assert html.count("<img") == 2 and html.index("pg-chosen") > html.index('alt="head 0"')


def test_blocks_add_up():
    rows = (Row(0, "one", 40, (3, 1, 5)), Row(2, "two", 33, (3, 1, 6)))
    html = blocks_picture(Snapshot(rows, (3, 1, 7), 10, 16, 64, 1, 0, 0), range(10))
    assert re.findall(r"<div><b>(\d+)</b><span>", html) == ["2", "4", "2", "1", "5"]  # run, used, saved, kept, free
    grid = re.search(r'<div class="pg-blocks">(.*?)</div>', html)[1]
    titles = re.findall(r'title="block (\d+): ([^"]*)"', grid)
    assert [int(block) for block, _ in titles] == list(range(10))
    told = dict(titles)
    assert told["3"] == "2 rows share it" and told["5"] == "row 0" and told["7"] == "kept by the tree"
    assert told["0"] == "free" and "1 wait" in html
    chips = re.findall(r'title="(\d+)% full"[^>]*>(\d+)<', html)
    assert chips == [("100", "3"), ("100", "1"), ("50", "5"), ("100", "3"), ("100", "1"), ("6", "6")]


def test_what_was_found_is_green():
    html = prefix_picture([(WORDS, 2)])
    assert boxes(html, "pg-found") == ["The", "␣king"] and boxes(html, "pg-read") == ["↵"]
    assert "<b>2 of 3</b> tokens found (67%)" in html


def test_guesses_are_told_apart_and_counted():
    guesses = [Guess([1, 2, 3], 2, 4), Guess([], 0, 5)]
    html = guess_picture(WORDS[:1], guesses, {i: str(i) for i in range(6)})
    assert boxes(html, "pg-kept-guess")[:2] == ["1", "2"] and boxes(html, "pg-refused")[:1] == ["3"]
    assert boxes(html, "pg-own")[:2] == ["4", "5"]
    numbers = re.findall(r"<div><b>([^<]*)</b>", html)
    assert numbers == ["4", "2", "2.00", "2 of 3", "67%"]  # tokens, runs, tokens a run, kept, accepted


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
