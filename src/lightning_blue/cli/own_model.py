"""Run files that belong to one model: ``for_model`` says which, and others are refused."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from lightning_blue.data.hub import ALMANAC
from lightning_blue.language_model.sources import find_source
from lightning_blue.support.errors import InputError
from lightning_blue.support.hub import asked

BUILD = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")


def require_model(for_model: str, given: str, revision: str | None, data: str) -> None:
    """Refuse a model that is not built as the one which a run file's settings were chosen on.

    Critical layers, the learning rate and the clamp of targets, and the weight of the covariance
    belong to a size and a kind of model. One that was edited or trained anew is of the same build.
    Where ``for_model`` is not to be had, that cannot be told, and is a warning.

    Args:
        for_model: the model that the settings belong to.
        given: the model that is to be edited.
        revision: of that one.
        data: the facts that are to be edited, for the hint.

    Raises:
        InputError: naming the command for one's own model.
    """
    if given == for_model:
        return
    wanted, found = _build(for_model, None), _build(given, revision)
    if found is None or found == wanted:  # what cannot be read is refused when it is loaded
        return
    if wanted is None:
        rank_zero_warn(
            f"the settings of this run file belong to the model {for_model!r}, which cannot be "
            f"read here: whether {given!r} is built alike is not known, and a model of another "
            "build would be ruined by them"
        )
        return
    facts = "FILE" if data == ALMANAC else data
    raise InputError(
        f"the settings of this run file (layers, targets, text) belong to the model {for_model!r}, "
        "and another one would be ruined by them",
        where=f"model.name_or_path = {given}",
        hint=f"without the run file: lightning-blue fit --model.name_or_path={given} "
        f"--data.path={facts}; or --for_model=null, to use these settings all the same",
    )


def _build(name: str, revision: str | None) -> tuple[object, ...] | None:
    """Return what a model's configuration says of its text part; None where none can be read."""
    from transformers import AutoConfig

    try:
        source = find_source(name, revision)
        with asked("model", source.path, revision):
            config = AutoConfig.from_pretrained(source.path, **source.arguments).get_text_config()
    except Exception:  # dozens of types; loading the model says which
        return None
    return tuple(getattr(config, key, None) for key in BUILD)
