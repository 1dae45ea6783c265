"""Text of others, made harmless: what cannot be seen or drives a terminal is written out."""

from __future__ import annotations

import re

# What cannot be seen or turns the text around it: written out, so that a page reads as its file does. ZERO WIDTH
# (NON-)JOINER stays: emoji and whole scripts are made with it.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Control characters, direction marks and what has no width as their code points; no lone surrogates."""
    return _HIDDEN.sub(_code_point, text)


def _code_point(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xD800 <= code < 0xE000:
        return "\ufffd"
    return f"\u27e8U+{code:04X}\u27e9"
