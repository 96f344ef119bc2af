"""What the source of an attention class that fastdeit does not know says about its arithmetic, for `explain` alone."""

import ast
import inspect
import textwrap

from torch import nn

# The kernels scale the logits before it (Vaswani et al. 2017, eq. 1).
SCALED_AFTER_SOFTMAX = "it scales attention weights after the softmax, not logits before it"


def why_not_standard(kind: type[nn.Module]) -> str | None:
    """How the forward of a class that is called an attention differs from what the kernels compute; None if that is not seen."""
    if "attention" not in kind.__name__.lower():
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):  # no source to read
        return None
    return SCALED_AFTER_SOFTMAX if any(map(_scales_a_softmax, ast.walk(tree))) else None


def _scales_a_softmax(node: ast.AST) -> bool:
    """Division of a softmax, or its product with something that is called a scale."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.left, ast.Call)):
        return False
    function = node.left.func
    if getattr(function, "attr", getattr(function, "id", None)) != "softmax":
        return False
    return isinstance(node.op, ast.Div) or (isinstance(node.op, ast.Mult) and "scal" in ast.unparse(node.right))
