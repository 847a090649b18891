"""Our pickle opens no door: plain data comes back, forty hostile files are refused and run nothing.

uv run python phase1_foundation/project2_tokenizer/test_safe_pickle.py
"""

import functools
import io
import os
import pickle
import struct

import numpy as np
import pytest

from common import DATA
from phase1_foundation.project2_tokenizer import safe_pickle
from phase1_foundation.project2_tokenizer.safe_pickle import UnsafePickleError
from phase1_foundation.project2_tokenizer.tokenizer import RULES, BPETokenizer

TEXTS = [
    "The quick brown fox's 3 friends, 12345 of them!  \n\n  They'll jump.",
    "naïve café 漢字 ½ ٣ 👩‍👩‍👧", "\t\r\n x\u00a0y\u2028z",
    "<|endoftext|>a<|pad|>", "", "def f(x):\n\treturn x**2  # squared\n", "aaaaaaaaaaaaaaaaaaaaaaaa" * 20,
]  # fmt: skip


@functools.cache
def prose() -> str:
    return (DATA / "shakespeare.txt").read_text(encoding="utf-8")[:150_000]


@functools.cache
def trained(rule: str = "merges", pattern: str = "gpt2") -> BPETokenizer:
    return BPETokenizer.train([prose(), *TEXTS * 3], 900, ["<|endoftext|>", "<|pad|>"], rule=rule, pattern=pattern)


# --- what we save ---


def test_a_saved_tokenizer_is_plain_data(tmp_path):
    path = tmp_path / "deep" / "tokenizer.pkl"
    trained().save(path)
    fields = pickle.loads(path.read_bytes())
    assert all(type(k) is str and type(v) is int for k, v in fields["vocab"].items())
    assert fields["inverse_vocab"] == {i: token for token, i in fields["vocab"].items()}
    assert fields["merges"] == trained().merges and type(fields["merges"][0]) is tuple
    assert fields["rule"] == "merges" and fields["special_tokens"] == {"<|endoftext|>": 898, "<|pad|>": 899}
    assert kinds(fields) <= {dict, list, tuple, str, int}
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.pkl"]


def kinds(value) -> set[type]:
    """All types in a nested value."""
    inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return {type(value)}.union(*map(kinds, inside))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_saved_tokenizer_is_read_back(tmp_path, rule, protocol):
    tokenizer, path = trained(rule), tmp_path / "t.pkl"
    tokenizer.save(path)
    assert BPETokenizer.load(path) == tokenizer
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol=protocol))
    assert BPETokenizer.load(path) == tokenizer


# --- what others may have made ---


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(marker) -> dict[str, bytes]:
    """Pickles that run code, reach outside, or eat the machine."""
    command = f"touch {marker}"
    deep = b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b"."
    colliding = {i * (2**61 - 1): 0 for i in range(1, 4)}  # all have the hash 0, as many as one likes
    return {
        "os.system": pickle.dumps({"vocab": Payload(os.system, command)}),
        "os.system, protocol 0": pickle.dumps(Payload(os.system, command), protocol=0),
        "os.system, protocol 2": pickle.dumps([Payload(os.system, command)], protocol=2),
        "eval": pickle.dumps({"a": {"b": [Payload(eval, f"open({str(marker)!r}, 'w')")]}}),
        "inst": b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'touch x'\no.",
        "numpy array": pickle.dumps({"vocab": np.zeros(3)}),
        "numpy scalar": pickle.dumps(np.float64(1)),
        "a class of ours": pickle.dumps(safe_pickle.UnsafePickleError("x")),
        "an object": pickle.dumps(io.BytesIO(b"x")),
        "a function": pickle.dumps(len),
        "a float": pickle.dumps({"vocab": 1.5}),
        "bytes": pickle.dumps({"vocab": b"x"}),
        "None": pickle.dumps(None),
        "persistent": b"\x80\x04\x8c\x01xQ.",
        "extension": b"\x80\x02\x82\x01.",
        "buffer": b"\x80\x05\x97.",
        "memo index of 4 billion": b"\x80\x04}r\xff\xff\xff\xff.",
        "string of 4 GB": b"\x80\x04X\xff\xff\xff\xff.",
        "string of 16 EB": b"\x80\x04\x8d" + struct.pack("<Q", 2**64 - 1) + b".",
        "frame beyond the end": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.",
        "nested 200,000 deep": deep,
        "nested three deep": pickle.dumps({"merges": [[("a", "b")]]}),
        "nested through the memo": b"\x80\x04}(\x8c\x01a]\x94\x8c\x01b]h\x00au.",
        "a key nested 400,000 deep": b"\x80\x04}(" + b")" + b"\x85" * 400_000 + b"K\x01u.",
        "a pair nested 400,000 deep": b"\x80\x04}(NN" + b"\x86N" * 400_000 + b"\x86K\x01u.",
        "keys that collide": pickle.dumps({"inverse_vocab": colliding}),
        "an integer of 200 digits": pickle.dumps({"whole_pieces": 10**200}),
        "a million lists": b"\x80\x04}(" + b"]" * 1_000_000 + b"u.",
        "frame longer than any": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
        "itself": b"\x80\x04]\x94h\x00a.",
        "itself inside": b"\x80\x04}\x94\x8c\x01ah\x00s.",
        "stack underflow": b"\x80\x04u.",
        "nothing under the mark": b"\x80\x04(u.",
        "unhashable key": b"\x80\x04}]]s.",
        "memo never written": b"\x80\x04h\x05.",
        "no stop": b"\x80\x04}",
        "nothing": b"",
        "text": b"hello, world",
        "zeros": bytes(1000),
    }


@pytest.mark.parametrize("name", hostile("x"))
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, name):
    marker, path = tmp_path / "ran", tmp_path / "bad.pkl"
    path.write_bytes(hostile(marker)[name])
    with pytest.raises(ValueError, match=r"bad\.pkl (is refused|is damaged|is no tokenizer)"):
        BPETokenizer.load(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "numpy array", "bytes", "persistent", "extension", "buffer"])
def test_what_could_do_more_than_plain_data_is_refused_by_its_opcode(name):
    with pytest.raises(UnsafePickleError, match=r"opcode \w+ can do more than plain data"):
        safe_pickle.read_plain(hostile("x")[name])


def test_deep_or_large_or_colliding_data_is_refused_for_what_it_is():
    for name, message in (
        ("nested 200,000 deep", "more than 64 dicts and lists"), ("a million lists", "more than 64 dicts and lists"),
        ("nested three deep", "nested more deeply"), ("nested through the memo", "nested more deeply"),
        ("a key nested 400,000 deep", "opcode EMPTY_TUPLE"), ("a pair nested 400,000 deep", "a pair of NoneType"),
        ("keys that collide", "a key of a dict is neither"), ("an integer of 200 digits", "an integer of 84 bytes"),
        ("itself inside", "nested more deeply"), ("string of 16 EB", "longer than it is"),
    ):  # fmt: skip
        with pytest.raises(UnsafePickleError, match=message):
            safe_pickle.loads(hostile("x")[name])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_is_read_as_the_standard_library_reads_it(protocol):
    numbers = [0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**63 - 1, -1, -(2**31), -(2**63)]
    shared = ("a", "\ud800é")
    fields = {"n": numbers, "pairs": [shared, shared], "none": None, "yes": True, "no": False, "text": "x" * 70_000}
    fields |= {"by id": {i: str(i) for i in range(3000)}, "empty": {}, "nothing": []}
    data = pickle.dumps(fields, protocol=protocol)
    assert repr(safe_pickle.loads(data)) == repr(pickle.loads(data)) == repr(fields)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    trained().save(tmp_path / "t.pkl")
    data = (tmp_path / "t.pkl").read_bytes()
    for size in [*range(0, 200), *range(200, len(data), 997)]:
        with pytest.raises(UnsafePickleError, match=r"cut off|damaged"):
            safe_pickle.loads(data[:size])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": {"a": "1"}}, "vocab must map str to int"), ({"merges": ["a"]}, "pairs of str"),
        ({"merges": [("Q", "Q")]}, "'QQ' is not in vocab"), ({"vocab": {"a": 1}}, "lacks 255 of the 256 bytes"),
        ({"rule": "other"}, "rule='other'"), ({"rule": 5}, "rule is int, expected str"), ({"pattern": "("}, "pattern="),
        ({"merges": [("t", "h"), ("t", "h")]}, "pair twice"), ({"special_tokens": {"<x>": 5}}, "an id of its own"),
        ({"special_tokens": {"<x>": -1}}, "from 0 up"), ({"normalization": "NFZ"}, "normalization='NFZ'"),
        ({"special_tokens": {"<x>": 10**12}}, "holds the id 1000000000000"), ({"kind": "char"}, "kind='char'"),
        ({"normalization": 1}, "normalization is int"), ({"always_matched": "<|pad|>"}, "must be a list of str"),
        ({"always_matched": ["the"]}, "'the', which is no special token"), ({"other_entries": []}, "other_entries is"),
    ],
)  # fmt: skip
def test_plain_data_that_is_no_tokenizer_is_refused(tmp_path, change, message):
    path = tmp_path / "t.pkl"
    path.write_bytes(pickle.dumps(trained().to_dict() | change))
    with pytest.raises(ValueError, match=message) as error:
        BPETokenizer.load(path)
    assert "t.pkl is no tokenizer" in str(error.value)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        BPETokenizer.load(tmp_path / "none.pkl")


if __name__ == "__main__":
    for name, data in hostile("/dev/null").items():
        try:
            safe_pickle.loads(data, name)
            print(f"{name}: plain data")
        except UnsafePickleError as error:
            print(error)
    raise SystemExit(pytest.main([__file__, "-q"]))
