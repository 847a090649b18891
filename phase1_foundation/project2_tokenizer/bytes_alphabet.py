"""
Byte Alphabet

This file implements the printable alphabet of byte-level BPE following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - BPE over bytes, no unknown token

Each component is explained with paper references for educational purposes.
"""


def _printable_bytes() -> list[int]:
    """The 188 byte values whose Latin-1 character can be seen: no controls, no blanks, no soft hyphen (0xAD)."""
    return [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


def byte_order() -> list[int]:
    """
    The 256 byte values in the order in which GPT-2 numbers them: id 0 is "!", id 220 is the space.

    PAPER: "Language Models are Unsupervised Multitask Learners", section 2.2 (input representation).
    PAPER CONTEXT: A base vocabulary of 256 bytes can spell every string, so there is no unknown token.
    INTUITION: Merges are files of text lines, so each byte needs a visible character to stand for it.
    IMPLEMENTATION: Visible Latin-1 bytes stand for themselves and come first; the other 68 follow in byte order.
    WHY: Everyone who reads GPT-2's files (tiktoken, Hugging Face) numbers the bytes this way; so do we.

    >>> [chr(b) for b in byte_order()[:3]], byte_order().index(32)
    (['!', '"', '#'], 220)
    """
    visible = _printable_bytes()
    return visible + [b for b in range(256) if b not in set(visible)]


def _byte_to_char() -> dict[int, str]:
    """Byte value -> printable character: itself where visible, else U+0100, U+0101, ... in turn."""
    visible = set(_printable_bytes())
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(0x100 + i) for i, b in enumerate(hidden)}


BYTE_TO_CHAR = _byte_to_char()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
_TRANSLATION = {byte: char for byte, char in BYTE_TO_CHAR.items()}  # for str.translate on Latin-1 text


def to_printable(data: bytes) -> str:
    """
    Write bytes in GPT-2's printable alphabet.

    >>> to_printable(b" caf\\xc3\\xa9")
    'ĠcafÃ©'
    """
    return data.decode("latin-1").translate(_TRANSLATION)


def from_printable(text: str) -> bytes:
    """
    Read bytes back from GPT-2's printable alphabet; a character outside it raises ValueError.

    >>> from_printable("ĠcafÃ©")
    b' caf\\xc3\\xa9'
    """
    try:
        return bytes([CHAR_TO_BYTE[char] for char in text])
    except KeyError as error:
        raise ValueError(
            f"{text!r} holds {error.args[0]!r}, which is not in the 256-character byte alphabet: "
            "is this a special token, or the file of a tokenizer that is not byte-level?"
        ) from None


def encode_utf8(text: str) -> bytes:
    r"""
    UTF-8, and for a lone surrogate the three bytes that the same formula gives it.

    >>> encode_utf8("é\ud800")
    b'\xc3\xa9\xed\xa0\x80'
    """
    return text.encode("utf-8", "surrogatepass")


def decode_utf8(data: bytes) -> str:
    r"""
    The inverse of `encode_utf8`; bytes that are no text at all (half a character, say) become U+FFFD.

    >>> decode_utf8(b"\xed\xa0\x80") == "\ud800", decode_utf8(b"\xc3") == "\ufffd"
    (True, True)
    """
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace")
