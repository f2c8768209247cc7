"""What `locate` and `tune` have found: folders by default name, and values for a run file."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_blue.cli.settings_file import Proposal
from lightning_blue.locating import FILE as LOCATE_FILE
from lightning_blue.support.errors import InputError
from lightning_blue.tuning import FILE as TUNE_FILE

TUNED, LOCATED = "tuned", "located"  # folders of both commands' folders
NOWHERE = "none"  # to look into no folder
LAYERS, PLAN, OFFSET = "update.layers", "update.plan", "data.offset"
RATE, FIRST_STEP = "model.target.learning_rate", "model.target.first_step"

Found = dict[str, Proposal]


def run_name(model: str, data: str) -> str:
    """Name a run after its model and facts.

    >>> run_name("openai-community/gpt2", "../my facts.jsonl"), run_name("..", "/")
    ('gpt2_my_facts', 'model_facts')
    """
    stems = [re.sub(r"\.(jsonl?|csv|parquet|gguf)$", "", Path(name).name) for name in (model, data)]
    words = [re.sub(r"[^\w.-]+", "_", stem).strip("._-") for stem in stems]
    return f"{words[0] or 'model'}_{words[1] or 'facts'}"


def tuned_folder(model: str, data: str, plan: str) -> Path:
    """Return the folder that `tune` writes into by default."""
    return Path(TUNED) / f"{run_name(model, data)}_{plan}"


def located_folder(model: str, data: str) -> Path:
    """Return the folder that `locate` writes into by default."""
    return Path(LOCATED) / run_name(model, data)


def proposals(own: Namespace, plan: str) -> Found:
    """Return what was found for a model, by key of the configuration.

    What `tune` found goes before what `locate` found: it was measured on edits.

    Args:
        own: arguments of `init`.
        plan: of the run, as far as flags say it.

    Raises:
        InputError: if a folder that is named holds neither file, or another model's.
    """
    named = own.found or []
    if named == [NOWHERE]:
        return {}
    defaults = [located_folder(own.model, own.data), tuned_folder(own.model, own.data, plan)]
    folders = [Path(name) for name in named] or defaults
    files = [folder / name for name in (LOCATE_FILE, TUNE_FILE) for folder in folders]
    there = [file for file in files if file.is_file()]
    for folder in map(Path, named):
        if not any(file.parent == folder for file in there):
            raise _nothing_found(folder)
    found: Found = {}
    for file in there:
        content = read(file, own.model)
        found |= (of_tuning if file.name == TUNE_FILE else of_locating)(content, file, own.data)
    return found


def located_layers(own: Namespace) -> list[int] | None:
    """Return the layers that `locate` proposes, for `tune` to try; None where there are none.

    Raises:
        InputError: as `proposals` does.
    """
    named = own.found or []
    if named == [NOWHERE]:
        return None
    folders = [Path(name) for name in named] or [located_folder(own.model, own.data)]
    for folder in folders:
        if (folder / LOCATE_FILE).is_file():
            return list(read(folder / LOCATE_FILE, own.model)["layers"])
        if named:
            raise _nothing_found(folder)
    return None


def read(file: Path, model: str) -> dict[str, Any]:
    """Read what was found.

    Raises:
        InputError: if it is damaged, or was found for another model.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        of, layers = str(content["model"]), [int(layer) for layer in content["layers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"what was found cannot be read: {error!r}",
            where=str(file),
            hint="run the command again that wrote it, or look nowhere: --from none",
        ) from error
    if of != model and _resolved(of) != _resolved(model):
        raise InputError(
            f"it was found for the model {of!r}, and this one is {model!r}",
            where=str(file),
            hint="name another folder with --from=FOLDER, or look nowhere: --from none",
        )
    return content | {"layers": layers}


def of_tuning(content: Mapping[str, Any], file: Path | None, data: str) -> Found:
    """Return what `tune` proposes.

    Args:
        content: of its file.
        file: that it was read from; None: it is being written.
        data: of the run; the facts that were held back are left out of the same alone.
    """
    at = "" if file is None else f", from {file}"
    found = {key: Proposal(value, f"tuned{at}") for key, value in content["settings"].items()}
    found[PLAN] = Proposal(content["plan"], f"the plan that the others were tuned for{at}")
    if FIRST_STEP in found:
        found[RATE] = Proposal(None, "null: first_step says it")
    if _resolved(data) == _resolved(content["data"]):
        behind = f"behind the {content['facts']} facts that settings were chosen on{at}"
        found[OFFSET] = Proposal(content["offset"], behind)
    return found


def of_locating(content: Mapping[str, Any], file: Path, data: str) -> Found:
    """Return what `locate` proposes: layers."""
    return {LAYERS: Proposal(content["layers"], f"located, from {file}")}


def as_flags(found: Mapping[str, Proposal]) -> list[str]:
    """Return proposals as arguments of the command line."""
    return [f"--{key}={_spelled(each.value)}" for key, each in found.items()]


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _resolved(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _nothing_found(folder: Path) -> InputError:
    return InputError(
        f"there is neither {LOCATE_FILE} nor {TUNE_FILE}",
        where=f"--from {folder}",
        hint="give the folder that `lightning-blue locate` or `lightning-blue tune` has written",
    )
