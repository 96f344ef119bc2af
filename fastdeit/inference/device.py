"""Whether a device has the arithmetic of a precision."""

import torch


def check_device(precision: str, device: torch.device) -> None:
    """Raises ValueError where a GPU has no arithmetic of a precision. A CPU runs every one, by its reference."""
    if device.type != "cuda":
        return
    capability, least = torch.cuda.get_device_capability(device), (8, 9) if precision == "fp8" else (8, 0)
    if capability < least:
        raise ValueError(
            f"precision: {precision!r} needs a GPU of compute capability {least[0]}.{least[1]} or newer, and {device} has "
            f"{capability[0]}.{capability[1]}"
        )
