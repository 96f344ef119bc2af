"""Whether a training step gives the same bits twice: `python -m fastdeit.benchmarks.repeat_step [--toy]`; 1 if it does not."""

import sys

import torch

from fastdeit.benchmarks.full_model import Model

STEPS, BATCH = 3, 16


def fingerprint(toy: bool, seed: int = 0) -> list[torch.Tensor]:
    """Losses and weights of three training steps of DeiT-B from a seed, drop path and distillation included."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Model("deit_base_distilled_patch16_224", BATCH, device, toy)
    losses = [model.train() for _ in range(STEPS)]
    return [*losses, *(parameter.detach() for parameter in model.model.parameters())]


def differing(first: list[torch.Tensor], second: list[torch.Tensor]) -> int:
    """How many of the tensors differ in a bit."""
    return sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def main() -> int:
    toy = "--toy" in sys.argv[1:]
    first, second = fingerprint(toy), fingerprint(toy)
    count = differing(first, second)
    print(f"{count} of {len(first)} tensors differ between two runs of {STEPS} training steps")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
