"""The file of a sweep: a grid in the format of W&B sweeps, and the combinations of its axes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lightning_blue.cli.run_files import located
from lightning_blue.support.errors import InputError

Values = Mapping[str, Any]  # of one combination, by axis

RUN_FILES = " + "  # between the run files of one value
OWN_KEYS = ("name", "method", "parameters")
PASSED_OVER = (  # what W&B reads, and a grid has no use for
    "command",
    "description",
    "entity",
    "metric",
    "program",
    "project",
    "run_cap",
)
DECIDED = ("run.name", "run.root", "ckpt_path", "measure.unedited_cache")  # by the sweep


@dataclass(frozen=True)
class Sweep:
    """Axes, and what is the same in all runs.

    Attributes:
        path: of the file; run files are named relative to it.
        name: folder of the runs.
        axes: the values of each axis, in the file's order.
        fixed: parameters with one ``value``.
        order: names of all parameters as the file has them; of run files, later ones count more.
        named: axes that runs are named by: those with several values in the file.
    """

    path: Path
    name: str
    axes: Mapping[str, Sequence[Any]]
    fixed: Values
    order: tuple[str, ...]
    named: tuple[str, ...]

    def combinations(self) -> Iterator[Values]:
        """Yield the product of the axes; the last one changes fastest."""
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))

    def args(self, values: Values) -> list[str]:
        """Return what `fit` is told of a combination: run files, then keys, which override them."""
        given = {**self.fixed, **values}
        parameters = {name: given[name] for name in self.order}
        files = [
            f"--config={path}"
            for value in parameters.values()
            if is_run_files(value)
            for path in self._run_files(value)
        ]
        keys = [
            f"--{key}={_spelled(value)}"
            for key, value in parameters.items()
            if not is_run_files(value)
        ]
        return files + keys

    def _run_files(self, value: str) -> list[Path]:
        return [located(self.path.parent / part.strip()) for part in value.split(RUN_FILES)]

    def narrowed(self, choices: Sequence[str]) -> Sweep:
        """Keep of axes only the values that are named, each as ``AXIS=VALUE``.

        Raises:
            InputError: for an axis or a value that the file does not have.
        """
        kept: dict[str, list[Any]] = {}
        for choice in choices:
            axis, _, text = choice.partition("=")
            known = {**self.axes, **{name: [value] for name, value in self.fixed.items()}}
            if axis not in known:
                raise InputError(
                    f"the sweep has no axis {axis!r}",
                    where=str(self.path),
                    hint=f"its axes are {', '.join(self.axes)}; keys that it does not vary are "
                    "given as --KEY=VALUE",
                )
            found = [value for value in known[axis] if _is(value, text)]
            if not found:
                raise InputError(
                    f"{axis} has no value {text!r}",
                    where=str(self.path),
                    hint=f"choose of {', '.join(_spelled(value) for value in known[axis])}",
                )
            kept.setdefault(axis, []).extend(found)
        return replace(
            self, axes={axis: kept.get(axis, values) for axis, values in self.axes.items()}
        )


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    A parameter is an axis (``values``) or fixed (``value``). A value that ends in ``.yaml`` is a
    run file, relative to the sweep file, or several with `` + `` between, later ones counting more;
    its axis may have any name. Every other parameter is a key of ``fit`` (``update.plan``).

    Raises:
        InputError: if it cannot be read, is no grid, or varies what a sweep decides by itself.
    """
    path = located(path)
    content = _read(path)
    method = content.get("method", "grid")
    if method != "grid":
        raise InputError(
            f"the sweep's method is {method!r}",
            where=str(path),
            hint="write method: grid; searching is W&B's part (`wandb sweep`, `wandb agent`)",
        )
    for key in content:
        if key not in (*OWN_KEYS, *PASSED_OVER):
            raise InputError(
                f"a sweep has no key {key!r}",
                where=str(path),
                hint=f"put keys of runs under parameters; a sweep has {', '.join(OWN_KEYS)}",
            )
    axes: dict[str, Sequence[Any]] = {}
    fixed: dict[str, Any] = {}
    for key, parameter in _parameters(content, path).items():
        if "values" in parameter:
            axes[key] = parameter["values"]
        else:
            fixed[key] = parameter["value"]
    named = tuple(axis for axis, values in axes.items() if len(values) > 1) or tuple(axes)
    return Sweep(
        path, str(content.get("name", path.stem)), axes, fixed, (*content["parameters"],), named
    )


def is_run_files(value: Any) -> bool:
    """Say whether a parameter's value names run files."""
    return isinstance(value, str) and value.endswith((".yaml", ".yml"))


def short(axis: str, value: Any) -> str:
    """Name a value in a run's id.

    >>> short("update.plan", "even"), short("seed_everything", 3), short("update.ridge", 0.5)
    ('even', 'seed3', 'ridge0.5')
    >>> short("method", "../methods/rect.yaml + instruct.yaml")
    'rect-instruct'
    """
    if is_run_files(value):
        return "-".join(Path(part.strip()).stem for part in value.split(RUN_FILES))
    if isinstance(value, str):
        return Path(value).stem
    return axis.rpartition(".")[2].removesuffix("_everything") + _spelled(value)


def _parameters(content: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    parameters = content.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise InputError(
            "the sweep has no parameters",
            where=str(path),
            hint="write parameters: {update.plan: {values: [even, boundary]}}, for instance",
        )
    for key, parameter in parameters.items():
        where = f"{path}, parameters.{key}"
        if key in DECIDED:
            raise InputError(
                f"{key} is decided by the sweep", where=where, hint="leave it out of the file"
            )
        told = parameter if isinstance(parameter, dict) else {}
        if len(told) != 1 or not ({"value", "values"} & set(told)):
            raise InputError(
                f"a parameter of a grid has either values or value, not {parameter!r}",
                where=where,
                hint="write {values: [A, B]} or {value: A}; nested keys are joined by dots, as in "
                "update.plan",
            )
        if "values" in told and not (isinstance(told["values"], list) and told["values"]):
            raise InputError(
                "values must be a list of at least one value", where=where, hint="{values: [A, B]}"
            )
    return parameters


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(
            "there is no such sweep file", where=str(path), hint="conf/paper has some"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"the sweep file is not valid YAML: {' '.join(str(error).split())}",
            where=str(path),
            hint="compare it with conf/paper/small_table2.yaml",
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            "the sweep file holds no keys and values",
            where=str(path),
            hint="compare it with conf/paper/small_table2.yaml",
        )
    return content


def _is(value: Any, text: str) -> bool:
    """Say whether a value is meant by a text: as in the file, or as Python and W&B spell it."""
    return text in (str(value), _spelled(value))


def _spelled(value: Any) -> str:
    """Write a value so that a run's parser reads the same."""
    if isinstance(value, str):
        return value
    dumped = yaml.safe_dump(value, default_flow_style=True, width=10**9)
    return str(dumped).strip().removesuffix("\n...")
