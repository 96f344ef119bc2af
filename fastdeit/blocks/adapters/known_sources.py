"""Recognises classes of repositories that are no packages: files under names that other projects use too.

A class is taken for the repository's only if the tokens of its methods have a digest that is known.
"""

import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Collection, Mapping
from types import ModuleType

from fastdeit.blocks.snapshot import register_methods

_LAYOUT = (tokenize.COMMENT, tokenize.NL)


def register_known(
    file: ModuleType, methods: Collection[str], known: Mapping[str, str | Collection[str]], repository: str
) -> None:
    """Records methods ("Class.method") of a file.

    Args:
        known: digest of each method, or the digests of its versions.

    Raises:
        ImportError: one is not there, or is not the repository's.
    """
    for name in methods:
        owner, method = name.split(".")
        kind = getattr(file, owner, type)
        found = kind.__dict__.get(method)
        digests = (known[name],) if isinstance(known[name], str) else known[name]
        if found is None or source_digest(found) not in digests:
            raise ImportError(f"{name} is not that of {repository}")
        register_methods(kind, method, host=True)


def source_digest(function: Callable) -> str | None:
    """A digest of the source's tokens without comments and blank lines; None where there is no source to read."""
    try:
        lines = io.StringIO(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):
        return None
    words = []
    for token in tokenize.generate_tokens(lines.readline):
        if token.type == tokenize.INDENT or token.type == tokenize.DEDENT:
            words.append(tokenize.tok_name[token.type])  # however wide
        elif token.type not in _LAYOUT:
            words.append(token.string)
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
