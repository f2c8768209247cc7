"""The settings of a run as text: which keys are written down, and where each value comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from blue_callbacks import ClosedFormUpdate
from lightning_blue.cli.help import first_sentences
from lightning_blue.cli.parser import EditCLI
from lightning_blue.cli.written import flat, write_sections
from lightning_blue.editing.decisions import decided, key_widths
from lightning_blue.editing.module import EditModule

# Keys that are written down also where they have their default; all others where they have not.
ALWAYS = (
    "seed_everything",
    "for_model",
    "model.name_or_path",
    "model.dtype",
    "model.target.steps",
    "model.target.learning_rate",
    "model.target.first_step",
    "model.target.weight_decay",
    "model.target.clamp",
    "model.target.kl_weight",
    "model.target.site",
    "model.covariance.corpus",
    "model.covariance.tokens_per_dim",
    "data.path",
    "data.batch_size",
    "data.edits",
    "data.offset",
    "data.controls",
    "data.on_unusable",
    "data.chat",
    "update.layers",
    "update.plan",
    "update.covariance_weight",
    "update.past_keys",
    "measure.text",
    "measure.generate",
    "run.name",
)
_NEVER = ("base", "ckpt_path")  # of a command line, not of a run


class Proposal(NamedTuple):
    """A value that nobody gave.

    Attributes:
        value: of a key.
        source: where it comes from, for the comment behind it.
    """

    value: Any
    source: str = "proposed"


class Settings:
    """The configuration of a run with what was found and decided for it.

    Args:
        cli: with the configuration; what was proposed may stand in it already.
        module: made of it.
        update: made of it, with its layers.
        found: proposals by key; one that the configuration has another value for lost against it.
    """

    def __init__(
        self,
        cli: EditCLI,
        module: EditModule,
        update: ClosedFormUpdate,
        found: Mapping[str, Proposal],
    ) -> None:
        self.module, self.update, self.found = module, update, found
        self.config = flat(_plain(cli, cli.config))
        self.defaults = flat(_plain(cli, cli.parser.get_defaults()))
        self.config |= _decided_values(module, update)

    def text(self, remarks: Mapping[str, str]) -> str:
        """Write the settings as nested sections with comments.

        Args:
            remarks: on some values, by key: what they come to with this model and these facts.
        """
        wanted = {
            key: value
            for key, value in self.config.items()
            if key not in _NEVER and (key in ALWAYS or not self._is_default(key))
        }
        sources = {key: self._source(key) for key in wanted}
        sources |= dict.fromkeys(("model.name_or_path", "data.path"), "given")
        for each in decided(self.module, self.update):
            if each.key not in self.found:
                sources[each.key] = f"decided: {each.sentence}"
        for key, remark in remarks.items():
            sources[key] += f"; {remark}"
        return write_sections(wanted, first_sentences("fit"), sources)

    def _source(self, key: str) -> str:
        if key in self.found and self.found[key].value == self.config[key]:
            return self.found[key].source
        return "default" if self._is_default(key) else "given"

    def _is_default(self, key: str) -> bool:
        return key in self.defaults and bool(self.defaults[key] == self.config[key])


def _plain(cli: EditCLI, config: Any) -> dict[str, Any]:
    """Return a configuration as plain values; by way of JSON, which keeps the type of each."""
    text = cli.parser.dump(config, format="json", skip_none=False, skip_check=True)
    values: dict[str, Any] = json.loads(text)
    return values


def _decided_values(module: EditModule, update: ClosedFormUpdate) -> dict[str, Any]:
    """Return the values of what was decided, where one value says it for the whole run.

    The learning rate goes by each hidden state's own length, and stays open.
    """
    keys = {each.key for each in decided(module, update)}
    values: dict[str, Any] = {
        "update.layers": list(update.layers),
        "model.covariance.corpus": module.covariance.corpus,
    }
    widths = key_widths(module, update)
    if len(widths) == 1:
        values["update.covariance_weight"] = float(widths[0])
    return {key: value for key, value in values.items() if key in keys}
