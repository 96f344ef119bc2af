"""The page docs/compiled-rows.md: what each configuration did when its compiled code was executed on a CPU."""

from collections.abc import Sequence

from fastdeit.aot.catalog import Resources

_HEAD = """# Compiled code, row by row

`fastdeit kernels --update` writes this page from `fastdeit/aot/resources.json`; a test compares the two. Each row is a
configuration whose PTX was executed on a CPU ([how](compiled-code.md)), with Triton {triton}. No GPU was involved.

- *case*: the call in `fastdeit/testing/ptx/cases.py` that launches the configuration. A call launches several kernels, which then
  share its errors.
- *warp instructions*: executed in that call, in PTX before the assembler.
- *error, eager, share*: RMS error against float64 of the output or gradient that comes closest to its limit, the error of
  PyTorch's implementation in the same dtype, and the first as a share of what the numerics contract allows. *exact*: the bits of
  the reference.
- *sectors, wavefronts*: of global and shared memory, over the ideal.

Checks: every row passed all of the machine's checks in three schedules (in step, shuffled with equal bits, and with approximate
instructions perturbed). The limits on sectors and wavefronts, and their exceptions, are in `fastdeit/aot/resource_limits.py`.
"""
_COLUMNS = ["kernel", "configuration", "case", "warp instructions", "error", "eager", "share", "sectors", "wavefronts"]


def page(rows: Sequence[tuple[str, str, str, Resources]], triton_version: str) -> str:
    """The page for rows of (kernel, configuration, architecture, resources), a table an architecture."""
    lines = [_HEAD.format(triton=triton_version)]
    for arch in sorted({arch for _, _, arch, _ in rows}, key=lambda name: int(name.removeprefix("sm_"))):
        of_arch = [(kernel, config, found) for kernel, config, a, found in rows if a == arch]
        executed = [_cells(*row) for row in of_arch if row[2].execution is not None]
        lines += [f"## {arch}", "", f"{len(executed)} of {len(of_arch)} configurations are executed.", ""]
        if len(executed) < len(of_arch):
            lines[-2] += " The others use tcgen05."
        lines += [f"| {' | '.join(row)} |" for row in (_COLUMNS, ["---"] * len(_COLUMNS), *executed)]
        lines.append("")
    return "\n".join(lines)


def _cells(kernel: str, config: str, resources: Resources) -> tuple[str, ...]:
    found = resources.execution
    assert found is not None
    errors = (f"{found.rms_error:.2g}", f"{found.eager_rms_error:.2g}", f"{found.share_of_limit:.2f}")
    return (
        f"`{kernel.removesuffix('_kernel')}`",
        config.split(";")[0],
        found.case,
        f"{sum(found.instructions.values()):,}",
        *(errors if found.share_of_limit else ("exact", "exact", "0")),
        f"{found.accesses.sector_ratio:.2f}",
        f"{found.accesses.wavefront_ratio:.2f}",
    )
