"""HTML in which every text is escaped unless it was made here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from train.visible import visible

_VOID = {"img", "meta", "input", "br"}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Html:
    """A value as HTML that shows it: escaped, with control characters as escapes."""
    if isinstance(value, Html):
        return value
    shown = visible(str(value)).encode("utf-8", "backslashreplace").decode()
    return Html(escape(shown, quote=True))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element. ``class_`` is ``class``, and ``_`` in other attributes is ``-``. Attributes that
    are None or False are left out; True gives one without a value."""
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        parts.append(attribute if value is True else f'{attribute}="{text(value)}"')
    opened = f"<{' '.join(parts)}>"
    return Html(opened if name in _VOID else f"{opened}{join(content)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Parts one after the other, each escaped unless it is HTML."""
    return Html("".join(text(part) for part in parts if part is not None))


def table(
    caption: str, columns: Sequence[object], rows: Iterable[Sequence[object]], **attributes: object
) -> Html:
    """A table that scrolls in a frame of its own. The first cell of each row is its header."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = join(
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    )
    return frame(caption, tag("thead", head), tag("tbody", body), **attributes)


def frame(caption: str, *parts: object, **attributes: object) -> Html:
    """A table of these parts, in a frame that scrolls, with the keyboard as well."""
    inner = tag("table", tag("caption", caption), *parts, **attributes)
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def script_json(values: Any) -> Html:
    """JSON for a script element: nothing in it ends the element or begins another."""
    plain = json.dumps(values, allow_nan=False, separators=(",", ":"))  # ASCII only
    for sign in "<>&":
        plain = plain.replace(sign, f"\\u{ord(sign):04x}")
    return Html(plain)
