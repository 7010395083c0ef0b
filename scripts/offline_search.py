"""Let the site's search work from the disk without a network. A hook of mkdocs (mkdocs.yml).

mkdocs-material's `offline` plugin loads the script that it needs from elsewhere; the site has it.
"""

from typing import Any

ELSEWHERE, HERE = "https://unpkg.com/iframe-worker/shim", "javascripts/iframe-worker.js"


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Name the site's own script on a page, as mkdocs asks."""
    return output.replace(ELSEWHERE, "../" * page.url.count("/") + HERE)


def on_post_template(output_content: str, **_: Any) -> str:
    """Do the same on pages that are no documents, such as 404.html."""
    return output_content.replace(ELSEWHERE, HERE)
