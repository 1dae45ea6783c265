"""Text of others, made harmless: what cannot be seen or drives a terminal is written out."""

from __future__ import annotations

import re
from typing import Any

# What cannot be seen or turns the text around it: written out, so that a page reads as its file does. ZERO WIDTH
# (NON-)JOINER stays: emoji and whole scripts are made with it.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Control characters, direction marks and what has no width as their code points; no lone surrogates."""
    return _HIDDEN.sub(_code_point, text)


def short(value: Any, most: int = 120) -> str:
    """repr of a value for a message: never long, whatever the value; of text the middle is left out."""
    if isinstance(value, dict | list | tuple | set | frozenset):
        parts = [*value, *value.values()] if isinstance(value, dict) else list(value)
        if len(parts) > 8 or any(isinstance(part, dict | list | tuple | set | frozenset) for part in parts):
            return f"a {type(value).__name__} of {len(value)}"  # one part may stand in it a million times
        inner = ", ".join(short(part, most) for part in parts)
        return _cut(f"{type(value).__name__} of {inner}" if isinstance(value, dict) else f"[{inner}]", most)
    if isinstance(value, int) and abs(value) >= 10**30:  # its digits may be more than Python writes
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, str | bytes) and len(value) > 4 * most:
        return _cut(repr(value[: 2 * most]), most)
    return _cut(repr(value), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 3 :]}"


def _code_point(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xD800 <= code < 0xE000:
        return "\ufffd"
    return f"\u27e8U+{code:04X}\u27e9"
