"""A run file for people: above each key what it is, behind it where its value comes from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

WIDTH = 100  # characters of a line, where that is ours to say
ENDS = set("\n\x85\u2028\u2029")  # of lines, to YAML 1.1
ORDER = ("seed_everything", "for_model", "model", "data", "update", "guard", "measure", "run")


class _Dumper(yaml.SafeDumper):
    """YAML 1.1 as PyYAML writes it, on one line.

    With quotes around what other loaders take for a number, and ends of lines escaped.
    """


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if set(text) & ENDS or _is_number(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _is_number(text: str) -> bool:
    """Whether it is a number to YAML 1.2, to PyYAML perhaps not: 1e5."""
    try:
        float(text.replace("_", ""))
    except ValueError:
        return False
    return True


_Dumper.add_representer(str, _string)


def spell(value: Any) -> str:
    """Spell a value on one line, as YAML.

    >>> spell([4, 5]), spell(None), spell(1e-05), spell("1e5"), spell("a: b")
    ('[4, 5]', 'null', '1.0e-05', '"1e5"', "'a: b'")
    """
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=True,
        allow_unicode=True,
        width=float("inf"),
        sort_keys=False,
    )
    return text.removesuffix("\n").removesuffix("\n...")


def comment(text: str) -> str:
    r"""Make a line of text a comment; what does not print is spelled.

    >>> comment("a\x1b[0m\nb"), comment("")
    ('# a\\x1b[0m\\nb', '#')
    """
    return f"# {''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)}".rstrip()


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values of nested sections by their dotted keys; a class with its arguments is one.

    >>> flat({"a": {"b": {"c": 1}}, "d": {"class_path": "X"}, "e": {}})
    {'a.b.c': 1, 'd': {'class_path': 'X'}, 'e': {}}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value and "class_path" not in value:
            found |= flat(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found


def write_sections(
    values: Mapping[str, Any], meanings: Mapping[str, str], sources: Mapping[str, str]
) -> str:
    """Write values as nested sections of YAML with comments.

    Args:
        values: by dotted key.
        meanings: of the keys; those that have none get no line above.
        sources: where each value comes from.
    """

    def place(key: str) -> int:
        section = key.partition(".")[0]
        return ORDER.index(section) if section in ORDER else len(ORDER)

    lines: list[str] = []
    above: list[str] = []
    for key in sorted(values, key=place):  # stable: within a section as they come
        *sections, _ = key.split(".")
        shared = _shared(sections, above)
        for depth in range(shared, len(sections)):
            lines += [""] if depth == 0 else []
            lines.append(f"{'  ' * depth}{sections[depth]}:")
        above = sections
        lines += _entry(key, values[key], meanings.get(key), sources[key])
    return "".join(f"{line}\n" for line in lines)


def _shared(sections: list[str], others: list[str]) -> int:
    """Return how many sections two keys have in common, counted from the outermost."""
    count = 0
    for one, other in zip(sections, others, strict=False):
        if one != other:
            break
        count += 1
    return count


def _entry(key: str, value: Any, meaning: str | None, source: str) -> Iterator[str]:
    """Yield a key's line, with what it is above it; a long source stands above as well."""
    *sections, name = key.split(".")
    indent = "  " * len(sections)
    line = f"{indent}{name}: {spell(value)}"
    told = [meaning] if meaning else []
    short = len(line) + 4 + len(source) <= WIDTH
    told += [] if short else [source]
    for text in told:
        start = f"{indent}# "
        yield from textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=start)
    yield f"{line}  # {source}" if short else line
