"""The fake device's memory: what tensors hold of it, and how it runs out."""

import contextlib
import gc

import torch


def memory():
    """Bytes that tensors hold on all devices, without garbage."""
    torch.cuda.synchronize()
    use_both_threads()  # that of backward passes may still hold the graph of one that failed
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # one for each stream and thread that has called cuBLAS
    return sum(
        torch.cuda.memory_stats(device)["requested_bytes.all.current"] for device in range(torch.cuda.device_count())
    )


def use_both_threads():
    """Has the autograd's thread of each device run a backward pass, with a matrix product on the current device."""
    for device in range(torch.cuda.device_count()):
        x = torch.zeros(16, 16, device=f"cuda:{device}", requires_grad=True)
        with torch.cuda.device(device):
            (x @ x).sum().backward()


@contextlib.contextmanager
def little_memory(small, large):
    """About so many KiB for tensors of up to 1 MiB, and for larger ones.

    The allocator has a pool for each. No more is asked of the device, and what both have free is taken but for this.
    """
    piece, most_small, most_large = 64 << 10, 24 << 20, 40 << 20
    gc.collect()
    use_both_threads()  # cuBLAS's workspaces are there then
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((reserved + most_small + most_large + (1 << 20)) / total)
    held_large = [torch.empty(most_large, dtype=torch.uint8, device="cuda")]
    held_small = []
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                held_small.append(torch.empty(piece, dtype=torch.uint8, device="cuda"))
        held_large.clear()
        if large << 10 < most_large - (1 << 20):
            held_large.append(torch.empty(most_large - (large << 10), dtype=torch.uint8, device="cuda"))
        del held_small[len(held_small) - (small << 10) // piece :]
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        held_small.clear(), held_large.clear()


@contextlib.contextmanager
def without_old_garbage():
    """Inside, the collector leaves out what is there already, which takes it most of its time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
