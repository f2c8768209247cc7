"""Part ``curves``: the target search against each of the sizes it depends on, and processes."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from benchmarks.delta import edit_module, run_delta
from benchmarks.results import Row
from benchmarks.timing import Clock, now
from benchmarks.workload import CONTEXTS, load_workload
from lightning_blue.support.processes import share_work

POINTS: dict[str, list[int]] = {
    "edits in a batch": [1, 5, 20, 100],
    "words before the prompt": [0, 10, 20, 40],
    "depth": [6, 12, 24],
    "width": [256, 512, 768, 1024],
    "threads": [1, 2],
}
SMOKE: dict[str, list[int]] = {
    "edits in a batch": [1, 3],
    "words before the prompt": [0, 10],
    "depth": [3, 4],
    "width": [32, 64],
    "threads": [1, 2],
}
PROCESSES = [1, 2]
SIZES = {"depth": "n_layers", "width": "d_model"}


def run_curves(args: Namespace, clock: Clock) -> list[Row]:
    """Vary one size at a time; both ways at every point, at the first of the layers."""
    rows = [_point(axis, value, args, clock) for axis, value in _points(args.preset == "smoke")]
    if args.device == "cpu" and distributed.is_gloo_available():
        rows += [_processes(n, args) for n in PROCESSES]
    return rows


def _points(smoke: bool) -> Iterator[tuple[str, int]]:
    for axis, values in (SMOKE if smoke else POINTS).items():
        for value in values:
            yield axis, value


def _point(axis: str, value: int, args: Namespace, clock: Clock) -> Row:
    sizes: dict[str, Any] = {"n_layers": args.depth, "d_model": args.width}
    edits, threads = min(args.edits, 20), torch.get_num_threads()
    if axis in SIZES:
        sizes[SIZES[axis]] = value
    elif axis == "edits in a batch":
        edits = value
    elif axis == "threads":
        torch.set_num_threads(value)
    workload = load_workload(args.shape, edits, device=args.device, **sizes)
    if axis == "words before the prompt":
        words = (" ".join(CONTEXTS) * 2).split()[:value]
        before = " ".join([*words, ""])
        longer = [replace(r, prompt=before + r.prompt) for r in workload.requests]
        workload = workload._replace(requests=longer)
    clock.rates.clear()  # each point has its own
    settings = {"edits": edits, "layers": args.layers[:1], "repeats": 1, "textbook_edits": 1}
    row = run_delta(workload, Namespace(**{**vars(args), **settings}), clock)[0]
    torch.set_num_threads(threads)
    return replace(row, part="curves", case=f"{axis}: {value}")


def _processes(n: int, args: Namespace) -> Row:
    """Share a batch among processes of one thread each; ours alone."""
    edits = min(args.edits, 20)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_share, args=(n, edits, args, folder), nprocs=n)
        seconds = float(Path(folder, "seconds").read_text())
    return Row("curves", f"processes: {n}", "edit", ours=seconds / edits)


def _share(rank: int, n: int, edits: int, args: Namespace, folder: str) -> None:
    """Do one process's share; the first one notes the seconds of the whole batch."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=n)
    share_work(True)
    workload = load_workload(args.shape, edits, n_layers=args.depth, d_model=args.width)
    module, batch = edit_module(workload, args), workload.requests[:edits]
    module.edit_targets(batch[:n], args.layers[0])  # warms up
    distributed.barrier()
    began = now()
    module.edit_targets(batch, args.layers[0])
    if rank == 0:
        Path(folder, "seconds").write_text(str(now() - began))
    share_work(False)
    distributed.destroy_process_group()
