"""The files of a comparison: Markdown, CSV, LaTeX, a page of HTML that needs no other file, W&B."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_blue.comparison.grids import Grid
from lightning_blue.comparison.runs import LeftOut
from lightning_blue.reporting.text import inline
from lightning_blue.support.storage import make_folder, write_atomic

FOLDER = "comparison"  # beside the runs
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto;
  max-width: 80rem; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid #999 } td { border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
p { color: #555; max-width: 60rem } img { max-width: 100% }"""

# Files of a comparison that another comparison in the same folder may not have.
OWN = re.compile(
    r"(scores|seconds|improvement|differences|curves|changed)\.csv|curves-\d+-\d+-.+\.png"
)

Records = Mapping[str, Sequence[Mapping[str, Any]]]


def write_comparison(
    folder: Path,
    grids: Sequence[Grid],
    records: Records,
    pictures: Mapping[str, bytes],
    left_out: Sequence[LeftOut],
) -> None:
    """Write ``comparison.md``, ``.html`` and ``.tex``, CSV files, and pictures.

    CSV files and curves of an earlier comparison that this one does not have are removed.

    Raises:
        NotWritten: if the folder cannot be written.
    """
    make_folder(folder)
    tables = {f"{name}.csv": _csv(lines) for name, lines in records.items() if lines}
    drawn = {f"{file_name(name)}.png": each for name, each in pictures.items()}
    files: dict[str, str | bytes] = {**tables, **drawn}
    for path in folder.iterdir():
        if OWN.fullmatch(path.name) and path.name not in files:
            path.unlink()
    for name, content in files.items():
        write_atomic(folder / name, content)
    write_atomic(folder / "comparison.md", _markdown(grids, pictures, left_out))
    write_atomic(folder / "comparison.tex", _latex(grids))
    write_atomic(folder / "comparison.html", _html(grids, pictures, left_out))


def log_to_wandb(
    folder: Path,
    grids: Sequence[Grid],
    pictures: Mapping[str, bytes],
    mode: Literal["offline", "online"],
) -> None:
    """Log every table, and every picture, to a W&B run in the folder.

    Raises:
        InputError: if it is to be online and there is no key.
    """
    import wandb

    from lightning_blue.reporting.wandb_logger import quiet_settings, require_key

    if mode == "online":
        require_key()
    with wandb.init(
        project="lightning-blue",
        name=folder.parent.name if folder.name == FOLDER else folder.name,
        job_type="comparison",
        dir=folder,
        mode=mode,
        settings=quiet_settings(),
    ) as run:
        for grid in grids:
            rows = [[cell.marked for cell in row] for row in grid.rows]
            run.log({f"comparison/{grid.name}": wandb.Table(columns=list(grid.header), data=rows)})
        for name in pictures:
            path = folder / f"{file_name(name)}.png"
            run.log({f"comparison/{name}": wandb.Image(str(path))})


def file_name(name: str) -> str:
    """Return a name with nothing in it that a path or a link would need escaped."""
    return re.sub(r"[^\w.-]+", "-", name)


def _markdown(
    grids: Sequence[Grid], pictures: Mapping[str, bytes], left_out: Sequence[LeftOut]
) -> str:
    parts = ["# Comparison", *(grid.markdown() for grid in grids)]
    parts += [f"## {inline(name)}\n\n![{inline(name)}]({file_name(name)}.png)" for name in pictures]
    if left_out:
        lines = [f"- {inline(left.folder.name)}: {inline(left.reason)}" for left in left_out]
        parts.append("## Runs that are not in the tables\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _latex(grids: Sequence[Grid]) -> str:
    return "% needs \\usepackage{booktabs} and \\usepackage{graphicx}\n\n" + "\n".join(
        grid.latex() for grid in grids
    )


def _html(grids: Sequence[Grid], pictures: Mapping[str, bytes], left_out: Sequence[LeftOut]) -> str:
    parts = [grid.html() for grid in grids]
    for name, picture in pictures.items():
        data = base64.b64encode(picture).decode()
        title = html.escape(name)
        parts.append(f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{data}">\n')
    if left_out:
        items = "".join(
            f"<li>{html.escape(left.folder.name)}: {html.escape(left.reason)}</li>"
            for left in left_out
        )
        parts.append(f"<h2>Runs that are not in the tables</h2>\n<ul>{items}</ul>\n")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>\n'
        f"<style>\n{STYLE}\n</style></head>\n<body>\n<h1>Comparison</h1>\n"
        f"{''.join(parts)}</body></html>\n"
    )


def _csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Write lines with the union of their keys as header, in order."""
    header = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
