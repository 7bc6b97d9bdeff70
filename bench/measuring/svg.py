"""The common parts of the SVG pictures here: size, title, subtitle, background, and colours for light and dark.

They are written without a library. Browsers and code hosts draw SVG, in light and in dark mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Final

__all__ = ["WIDTH", "drawing", "text_of"]

WIDTH: Final = 860
"""The width of every picture, in user units: pixels, unless it is scaled."""

# Plain text has the colour of axes and legends; titles and names are darker.
_LIGHT: Final = """
text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #57606a }
.title { font-size: 16px; font-weight: 600; fill: #1f2328 }
.name { font-weight: 600; fill: #1f2328 }
.ground { fill: #ffffff }
"""
_DARK: Final = "text { fill: #9198a1 } .title, .name { fill: #f0f6fc } .ground { fill: #0d1117 }"


def drawing(
    title: str, subtitle: str, body: Iterable[str], *, height: float, left: float, light: str, dark: str
) -> str:
    """A picture, :data:`WIDTH` by ``height``: both titles begin at ``left``, then come the elements of ``body``.

    ``light`` and ``dark`` are the CSS rules for the classes of ``body``; in dark mode both hold, and ``dark`` wins.
    ``text`` elements and the classes ``title`` and ``name`` have rules already.
    """
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"',
        f' aria-label="{text_of(title)}">',
        f"<style>{_LIGHT}{light}\n@media (prefers-color-scheme: dark) {{\n  {_DARK} {dark}\n}}\n</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="{left}" y="26">{text_of(title)}</text>',
        f'<text x="{left}" y="44">{text_of(subtitle)}</text>',
        *body,
        "</svg>",
        "",
    ])  # fmt: skip


def text_of(text: str) -> str:
    """``text``, escaped for an element or an attribute."""
    return escape(text, quote=True)
