"""The command line; its first lines answer without the weight of torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightning_blue import __version__
from lightning_blue.cli.help import asked_for, write_help
from lightning_blue.cli.signals import Stopped, stoppable

USAGE = """usage: lightning-blue COMMAND [--config FILE] [--SECTION.KEY=VALUE ...]

Change what a language model knows, and measure what else changed.

commands:
  check     say whether a model and facts can be edited, and what that will take
  locate    find out which layers recall facts, and in which editing works
  tune      find settings for a model, on facts that are held back
  init      write a commented run file for a model and facts, from what was found
  fit       edit facts in sequential batches and report on it
  evaluate  measure a model, edited or not, without editing it
  stats     collect the covariance of keys that fit needs (fit does it by itself)
  pretrain  train a small language model that knows given facts
  analyze   make a study of the paper on a run file's model: analyze STUDY, or analyze all

  ask       ask a model, or a run's model before and after its edits
  show      say what a run edited, and what is in its folder
  undo      write the model of a run without some of its edits
  export    write a run as a model, a LoRA adapter or a patch
  apply     make the edited model of a patch and the unedited one

  sweep     run the product of methods, plans, models, seeds; go on where it stopped
  compare   make tables and curves of runs, with paired tests
  dashboard make a workspace in W&B that shows the runs of a project

  lightning-blue COMMAND --help            every key with its meaning, a line each
  lightning-blue COMMAND --help.SECTION    all about a section: data, model, ..., trainer
  lightning-blue COMMAND --print_config    every key with its value
  lightning-blue --version

start here:
  lightning-blue fit --config conf/quickstart.yaml
"""

RUN_COMMANDS = ("show", "undo", "export", "apply")
EXPERIMENT_COMMANDS = ("sweep", "compare", "dashboard")
MODEL_COMMANDS = ("check", "locate", "tune", "init", "ask")
PLAIN_COMMANDS = (*MODEL_COMMANDS, *RUN_COMMANDS, *EXPERIMENT_COMMANDS)  # with their own parsers
COMMANDS = ("fit", "evaluate", "stats", "pretrain", "analyze", *PLAIN_COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: editing had to stop; 2: input that cannot be used; 130 and 143: stopped by Ctrl-C,
    by SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    if args[0] == "--version":
        sys.stdout.write(f"lightning-blue {__version__}\n")
        return 0
    if args[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; choose one of {', '.join(COMMANDS)}"
        sys.stderr.write(f"error: there is no command {args[0]!r}{hint}\n")
        return 2
    section = None if args[0] in PLAIN_COMMANDS else asked_for(args[1:])
    if section is not None:
        return write_help(args[0], section)
    try:
        with stoppable():
            if args[0] in RUN_COMMANDS:
                from lightning_blue.cli.run_commands import run_command
            elif args[0] in MODEL_COMMANDS:
                from lightning_blue.cli.model_commands import run_command
            elif args[0] in EXPERIMENT_COMMANDS:
                from lightning_blue.cli.experiment_commands import run_command
            else:
                from lightning_blue.cli.commands import run_command

            return run_command(args[0], args[1:])
    except Stopped as stopped:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes one says so
            sys.stderr.write(f"{stopped}\n")
        return stopped.exit_code


if __name__ == "__main__":
    sys.exit(main())
