"""Text out of tokens: whole characters, nothing that has to be taken back, the same text as decoding all at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase3_core_inference.project8_kv_cache.stopping import TextStream, held_back


def as_bytes(ids):
    return bytes(ids).decode("utf-8", "replace")


def shown(text, stops, cut):
    """The text of a stream over tokens of `cut` bytes each, and its pieces."""
    data = text.encode() if isinstance(text, str) else text
    tokens = [data[i : i + cut] for i in range(0, len(data), cut)]
    stream = TextStream(lambda ids: b"".join(tokens[i] for i in ids).decode("utf-8", "replace"), stops)
    pieces = []
    for i in range(len(tokens)):
        pieces.append(stream.push(i))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


@given(text=st.text(alphabet="aé€😀 E", max_size=30), cut=st.integers(1, 5))
def test_the_pieces_are_the_text(text, cut):
    pieces, stream = shown(text, ["\n\n", "aaaaaaa!"], cut)
    assert "".join(pieces) == text and not stream.stopped
    assert all("\ufffd" not in piece for piece in pieces)


@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    cut=st.integers(1, 4),
)
def test_text_ends_before_the_first_stop(text, stops, cut):
    pieces, stream = shown(text, stops, cut)
    places = [text.find(stop) for stop in stops if stop in text]
    if places and cut == 1:  # token by token, the stop text that is complete first ends it
        ends = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        text = text[: min(text.find(s, 0, ends) for s in stops if text.find(s, 0, ends) >= 0)]
        assert stream.stopped and "".join(pieces) == text
    elif places:
        assert stream.stopped and text.startswith("".join(pieces))
        assert not any(stop in "".join(pieces) for stop in stops)
    else:
        assert not stream.stopped and "".join(pieces) == text


def test_a_stop_text_within_a_character_of_several_tokens():
    pieces, stream = shown("ja → nein", ["→"], 1)
    assert "".join(pieces) == "ja " and stream.stopped
    assert shown("ja → nein", ["→ ne"], 2)[0][-3:] == ["", "", ""]


def test_what_may_become_a_stop_waits_no_longer_than_it_must():
    stream = TextStream(as_bytes, ["END"])
    assert [stream.push(byte) for byte in b"aENxEEND"] == ["a", "", "", "ENx", "", "E", "", ""]
    assert stream.stopped and stream.finish() == ""


def test_what_waited_comes_out_at_the_end():
    stream = TextStream(as_bytes, ["END"])
    assert [stream.push(byte) for byte in b"aEN"] == ["a", "", ""] and stream.finish() == "EN"
    half = TextStream(as_bytes)
    assert half.push("é".encode()[0]) == "" and half.finish() == "\ufffd"


def test_bytes_that_are_no_text_do_not_hold_up_what_follows():
    pieces, _ = shown(b"\xff\xfeab", [], 1)
    assert "".join(pieces) == "\ufffd\ufffdab" and pieces[3] == "b"


def test_a_decoder_for_which_a_space_depends_on_the_token_before():
    words = ["Hello", "big", "world"]
    stream = TextStream(lambda ids: " ".join(words[i] for i in ids))
    assert [stream.push(i) for i in range(3)] == ["Hello", " big", " world"]


def test_held_back_is_the_longest_beginning():
    assert held_back("abab", ["ababc"]) == 4
    assert held_back("xab", ["abx", "bcd"]) == 2
    assert held_back("", ["a"]) == held_back("abc", []) == 0


if __name__ == "__main__":
    print(shown("The answer is 7. 😀\nUser: and", ["\nUser:"], 3)[0])
    raise SystemExit(pytest.main([__file__]))
