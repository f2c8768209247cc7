"""Part ``profile``: where the time of our target optimisation goes, operator by operator."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence

from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.delta import edit_module, edit_rows
from benchmarks.floor import costs_of, search_operations, useful_tokens
from benchmarks.results import Row
from benchmarks.timing import Clock
from benchmarks.workload import Workload

_KINDS = {
    "matrix products of blocks": ("addmm", "aten::mm", "aten::linear"),
    "attention": ("scaled_dot_product", "bmm", "aten::_softmax"),
    "log-softmax and loss": ("log_softmax", "gather", "nll", "logsumexp"),
    "activations and norms": ("layer_norm", "tanh", "pow", "gelu", "silu", "rsqrt"),
    "copies": ("copy_", "cat", "index", "clone", "contiguous", "fill_", "zero_", "scatter"),
}


def run_profile(workload: Workload, args: Namespace, clock: Clock) -> list[Row]:
    """Profile one call at each target layer; count the operations that it executes."""
    return [_profile(workload, layer, args, clock) for layer in args.layers]


def _profile(workload: Workload, layer: int, args: Namespace, clock: Clock) -> Row:
    module, batch = edit_module(workload, args), workload.requests[: args.edits]
    module.edit_targets(batch[:2], layer)
    clock.measure_rate()
    with clock.watched() as watch:
        module.edit_targets(batch, layer)
    clock.measure_rate()
    with FlopCounterMode(display=False) as counter:
        module.edit_targets(batch, layer)
    activities = [ProfilerActivity.CPU]
    if clock.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        module.edit_targets(batch, layer)
    forwards = (~module.target_losses[layer][..., 0].isnan()).sum(1).tolist()
    edits = edit_rows(workload, batch)
    needed = search_operations(costs_of(workload.model), edits, layer, forwards)
    executed = counter.get_total_flops()
    tokens, rows = useful_tokens(edits)
    seconds = watch.seconds / len(batch)
    return Row(
        "profile",
        f"layer {layer}",
        "edit",
        ours=seconds,
        floor=needed / clock.rate / len(batch),
        ours_peak=watch.peak,
        details={
            "needed_gflop": needed / len(batch) / 1e9,
            "executed_gflop": executed / len(batch) / 1e9,
            "needed_over_executed": needed / executed,
            "matmul_gflops": clock.rate / 1e9,
            "executed_rate_over_matmul_rate": executed / watch.seconds / clock.rate,
            "useful_tokens_per_row": tokens / rows,
            "share_of_time": shares(
                profiler.key_averages(group_by_input_shape=True),
                workload.model.config.vocab_size,
                on_device=clock.device.type == "cuda",
            ),
        },
    )


def shares(events: Sequence[object], vocabulary: int, on_device: bool) -> dict[str, float]:
    """Add up operators' own time by kind; a product with the vocabulary's size is the head's."""
    spent: Counter[str] = Counter()
    for event in events:
        own = event.self_device_time_total if on_device else event.self_cpu_time_total  # type: ignore[attr-defined]
        spent[_kind(event.key, str(event.input_shapes), vocabulary)] += own  # type: ignore[attr-defined]
    total = sum(spent.values()) or 1
    return {kind: round(own / total, 4) for kind, own in spent.most_common()}


def _kind(name: str, shapes: str, vocabulary: int) -> str:
    lowered = name.lower()
    wide = str(vocabulary) in shapes
    for kind, fragments in _KINDS.items():
        if any(fragment in lowered for fragment in fragments):
            if kind.startswith("matrix"):
                return "head" if wide else kind
            return f"{kind} over the vocabulary" if wide and kind == "copies" else kind
    if "adam" in lowered or "foreach" in lowered:
        return "optimizer"
    return "elementwise over the vocabulary" if wide else "other elementwise and overhead"
