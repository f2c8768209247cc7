"""Command line: ``python -m benchmarks [PART ...]``."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.closed_form import run_closed_form
from benchmarks.covariance import run_covariance
from benchmarks.curves import run_curves
from benchmarks.delta import run_delta
from benchmarks.evaluation import run_evaluation
from benchmarks.growth import run_growth, run_many
from benchmarks.presets import PRESETS
from benchmarks.profiling import run_profile
from benchmarks.protocols import run_protocols
from benchmarks.results import Row, machine, markdown, read_rows, write_part
from benchmarks.run import run_whole
from benchmarks.shortcuts import run_shortcuts
from benchmarks.timing import Clock
from benchmarks.tracing import run_tracing
from benchmarks.workload import ROOT, SHAPES, Workload, config_of, load_workload

log = logging.getLogger("benchmarks")

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16")}
WITH_MODEL: dict[str, Callable[[Workload, argparse.Namespace, Clock], list[Row]]] = {
    "delta": run_delta,
    "covariance": run_covariance,
    "evaluation": run_evaluation,
    "protocols": run_protocols,
    "run": run_whole,
    "profile": run_profile,
    "shortcuts": run_shortcuts,
    "tracing": run_tracing,
}
WITHOUT_MODEL: dict[str, Callable[[argparse.Namespace, Clock], list[Row]]] = {
    "closed_form": run_closed_form,
    "growth": run_growth,
    "many": run_many,
    "curves": run_curves,
}
PARTS = [*WITH_MODEL, *WITHOUT_MODEL]
USUAL = ["delta", "closed_form", "covariance", "evaluation", "run"]


def parser() -> argparse.ArgumentParser:
    """Build the parser; a preset gives the defaults of all sizes."""
    made = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Time the package against a plain textbook implementation, interleaved.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="presets (a size given on the command line wins):\n"
        + "\n".join(f"  {name:8}{about}" for name, (about, _) in PRESETS.items()),
    )
    add = made.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: {USUAL}")
    add("--preset", choices=list(PRESETS), default="minutes", help="sizes; default: minutes")
    add("--out", type=Path, default=ROOT / "build" / "benchmarks", help="folder of JSON and table")
    add("--threads", type=int, help="CPU threads; default: what torch takes")
    add("--device", choices=["cpu", "cuda"])
    add("--dtype", choices=list(DTYPES), help="of the model's weights")
    add("--shape", choices=SHAPES, help="of the random model")
    add("--depth", type=int, help="number of blocks instead of the shape's")
    add("--width", type=int, help="d_model instead of the shape's")
    add("--edits", type=int, help="edits in a batch")
    add("--textbook-edits", type=int, help="how many of them the textbook side optimises")
    add("--layers", type=int, nargs="+", help="boundary layers")
    add("--critical", type=int, nargs="+", help="layers whose covariance is collected")
    add("--steps", type=int, help="forward passes of the target search")
    add("--learning-rate", type=float, help="of the target search")
    add("--repeats", type=int, help="rounds in which both sides take turns; medians are reported")
    add("--batches", type=int, help="run: edit batches")
    add("--tokens", type=int, help="covariance: tokens of text")
    add("--records", type=int, help="evaluation, protocols: records")
    add("--textbook-records", type=int, help="how many of them the textbook side scores")
    add("--textbook-texts", type=int, help="for how many of them it writes texts")
    add("--facts", type=int, help="tracing: facts")
    add("--samples", type=int, help="tracing: samples of noise")
    add("--textbook-restorations", type=int, help="tracing: how many the textbook side does")
    for name, of in (("d-in", "keys"), ("d-out", "values"), ("new", "new keys"), ("past", "past")):
        add(f"--{name}", type=int, help=f"closed_form: number of {of}")
    add("--matmul", type=int, help="size of the square matrices that give the matmul rate")
    return made


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; take what was not given from the preset.

    Raises:
        SystemExit: for an unknown part, or layers that the model does not have.
    """
    made = parser()
    args = made.parse_args(arguments)
    for name, value in PRESETS[args.preset][1].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.parts = args.parts or USUAL
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        made.error(f"no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    depth = config_of(args.shape, args.depth, args.width).num_hidden_layers
    if max(*args.layers, *args.critical) >= depth:
        made.error(f"the model's layers are 0 to {depth - 1}; choose --layers and --critical")
    return args


def main(arguments: Sequence[str]) -> int:
    """Run the parts, each written as soon as it is done."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers_logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    model: Workload | None = None
    for part in args.parts:
        log.info("%s", part)
        started = time.perf_counter()
        if part in WITH_MODEL:
            model = model or _load(args)
            clock = Clock(args.device, DTYPES[args.dtype], args.matmul)
            rows = WITH_MODEL[part](model, args, clock)
        else:
            exact = torch.float64 if part == "closed_form" else DTYPES[args.dtype]
            clock = Clock(args.device, exact, args.matmul)
            rows = WITHOUT_MODEL[part](args, clock)
        about = {
            **machine(args.device),
            "settings": {key: value for key, value in vars(args).items() if key != "out"},
            "requests": model.source if model else None,
            "matmul_gflops": clock.measure_rate() and clock.rate / 1e9,
            "part_seconds": time.perf_counter() - started,
        }
        write_part(args.out, part, rows, about)
    sys.stdout.write(markdown(read_rows(args.out)) + f"\n\nwritten to {args.out}\n")
    return 0


def _load(args: argparse.Namespace) -> Workload:
    return load_workload(
        args.shape,
        max(args.edits * args.batches, args.records),
        dtype=DTYPES[args.dtype],
        device=args.device,
        n_layers=args.depth,
        d_model=args.width,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
