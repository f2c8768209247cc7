"""Sections of the report's markdown as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape


def render(markdown: str, images: Mapping[str, str]) -> str:
    """Return markdown as HTML; no HTML in it is taken as such, and nothing outside is referred to.

    Args:
        markdown: a section.
        images: what stands for the source of each image; of another, only its text is shown.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        token = tokens[index]
        source, text = images.get(str(token.attrs.get("src"))), token.content
        if source is None:
            return str(escape(text))
        return Markup('<img src="{}" alt="{}">').format(source, text)

    parser.add_render_rule("image", image)
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll" tabindex="0"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return str(parser.render(markdown))
