"""The Hugging Face hub, asked once and for seconds: a slip of the keyboard costs no minute.

Its own clients ask again and again where nothing answers, for 23 seconds per file. Here one
question decides; where it has no good answer, they read their caches alone.
"""

from __future__ import annotations

import difflib
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from lightning_blue.support.errors import InputError, first_line

LOOKUP_SECONDS = 5.0


def looks_local(name: str) -> bool:
    """Say whether a name can only be a path: names on the hub are ``name`` or ``owner/name``.

    >>> [looks_local(name) for name in ("gpt2", "openai/gpt2", "./gpt2", "models/gpt2/", "a/b/c")]
    [False, False, True, True, True]
    """
    path = Path(name)
    outside = path.is_absolute() or name.startswith((".", "~"))
    return outside or "\\" in name or name.endswith("/") or len(path.parts) > 2 or not name.strip()


def missing_path(name: str, where: str) -> InputError:
    """Return the error for a path that does not exist, with the nearest name beside it."""
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        what = f"there is no folder {str(path.parent)!r}"
        hint = "check the path; relative ones start at the current folder"
        return InputError(what, where=where, hint=hint)
    near = difflib.get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
    hint = f"did you mean {str(path.parent / near[0])!r}?" if near else "check the path"
    return InputError("there is no such file or folder", where=where, hint=hint)


@contextmanager
def asked(
    kind: Literal["model", "dataset"], name: str, revision: str | None = None
) -> Iterator[str | None]:
    """Ask the hub whether it has something; where it has not, read caches alone in the block.

    Args:
        kind: of the repository; import ``datasets`` before the block that reads one.
        name: on the hub. What exists as a path is not asked for.
        revision: branch, tag or commit.

    Yields:
        None if it is there or need not be, else why it cannot be had from the hub.
    """
    reason = None if Path(name).exists() else _answer(kind, name, revision)
    if reason is None:
        yield None
        return
    with _caches_alone():
        yield reason


def no_source(kind: str, name: str, reason: str, bundled: Iterable[str]) -> tuple[str, str]:
    """Return what to say of a name that stands for nothing, and the hint.

    Args:
        kind: of what was named: ``model``, ``dataset`` and so on.
        name: as it was given.
        reason: from `asked`.
        bundled: names of what is in the package.
    """
    names = list(bundled)
    near = difflib.get_close_matches(name, names, n=1)
    what = (
        f"there is no {kind} {name!r}: it is not in the package (which has {', '.join(names)}), "
        f"no such file or folder exists here, and {reason}"
    )
    hint = f"did you mean {near[0]}?" if near else "check the name, or give a path that exists"
    return what, hint


def _answer(kind: str, name: str, revision: str | None) -> str | None:
    """Return None if the hub has it, else why not; within `LOOKUP_SECONDS`, whatever happens."""
    answers: list[str | None] = []

    def ask() -> None:
        answers.append(_lookup(kind, name, revision))

    asking = threading.Thread(target=ask, daemon=True)  # a resolver may hang beyond any timeout
    asking.start()
    asking.join(LOOKUP_SECONDS)
    if not answers:
        return f"the hub did not answer within {LOOKUP_SECONDS:g} seconds"
    return answers[0]


def _lookup(kind: str, name: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=LOOKUP_SECONDS)
    except RevisionNotFoundError:
        return f"on the hub it has no revision {revision!r}"
    except RepositoryNotFoundError:
        return f"the hub has no public {kind} of this name (private ones need `hf auth login`)"
    except HFValidationError:
        return "it is no name that the hub could have"
    except OfflineModeIsEnabled:
        return "the hub is not asked in offline mode (HF_HUB_OFFLINE)"
    except Exception as error:  # of the network: a dozen types, and the client's own
        return f"the hub does not answer ({first_line(error)})"
    return None


@contextmanager
def _caches_alone() -> Iterator[None]:
    """Put the hub's clients into offline mode, for which they have a variable at start-up only."""
    from huggingface_hub import constants

    switches: list[tuple[object, str]] = [(constants, "HF_HUB_OFFLINE")]
    with suppress(KeyError):
        datasets = sys.modules["datasets.config"]
        switches += [(datasets, "HF_HUB_OFFLINE"), (datasets, "HF_DATASETS_OFFLINE")]
    before = [(module, name, getattr(module, name)) for module, name in switches]
    try:
        for module, name, _ in before:
            setattr(module, name, True)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
