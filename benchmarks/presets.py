"""Sizes of the benchmark, by name."""

from __future__ import annotations

from typing import Any

_CPU: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "shape": "gpt2-small",
    "edits": 100,
    "textbook_edits": 2,
    "layers": [3, 8],
    "critical": [4, 5, 6, 7, 8],
    "steps": 20,
    "learning_rate": 0.5,
    "repeats": 3,
    "batches": 5,
    "tokens": 16384,
    "records": 100,
    "textbook_records": 4,
    "textbook_texts": 2,
    "d_in": 14336,
    "d_out": 4096,
    "new": 100,
    "past": 1900,
    "facts": 10,
    "samples": 10,
    "textbook_restorations": 40,
    "matmul": 2048,
}
_MINUTES = {
    "edits": 20,
    "textbook_edits": 1,
    "repeats": 1,
    "batches": 2,
    "tokens": 4096,
    "records": 20,
    "textbook_records": 2,
    "textbook_texts": 1,
    "d_in": 7168,
    "d_out": 2048,
    "past": 900,
    "facts": 4,
    "textbook_restorations": 20,
}
_GPU = {
    "device": "cuda",
    "dtype": "bfloat16",
    "shape": "llama3-8b",
    "layers": [4, 8],
    "critical": [4, 8],
    "steps": 25,
    "learning_rate": 0.1,
    "batches": 1,
    "tokens": 143360,
    "matmul": 8192,
}
_SMOKE = {
    "shape": "tiny",
    "edits": 3,
    "textbook_edits": 1,
    "layers": [1, 2],
    "critical": [1, 2],
    "steps": 3,
    "repeats": 1,
    "batches": 2,
    "tokens": 600,
    "records": 2,
    "textbook_records": 1,
    "textbook_texts": 1,
    "d_in": 64,
    "d_out": 16,
    "new": 4,
    "past": 8,
    "facts": 2,
    "samples": 2,
    "textbook_restorations": 4,
    "matmul": 256,
}

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "minutes": ("a look at every part, minutes on 2 CPU cores", {**_CPU, **_MINUTES}),
    "full": ("the sizes of docs/performance.md, an hour on 2 CPU cores", _CPU),
    "gpu": ("Llama-3-8B's shape in bfloat16 on one GPU", {**_CPU, **_GPU}),
    "smoke": ("a tiny model, seconds: whether everything runs", {**_CPU, **_SMOKE}),
}
