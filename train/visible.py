"""Shows control characters of texts that come from files, so that no terminal obeys them."""

from __future__ import annotations

import re

# C0 without tab and line feed, DEL, C1, line separators, and marks that reverse the direction.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)

_DRAWN = re.compile("(\x1b\\[[0-9;]{0,32}m|\r)")


def visible(text: str) -> str:
    """The text with its control characters as escapes such as ``\\x1b``; tabs and ends of lines
    stay. Only a carriage return before a line feed is dropped."""
    return _CONTROL.sub(_escape, text.replace("\r\n", "\n"))


def visible_log(text: str) -> str:
    """The text of a log for a terminal: colours and carriage returns, with which programs draw
    their progress, stay as well."""
    return "".join(part if _DRAWN.fullmatch(part) else visible(part) for part in _DRAWN.split(text))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
