"""What `edit` gives back: scores, what failed, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks import ClosedFormUpdate
from lightning_blue.api import settings as by_name
from lightning_blue.api.protection import WeightSnapshot
from lightning_blue.data.requests import Rejected
from lightning_blue.editing import EditModule
from lightning_blue.editing.decisions import decided_settings, decisions
from lightning_blue.editing.fingerprints import model_fingerprint
from lightning_blue.language_model.loading import loaded_name
from lightning_blue.metrics.history import RunHistory
from lightning_blue.reporting.export import export_model
from lightning_blue.reporting.settings import run_settings
from lightning_blue.reporting.tables import estimate_text, markdown_table
from lightning_blue.reporting.views import measured, metrics_at
from lightning_blue.support.errors import InputError
from lightning_blue.support.text import counted

NAMED = 5  # failed edits that the representation lists


class State(NamedTuple):
    """What a call leaves behind: to go on from, to go back to, and to report on."""

    module: EditModule
    before: WeightSnapshot
    callback: ClosedFormUpdate
    guard: dict[str, Any]
    history: RunHistory
    events: list[str]

    @property
    def update(self) -> dict[str, Any]:
        """What the next call's update goes on from: past keys, settings, covariances."""
        return self.callback.state_dict()


@dataclass(frozen=True)
class FailedEdit:
    """A request that the model does not follow.

    Attributes:
        case_id: of the request.
        prompt: with its subject.
        wanted: the new object.
        says: how the model continues the prompt; where the request was never applied, the unedited
            model.
        probability: of the new object, the geometric mean over its tokens.
        reason: why it was never applied; empty where it was.
    """

    case_id: str
    prompt: str
    wanted: str
    says: str
    probability: float
    reason: str = ""


class EditResult:
    """What came of a call of `edit`.

    Attributes:
        model: the edited model: the one that was given, or its copy.
        scores: by metric: ``before`` and ``after`` with ``before_error`` and ``after_error``, their
            standard errors over requests (None for one request), and ``count`` of requests. A
            metric that the facts offer nothing for is absent. ``pandas.DataFrame(scores).T`` is a
            table.
        failed: requests that the model still does not follow, with what it says instead.
        rejected: facts that could not be used (with ``on_unusable="skip"``).
        decisions: what was decided where no setting was given, a sentence each.
        notes: warnings that the call did not print.
        seconds: spent on editing, measuring, preparing.
        history: everything that was measured, as a run of the command line has it.
        settings: that were given, by dotted name.
    """

    def __init__(
        self,
        state: State,
        settings: by_name.Settings,
        seed: int,
        notes: list[str],
        after: EditResult | None,
    ) -> None:
        self.state, self.settings, self._after = state, settings, after
        self.history = state.history
        self.history.seconds["prepare"] = state.module.preparation_seconds
        self.seconds = {**self.history.seconds}
        self.decisions = decisions(state.module, state.callback)
        self.notes = list(dict.fromkeys([*notes, *state.callback.notes, *state.events]))
        self.history.settings = self._described(seed)
        self.scores = _scores(self.history)
        self.failed = _failed(self.history)
        self.rejected: list[Rejected] = self.history.rejected
        self._left_as = model_fingerprint(self.model)
        self._undone = False

    @property
    def model(self) -> PreTrainedModel:
        """The edited model."""
        return self.state.module.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.state.module.tokenizer

    def undo(self) -> None:
        """Put the weights back to what they were before this call, to the bit.

        Raises:
            InputError: if it was undone before, or the model was changed since by anything else.
        """
        self._require_unchanged("undo()")
        self.state.before.restore()
        self._undone = True

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Save the model as it is now, its tokenizer and a model card, for plain transformers.

        Args:
            folder: where to.
            overwrite: whether a model that stands there may be replaced.

        Returns:
            The folder.

        Raises:
            InputError: if something else stands there, the disk is full, or the model was changed
                since by anything else.
        """
        self._require_unchanged("save()")
        path = Path(folder).expanduser()
        if path.exists() and not (overwrite and (path / "config.json").is_file()):
            raise InputError(
                "something stands there already",
                where=str(path),
                hint="choose another folder; save(folder, overwrite=True) replaces a model",
            )
        module = self.state.module
        return export_model(
            path,
            module.model,
            module.tokenizer,
            self._whole_history(),
            module.export_dtype,
            module.edited_names,
        )

    def require_current(self, model: PreTrainedModel) -> None:
        """Refuse to go on from this result on a model that is not as it left it.

        Raises:
            InputError: saying what is in the way.
        """
        if model is not self.model:
            raise InputError(
                "the result belongs to another model",
                where="edit(after)",
                hint="give its own: edit(result.model, result.tokenizer, facts, after=result)",
            )
        self._require_unchanged("edit(after)")

    def _require_unchanged(self, where: str) -> None:
        if self._undone:
            raise InputError("this result was undone already", where=where)
        if model_fingerprint(self.model) != self._left_as:
            raise InputError(
                "the model was changed since: by a later call of edit(), or by something else",
                where=where,
                hint="undo the later results first, the newest before the others; or use that one",
            )

    def _described(self, seed: int) -> dict[str, Any]:
        """Return the settings that were in force, as reports show them."""
        module, update = self.state.module, self.state.callback
        config = {
            **by_name.complete(self.settings),
            "model.name_or_path": loaded_name(module.model) or type(module.model).__name__,
            "data.path": f"{counted(len(self.history.requests), 'fact')} in memory",
            "seed_everything": seed,
        }
        return {
            **run_settings(config),
            "layers": update.layers,
            **module.found_settings,
            **decided_settings(module, update),
        }

    def _whole_history(self) -> RunHistory:
        """Return the history with the edits of the calls before, which are in the model too."""
        if self._after is None:
            return self.history
        earlier = self._after._whole_history()
        n = len(earlier.requests)
        later = {number: [n + p for p in places] for number, places in self.history.batches.items()}
        return replace(
            self.history,
            settings={**self.history.settings, "edits_of_earlier_calls": earlier.applied},
            requests=[*earlier.requests, *self.history.requests],
            batches={**earlier.batches, **later},
        )

    def __repr__(self) -> str:
        head, rows = self._head(), self._rows()
        lines = [head, "", markdown_table(rows, ["metric", "before", "after"])] if rows else [head]
        missed = [f"  {each.prompt} … {each.wanted}: {_said(each)}" for each in self.failed[:NAMED]]
        if len(self.failed) > NAMED:
            missed.append(f"  and {len(self.failed) - NAMED} more (result.failed)")
        if missed:
            lines += ["", f"not followed ({len(self.failed)}):", *missed]
        for title, texts in (("decided", self.decisions), ("to be known", self.notes)):
            if texts:
                lines += ["", f"{title}:", *(f"  {text}" for text in texts)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th>"
            f"<td>{escape(before)}</td><td>{escape(after)}</td></tr>"
            for name, before, after in self._rows()
        )
        head = "<tr><th></th><th>before</th><th>after</th></tr>"
        parts = [f"<p><b>{escape(self._head())}</b></p>", f"<table>{head}{rows}</table>"]
        missed = [
            f"{escape(each.prompt)} … <b>{escape(each.wanted)}</b>: {escape(_said(each))}"
            for each in self.failed
        ]
        lists = (
            (f"not followed ({len(self.failed)})", missed),
            ("decided", [escape(text) for text in self.decisions]),
            ("to be known", [escape(text) for text in self.notes]),
        )
        for title, items in lists:
            if items:
                listed = "".join(f"<li>{item}</li>" for item in items)
                parts.append(f"<details><summary>{title}</summary><ul>{listed}</ul></details>")
        return f"<div>{''.join(parts)}</div>"

    def _head(self) -> str:
        settings, applied = self.history.settings, self.history.applied
        facts = counted(applied, "fact")
        layers = ", ".join(map(str, settings["layers"]))
        undone = ", undone" if self._undone else ""
        return f"{facts} edited with {settings['method']}, layers {layers}{undone}"

    def _rows(self) -> list[list[str]]:
        before, after = metrics_at(self.history, "pre"), metrics_at(self.history, "post")
        return [
            [spec.label, *(estimate_text(m.get(spec.name), spec.unit) for m in (before, after))]
            for spec in measured(self.history)
            if spec.name in before or spec.name in after
        ]


def _said(failed: FailedEdit) -> str:
    says = f"says {failed.says!r}"
    return f"{says} ({failed.reason})" if failed.reason else says


def _scores(history: RunHistory) -> dict[str, dict[str, float | None]]:
    before, after = metrics_at(history, "pre"), metrics_at(history, "post")
    scores: dict[str, dict[str, float | None]] = {}
    for spec in measured(history):
        if spec.name in before or spec.name in after:
            first, last = before.get(spec.name, {}), after.get(spec.name, {})
            scores[spec.name] = {
                "before": first.get("value"),
                "before_error": first.get("standard_error"),
                "after": last.get("value"),
                "after_error": last.get("standard_error"),
                "count": (last or first).get("count"),
            }
    return scores


def _failed(history: RunHistory) -> list[FailedEdit]:
    """Return requests in force whose object the model does not say, and those never applied."""
    applied = set(history.applied_places)
    failed = []
    for place, request in enumerate(history.requests):
        outcome = history.after.get(place)
        if outcome is None and place in applied:
            continue  # a later request took its place
        if outcome is not None and all(outcome.correct):
            continue
        seen = outcome or history.before[place]
        failed.append(
            FailedEdit(
                request.case_id,
                request.shown,
                request.target_new,
                seen.continuation.strip(),
                seen.probability_new,
                ""
                if outcome
                else f"never applied: {history.ended_early or 'its batch was rejected'}",
            )
        )
    return failed
