"""How much memory a process may take, on the device that it works on."""

from __future__ import annotations

import psutil
import torch

from lightning_blue.support.processes import n_processes

UNKNOWN = 4 * 2**30  # bytes, of a device that does not say what it has


def available_memory(device: torch.device) -> int:
    """Return the bytes that each process may take on a device.

    That is what is available, not only what is free: pages that the system holds as a cache, and
    what torch has set aside on a GPU and does not use, are to be had.
    """
    if device.type == "cpu":
        return int(psutil.virtual_memory().available) // n_processes()
    if device.type == "cuda":
        set_aside = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + set_aside
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return UNKNOWN
