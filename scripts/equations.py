"""Typeset the equations of the site while it is built, as drawings in the page, so that no script is fetched.

A hook of mkdocs (mkdocs.yml). GitHub typesets the same LaTeX by itself.
"""

import html
import re
from typing import Any

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

SIZE = 100.0  # units of the drawing in an em
# LaTeX that matplotlib does not know
SPELLINGS = {
    r"\\[lr]Vert": r"\\Vert",
    r"\\lbrace": r"\\{",
    r"\\rbrace": r"\\}",
    r"\\tfrac": r"\\frac",
    r"\\le\b": r"\\leq",
    r"\\ge\b": r"\\geq",
    r"\\text\b": r"\\mathrm",
    r"\\left\(": "(",
    r"\\right\)": ")",
}
COMMANDS = {1: ("M", 2), 2: ("L", 2), 3: ("Q", 4), 4: ("C", 6), 79: ("Z", 0)}  # of matplotlib's paths, in SVG


def drawing(latex: str) -> str:
    """Return a line of LaTeX as an SVG of the text's colour and size; ValueError for what cannot be typeset."""
    spelled = " ".join(latex.split())
    for pattern, replacement in SPELLINGS.items():
        spelled = re.sub(pattern, replacement, spelled)
    font = FontProperties(size=SIZE, family="DejaVu Serif", math_fontfamily="dejavuserif")
    width, height, depth = text_to_path.get_text_width_height_descent(f"${spelled}$", font, ismath=True)
    vertices, codes = text_to_path.get_text_path(font, f"${spelled}$", ismath=True)
    parts, k = [], 0
    points = np.array(vertices) * (1, -1) + (0, height - depth)
    while k < len(codes):
        letter, numbers = COMMANDS[int(codes[k])]
        taken = points[k : k + max(numbers // 2, 1)] if numbers else points[:0]
        parts.append(letter + " ".join(f"{value:.1f}" for value in taken.ravel()))
        k += max(numbers // 2, 1)
    return (
        f'<svg class="equation" role="img" aria-label="{html.escape(latex)}" viewBox="0 0 {width:.1f} {height:.1f}" '
        f'style="height:{height / SIZE:.3f}em;vertical-align:{-depth / SIZE:.3f}em" fill="currentColor">'
        f'<path d="{"".join(parts)}"/></svg>'
    )


def typeset(match: re.Match[str]) -> str:
    """Return what stands for an equation: a line of text's height, or a block with a line for each row."""
    latex = re.sub(r"^\\[(\[]|\\[)\]]$", "", html.unescape(match[2]).strip())
    if match[1] == "span":
        return drawing(latex)
    rows = re.sub(r"\\(begin|end)\{aligned\}|&", "", latex).split(r"\\")
    return "".join(f'<p style="text-align:center">{drawing(row)}</p>' for row in rows if row.strip())


def on_page_content(content: str, **_: Any) -> str:
    """Replace the equations of a page, as mkdocs asks."""
    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', typeset, content, flags=re.S)
