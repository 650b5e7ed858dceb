"""matplotlib's figures as elements of a page: small, without script, recoloured by its style sheet.

Drawn are sentinel colours, which become `var(--...)` afterwards, so that one figure serves light, dark and paper. The
viewBox is `WIDTH` units wide and text has 10 of them, legible where a phone shows it at that width. Text is never
parsed as mathematics. Same data, same bytes: ids are salted with the figure's name, the date is left out, and no
setting of the user's matplotlib counts.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 360
NUM_SHADES = 9
LINES = tuple(f"c{i}" for i in range(7))
SHADES = tuple(f"h{i}" for i in range(1, NUM_SHADES + 1))
COLOUR = {role: f"#01{at:02x}02" for at, role in enumerate(("bg", "ink", "muted", "rule", *LINES, *SHADES))}
"""Role -> sentinel; the page defines `--role` for light and for dark."""
HALO = "halo"
"""gid of text that the page draws with an outline in its background's colour."""

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOUR["muted"],
    "axes.labelcolor": COLOUR["ink"],
    "text.color": COLOUR["ink"],
    "xtick.color": COLOUR["muted"],
    "ytick.color": COLOUR["muted"],
    "xtick.labelcolor": COLOUR["ink"],
    "ytick.labelcolor": COLOUR["ink"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.color": COLOUR["rule"],
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Alt:
    """What a figure is called and what it shows, for those who do not see it."""

    title: str
    description: str


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in units of the viewBox."""
    total = figure.get_figheight() * 72
    return figure.add_axes((left / WIDTH, bottom / total, width / WIDTH, height / total))


def draw(name: str, alt: Alt, height: float, paint: Callable[[Figure], None]) -> str:
    """An <svg> element of `WIDTH` x `height` units.

    Args:
        name: unique on the page; starts every id in the figure.
        alt: its title and description.
        height: of the viewBox.
        paint: draws, in the colours of `COLOUR`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS | {"svg.hashsalt": name})
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), name, alt, height)


def _inline(svg: str, name: str, alt: Alt, height: float) -> str:
    """matplotlib's file without head and style, ids made the figure's own, colours and fonts the page's."""
    body = svg[svg.index("<g id=") : svg.rindex("</svg>")]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = body.replace(f'id="{HALO}"', f'class="{HALO}"').replace("xlink:href", "href")
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\1{name}-", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r'(?<= )(d|x|y|transform)="[^"]*"', lambda found: _shorter(found[0]), body)
    for role, sentinel in COLOUR.items():
        body = body.replace(sentinel, f"var(--{role})")
    body = re.sub(r"<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"\n\s*", "\n", body).strip()
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{html.escape(alt.title)}</title>'
        f'<desc id="{name}-desc">{html.escape(alt.description)}</desc>\n{body}\n</svg>'
    )


def _shorter(attribute: str) -> str:
    """Coordinates to a hundredth of a unit, on one line."""
    return re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r" ?\n", " ", attribute)).replace(' "', '"')
