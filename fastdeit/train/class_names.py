"""The names of classes, stored with weights: class numbers mean nothing without them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastdeit.train.image_folders import listed

CLASSES_KEY = "classes"  # of a safetensors file's metadata: the names by number, a JSON list


def stored_classes(metadata: Mapping[str, str], path: Path) -> tuple[str, ...] | None:
    """The names in the metadata of path, None where it has none.

    Raises:
        ValueError: they are no JSON list of different texts.
    """
    text = metadata.get(CLASSES_KEY)
    if text is None:
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: metadata `{CLASSES_KEY}` is not JSON: {error}") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{path}: metadata `{CLASSES_KEY}` holds {text[:80]}, expected a JSON list of the classes' names"
        )
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"{path}: metadata `{CLASSES_KEY}` has {listed(twice)} more than once")
    return tuple(names)


def class_difference(names: Sequence[str], expected: Sequence[str]) -> str | None:
    """In words, how names differ from those that are expected: which lack, which are new, or where the order differs."""
    if tuple(names) == tuple(expected):
        return None
    known, wanted = set(names), set(expected)
    parts = []
    if missing := [name for name in expected if name not in known]:
        parts.append(f"lacks {listed(missing)}")
    if new := [name for name in names if name not in wanted]:
        parts.append(f"has {listed(new)} besides")
    if not parts:
        number = next(i for i, (a, b) in enumerate(zip(names, expected, strict=False)) if a != b)
        parts.append(f"has another order: class {number} is {names[number]}, not {expected[number]}")
    return " and ".join(parts)
