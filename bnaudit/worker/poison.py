"""Fresh memory that holds NaN, so that an output a plug-in forgets to write shows as what it is.

All bits set is a NaN in every floating-point dtype, and 255 in every byte. Memory that a plug-in takes from
anywhere else (a pool of its own, cudaMalloc) is its own affair.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.hugetlb=1"
"""For GLIBC_TUNABLES, before a process starts: without its cache, every block is malloc's to fill; and in huge
pages (glibc 2.35) filling a large one costs little, where by single pages it takes longer than the kernel."""

M_PERTURB = -6
SMALL_BLOCKS = 1024
KEPT_BLOCKS = 7
"""NumPy keeps up to 7 freed blocks of each size below 1024 bytes (alloc.c), which glibc never sees."""

MEGABYTE = 1 << 20
"""The largest block that torch's allocator takes from its pool of small ones (CUDACachingAllocator.cpp)."""


def poison_malloc() -> None:
    """From now on, what glibc's malloc hands out has all bits set; other C libraries are left as they are.

    Small blocks escape this, up to about 1000 bytes, unless the process was started with TUNABLES.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Every byte is set to the last byte of the value, inverted; a value of 0 would switch it off.
        mallopt(M_PERTURB, 0x100)


def poison_numpy() -> None:
    """Sets all bits of the small blocks that NumPy has kept for its next arrays."""
    blocks = [
        np.empty(size, np.uint8) for size in range(1, SMALL_BLOCKS) for _ in range(KEPT_BLOCKS)
    ]
    for block in blocks:
        block.fill(255)


def poison_torch(size: int) -> None:
    """Sets all bits of the GPU memory that torch's allocator will hand out next on this stream.

    That is what it keeps free, and room for two tensors of `size` bytes (y and grad_input), which it keeps
    free afterwards.
    """
    import torch

    held = []

    def fill(sizes: Iterable[int]) -> None:
        for wanted in sizes:
            # Where memory is short, what there is room for is poisoned.
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                held.append(torch.full((wanted,), 255, dtype=torch.uint8, device="cuda"))

    fill((size, size, 1))
    # The allocator takes the smallest free block that is large enough: from the largest on, each its own.
    fill(sorted(_free_blocks(), reverse=True))
    torch.cuda.synchronize()


def _free_blocks() -> Iterator[int]:
    """Sizes of the requests that together take every free block that the current stream may be given."""
    import torch

    device, stream = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
    for segment in torch.cuda.memory_snapshot():
        private = tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)  # a CUDA graph's
        if private or segment["device"] != device or segment["stream"] != stream:
            continue
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                continue
            size = block["size"]
            if segment["segment_type"] == "small":
                for _ in range(size // MEGABYTE):
                    yield MEGABYTE
                size %= MEGABYTE
            if size:
                yield size
