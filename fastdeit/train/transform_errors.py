"""Errors of transforms, as opposed to those of decoding.

An image that cannot be read is replaced. A transform that fails is a fault: a run that meets one saves its state and stops.
"""

from collections.abc import Callable, Sequence
from typing import Any


class TransformError(RuntimeError):
    """A transform failed on an image that had been decoded.

    The message, one line, names the image, the option that asks for the transform and, in training, where the image came: epoch
    and position decide the random numbers, so that the failure can be repeated.
    """


class TransformFailure(Exception):
    """An error of one of `NamedTransforms`, with the original error as its cause. It names the option, not yet the image."""

    def __init__(self, option: str) -> None:
        super().__init__(option)
        self.option = option

    def on(self, image: str) -> TransformError:
        """The error that names the image, too."""
        return TransformError(f"{self.option}: the transform fails on {image}: {described(self.__cause__)}")


class NamedTransforms:
    """Transforms in a row, each beside the option that asks for it.

    Args:
        steps: (option, transform of what the one before returned), the first of a PIL image.
    """

    def __init__(self, steps: Sequence[tuple[str, Callable[[Any], Any]]]) -> None:
        self.steps = tuple(steps)

    def __call__(self, image: Any) -> Any:
        """Raises TransformFailure that names the option."""
        for option, transform in self.steps:
            try:
                image = transform(image)
            except Exception as error:
                raise TransformFailure(option) from error
        return image


def described(error: BaseException | None) -> str:
    """An error's type and message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
