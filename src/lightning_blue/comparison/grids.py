"""A table of texts, and the formats that it is written in: Markdown, LaTeX, HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lightning_blue.reporting.tables import markdown_table
from lightning_blue.reporting.text import inline

if TYPE_CHECKING:
    import pandas as pd

IMPROVED = "↑"  # behind a value that BLUE improves
LATEX = {"±": r"$\pm$", "↑": r"$\uparrow$", "→": r"$\rightarrow$", "×": r"$\times$", "−": "-"}


class Cell(NamedTuple):
    """A text, whether it is the best of its column, and whether BLUE improves it."""

    text: str
    best: bool = False
    improved: bool = False

    @property
    def marked(self) -> str:
        """The text with its mark."""
        return _marked(self.text, self)


@dataclass(frozen=True)
class Grid:
    """A table to read.

    Attributes:
        name: of its files.
        title: a heading.
        caption: sentences that say what the numbers are, in plain text.
        header: of the columns.
        rows: cells, as many in each row.
        texts: leading columns that hold words.
    """

    name: str
    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    texts: int = 1

    def markdown(self) -> str:
        """Return heading, table and caption."""
        rows = [
            [
                _marked(f"**{_md(cell.text)}**" if cell.best else _md(cell.text), cell)
                for cell in row
            ]
            for row in self.rows
        ]
        table = markdown_table(rows, [_md(name) for name in self.header])
        return f"## {self.title}\n\n{table}\n\n{self.caption}"

    def latex(self) -> str:
        """Return a ``table`` that needs booktabs and graphicx."""
        styler = self._styled("latex")
        body = styler.to_latex(
            hrules=True,
            column_format="l" * self.texts + "r" * (len(self.header) - self.texts),
            convert_css=True,
        )
        body = body.replace(r"\begin{tabular}", "\\resizebox{\\textwidth}{!}{%\n\\begin{tabular}")
        body = body.replace(r"\end{tabular}", "\\end{tabular}}").rstrip()
        caption = f"{_tex(self.title)}. {_tex(self.caption)}"
        text = f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n{body}\n\\end{{table}}\n"
        for sign, spelled in LATEX.items():
            text = text.replace(sign, spelled)
        return text

    def html(self) -> str:
        """Return heading, table and caption, all of them escaped."""
        table = self._styled("html").to_html(doctype_html=False, border=0)
        return f"<h2>{html.escape(self.title)}</h2>\n{table}\n<p>{html.escape(self.caption)}</p>\n"

    def frame(self) -> pd.DataFrame:
        """Return the marked texts as a data frame; headers may repeat."""
        import pandas as pd

        return pd.DataFrame(
            [[cell.marked for cell in row] for row in self.rows], columns=list(self.header)
        )

    def _styled(self, escape: str) -> pd.io.formats.style.Styler:
        """Return the table with the best cells bold, for either format."""
        import pandas as pd

        escaped: Callable[[str], str] = html.escape if escape == "html" else _tex
        frame = self.frame().set_axis(pd.RangeIndex(len(self.header)), axis="columns")
        bold = pd.DataFrame(
            [["font-weight: bold" if cell.best else "" for cell in row] for row in self.rows],
            columns=frame.columns,
        )
        return (
            frame.style.apply(lambda _: bold, axis=None)
            .hide(axis="index")
            .format(escaped)
            .format_index(lambda place: escaped(self.header[place]), axis="columns")
        )


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def _marked(text: str, cell: Cell) -> str:
    return f"{text} {IMPROVED}" if cell.improved else text


def _md(text: str) -> str:
    """Take nothing as markup; underscores inside words are none."""
    return re.sub(r"(?<=\w)\\_(?=\w)", "_", inline(text))


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text)
