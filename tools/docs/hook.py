"""MkDocs hook: puts in what is made from the code, and brings files that pages link to.

A line ``<!-- made: NAME -->`` in a page is replaced by that part of `parts`. Links that lead out of
``docs/`` lead to a copy of the file under ``repository/``, so that the site is whole by itself.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from parts import PARTS, ROOT

DOCS = "docs"
COPIES = "repository"
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[^)]*\))")
CODE = re.compile(r"^```.*?^```$|`[^`]+`", flags=re.DOTALL | re.MULTILINE)
MADE = re.compile(r"<!-- made: ([a-z ]+) -->")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".csv": "text"}
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that pages link to, and pages that the menu lacks to it."""
    shown = [file.src_uri for file in files.documentation_pages()]
    waiting = [f"{DOCS}/{uri}" for uri in shown]
    in_menu = [uri for uri in _listed(config.nav) if uri.startswith(f"{COPIES}/")]
    waiting += [uri.removeprefix(f"{COPIES}/") for uri in in_menu]
    known = set(waiting)
    for path in waiting:  # grows while it is read
        if not path.startswith(f"{DOCS}/"):
            files.append(File.generated(config, _place(path), content=_copy(path)))
        text = _text(path) if path.endswith(".md") else ""
        for target in _targets(path, text):
            if target not in known and not target.startswith(f"{DOCS}/"):
                known.add(target)
                waiting.append(target)
    missing = sorted({*shown} - {*_listed(config.nav)})
    if config.nav is not None and missing:
        config.nav.append({"More": missing})
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what is made from the code, and turn links to files of the repository."""
    uri = page.file.src_uri
    path = uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else f"{DOCS}/{uri}"
    if not (ROOT / path).is_file():
        return markdown  # the copy of a file that is no page
    text = _outside_code(markdown, lambda part: LINK.sub(lambda m: _turned(path, uri, m[1]), part))
    return MADE.sub(lambda found: PARTS[found[1]](), text)


def _turned(path: str, uri: str, link: str) -> str:
    """Return a link from a file of the repository as it is from that file's page on the site."""
    if "://" in link or link.startswith("mailto:"):
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    if not (ROOT / target).exists():
        return link  # MkDocs complains
    place = target.removeprefix(f"{DOCS}/") if target.startswith(f"{DOCS}/") else _place(target)
    return posixpath.relpath(place, posixpath.dirname(uri) or ".")


def _targets(path: str, text: str) -> Iterator[str]:
    """Yield the files and folders that a page links to, by their paths in the repository."""
    for link in LINK.findall(CODE.sub("", text)):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        if "://" not in link and (ROOT / target).exists():
            yield target


def _place(path: str) -> str:
    """Return where the copy of a file or folder stands."""
    return f"{COPIES}/{path}" if path.endswith(".md") else f"{COPIES}/{path}.md"


def _copy(path: str) -> str:
    """Return the page of a file as it is, or of the names in a folder."""
    file = ROOT / path
    if path.endswith(".md"):
        return _text(path)
    if file.is_dir():
        names = sorted(each.name + "/" * each.is_dir() for each in file.iterdir())
        listed = "\n".join(f"- `{name}`" for name in names if not name.startswith(("_", ".")))
        return f"{UNSEARCHED}# {path}/\n\n{listed}\n"
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f'{UNSEARCHED}# {path}\n\n````{language} linenums="1"\n{_text(path)}````\n'


def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _listed(nav: Any) -> Iterator[str]:
    """Yield the pages of the menu."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        yield from (uri for each in nav.values() for uri in _listed(each))
    elif isinstance(nav, list):
        yield from (uri for each in nav for uri in _listed(each))


def _outside_code(text: str, change: Any) -> str:
    """Change text, but nothing in its code."""
    parts, end = [], 0
    for found in CODE.finditer(text):
        parts += [change(text[end : found.start()]), found[0]]
        end = found.end()
    return "".join([*parts, change(text[end:])])
