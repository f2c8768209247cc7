"""Settings that are in force, as the reader of a report wants to know them; the method's name."""

from __future__ import annotations

from typing import Any

from blue_callbacks.solvers import CLOSED_FORMS
from lightning_blue.data.memory import name_of

BASELINES = {"fine_tuning": "LocFT-BF", "in_context": "in-context"}
_BASELINE_SETTINGS = {
    "fine_tuning": ("lr", "epochs", "mini_batch", "converged", "norm_constraint"),
    "in_context": ("most", "fact", "lead"),
}


def run_settings(config: Any, command: str = "fit") -> dict[str, Any]:
    """Pick what the reader of a report wants to know: settings that are in force, and no others."""
    if command == "evaluate":
        settings = {"model": "model.name_or_path", "data": "data.path"}
    else:
        settings = {"model": "model.name_or_path", "site": "model.target.site", "data": "data.path"}
        if config["update.solver"] not in CLOSED_FORMS:
            del settings["site"]
        settings |= {"batch_size": "data.batch_size"}
        names = ["plan", "layers", "solver", "past_keys", *_solver_settings(config)]
        if config["update.solver"] not in CLOSED_FORMS:
            names = ["plan", "layers", "solver", "post_edit_transform"]
        settings |= _baseline_settings(config)
        settings |= {name: f"update.{name}" for name in names}
    settings |= {name: f"data.{name}" for name in ("chat", "system") if config[f"data.{name}"]}
    chosen = {} if command == "evaluate" else {"method": method_name(config)}
    chosen |= {name: config[key] for name, key in settings.items()}
    chosen |= {"data": name_of(chosen["data"]), "seed": config["seed_everything"]}
    return {name: value for name, value in chosen.items() if value is not None}


def method_name(config: Any) -> str:
    """Name the method that a configuration amounts to: what it adds to MEMIT, and BLUE's plan.

    >>> keys = ("model.target.site", "update.rect_keep", "update.post_edit_transform")
    >>> chosen = {"update.solver": "null_space", "update.plan": "boundary"}
    >>> method_name(dict.fromkeys(keys) | chosen)
    'AlphaEdit + BLUE'
    """
    if config["update.solver"] in BASELINES:
        return BASELINES[config["update.solver"]]
    rows = {
        "PMET": config["model.target.site"] == "attention_and_ffn",
        "AlphaEdit": config["update.solver"] == "null_space",
        "RECT": config["update.rect_keep"] is not None,
        "PRUNE": config["update.post_edit_transform"] is not None,
    }
    names = [name for name, used in rows.items() if used] or ["MEMIT"]
    return " + ".join([*names, "BLUE"] if config["update.plan"] == "boundary" else names)


def _solver_settings(config: Any) -> list[str]:
    """Return the names of the settings of the update that the chosen solver and transforms read."""
    names = ["covariance_weight"]
    if config["update.solver"] == "null_space":
        names = ["threshold" if config["update.energy"] is None else "energy", "ridge"]
    return [*names, "rect_keep", "post_edit_transform"]


def _baseline_settings(config: Any) -> dict[str, str]:
    """Return the settings of a baseline by the names that a report shows them by."""
    solver = config["update.solver"]
    section = {"fine_tuning": "update", "in_context": "model"}.get(solver, "")
    return {
        f"{solver}_{name}": f"{section}.{solver}.{name}"
        for name in _BASELINE_SETTINGS.get(solver, ())
    }
