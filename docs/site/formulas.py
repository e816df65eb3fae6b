"""Formulas become MathML, which browsers show by themselves. Pages write them as GitHub reads them: ``$...$`` and ``$$...$$``."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)  # as pymdownx.arithmatex marks them


def on_page_content(html: str, **_: Any) -> str:  # mkdocs passes the page by this name
    """Translate the formulas of a page."""
    return FORMULA.sub(mathml, html)


def mathml(formula: re.Match[str]) -> str:
    """MathML of a formula within a line (span), or on a line of its own (div)."""
    latex = html.unescape(formula[2]).strip()
    display = "block" if formula[1] == "div" else "inline"
    return f"<{formula[1]}>{convert(latex, display=display)}</{formula[1]}>"
