"""How values look to a reader of the page: numbers, shares, and text that came from somebody else.

Prompts, responses and names are hostile until shown otherwise. `visible` leaves nothing in them that a browser, a
terminal or an eye obeys: control and format characters appear as what they are, `<U+202E>`.
"""

from __future__ import annotations

import math
import unicodedata

MISSING = "–"
SHADES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Lower edges of the shades of a token, in the unit of its divergence; below the first there is none."""

_OBEYED = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def number(value: float | str | None) -> str:
    """Four significant digits of a float, all digits of a count, words as they are; a dash for what is not known."""
    if isinstance(value, str):
        return value
    if value is None or math.isnan(value):
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def percent(share: float | None) -> str:
    """A share as per cent, to two decimals; more where they would read 0, and less than all never reads 100."""
    if share is None or math.isnan(share):
        return MISSING
    text = f"{100 * share:.4g}" if 0 < share < 0.0001 else f"{100 * share:.2f}"
    if text == "100.00" and share < 1:
        return ">99.99 %"
    return f"{text.rstrip('0').rstrip('.') if '.' in text and 'e' not in text else text} %"


def visible(text: str, limit: int = 2000) -> str:
    """`text` with control, format and unassigned characters written out, cut after `limit` characters."""
    out = "".join(f"<U+{ord(c):04X}>" if unicodedata.category(c) in _OBEYED else c for c in text[:limit])
    return out if len(text) <= limit else f"{out}…"


def visible_token(text: str, limit: int = 120) -> str:
    """As `visible`, with the breaks of the text kept behind a sign: `⏎` and a new line, `⇥`."""
    parts = (("⏎\n" if c == "\n" else "⇥" if c == "\t" else visible(c)) for c in text[:limit])
    return "".join(parts) + ("…" if len(text) > limit else "")


def shade(value: float | None) -> int:
    """0 to 8: how many of `SHADES` a divergence reaches; 0 where there is none."""
    if value is None or math.isnan(value):
        return 0
    return sum(value >= edge for edge in SHADES)
