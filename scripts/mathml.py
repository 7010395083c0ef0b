"""Convert the equations of the site to MathML while it is built: browsers render it without a
script, also from disk. A hook of mkdocs (mkdocs.yml); GitHub typesets the same LaTeX itself.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert


def mathml(match: re.Match[str]) -> str:
    """Return the MathML of an element of `pymdownx.arithmatex`."""
    tag, latex = match[1], html.unescape(match[2]).strip()
    latex = re.sub(r"^\\[(\[]|\\[)\]]$", "", latex).strip()
    equation = convert(latex, display="inline" if tag == "span" else "block")
    return equation if tag == "span" else f"<p>{equation}</p>"


def on_page_content(content: str, **_: Any) -> str:
    """Replace the equations of a page, as mkdocs asks."""
    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', mathml, content, flags=re.S)
