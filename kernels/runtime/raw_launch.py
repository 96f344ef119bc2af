"""Triton's launcher in C, called directly for launches that are repeated with the same arguments.

It takes pointers as integers, and tensor maps that the driver has encoded. None of it is public: it is as in Triton 3.6 to 3.9.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from triton.runtime.driver import driver

from fastdeit.kernels.runtime.launch import LAUNCHER_OF_KERNEL, DirectLaunch, launches_directly

# None where `raw_launcher` works, else why not.
WHY_NO_RAW_LAUNCHES: str | None = None
if not launches_directly():
    WHY_NO_RAW_LAUNCHES = f"recorded launches were tested with Triton 3.6 to 3.9, this is {triton.__version__}"
# What Triton's function that encodes the descriptors among a launch's arguments refers to, in 3.6 and 3.7 and in later versions.
_BY_POSITION = {"launcher", "tensordesc_indices", "tensordesc_meta"}
_BY_PATH = {"launcher", "signature", "relevant_paths", "tensordesc_meta", "make_tensordesc_arg"}


class RawLauncher(NamedTuple):
    """Call `run(*grid, stream, *leading, *arguments)`, with what `tensor_map_arguments` gives in the place of each descriptor."""

    run: Any
    grid: tuple[int, int, int]
    leading: tuple  # function, attributes, no hooks, no scratch memory
    packed: bool  # the arguments are one tuple
    maps: dict[int, Any]  # position of an argument that is a descriptor -> what its tensor map is to be like


def raw_launcher(launch: DirectLaunch) -> RawLauncher | None:
    """The launcher of a launch; None where it allocates memory of its own or is unknown."""
    compiled = launch.compiled
    run, kernel_launcher = compiled.run, compiled.kernel.run
    if run is not kernel_launcher.launch:  # scratch memory
        return None
    maps: dict[int, Any] = {}
    if hasattr(run, "__code__"):  # Triton's wrapper, which encodes descriptors at each call
        cells = dict(zip(run.__code__.co_freevars, (cell.cell_contents for cell in run.__closure__ or ()), strict=True))
        if cells.keys() not in (_BY_POSITION, _BY_PATH):
            return None
        paths = cells.get("relevant_paths") or {}
        if any(paths.values()):  # a descriptor inside a tuple
            return None
        positions = sorted(paths or cells["tensordesc_indices"])
        run, metas = cells["launcher"], cells["tensordesc_meta"] or [None] * len(positions)
        maps = dict(zip(positions, metas, strict=True))
    leading = (*compiled.leading, None, None, None, *(compiled.trailing or ()))
    return RawLauncher(run, launch.grid, leading, compiled.trailing is not None, maps)


def aligned_arguments(launch: DirectLaunch) -> set[int]:
    """Positions of the pointers that a launch's kernel was compiled for as 16-byte aligned."""
    facts = launch.compiled.kernel.src.attrs.items()
    return {position for (position, *_), found in facts if ["tt.divisibility", 16] in found}


def tensor_map_arguments(address: int, shape: Sequence[int], strides: Sequence[int], like: Any) -> list:
    """The launcher's arguments for a descriptor of a tensor at an address, padded with zeros.

    Args:
        shape, strides: in elements, as the descriptor's.
        like: of `RawLauncher.maps`; None where the kernel was lowered to pointers.
    """
    if like is None:
        options = (False,) if LAUNCHER_OF_KERNEL else (False, False)  # NaN as padding, TF32
        return [address, *shape, *strides, *options, *shape, *strides]
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    utils = driver.active.utils
    encode = utils.fill_tma_descriptor if LAUNCHER_OF_KERNEL else utils.fill_tma_descriptor_tiled
    kind = TMA_DTYPE_DEVICE_TO_HOST[like["elem_type"]]
    shape, strides = list(shape), list(strides)
    made = encode(address, like["swizzle"], like["elem_size"], kind, like["block_size"], shape, strides, 0)
    return [made, *shape, *strides]
