"""The activation functions of transformer MLPs and their derivatives, to be inlined into kernels. All arithmetic is fp32.

GELU is the exact one, x * Phi(x) (Hendrycks and Gimpel 2016). Phi comes from Abramowitz and Stegun 7.1.26, whose absolute error
of 1.5e-7 is below that of fp32's erf, for one reciprocal and one exp2 that the derivative's density shares.
"""

import triton
import triton.language as tl
from triton.knobs import runtime

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")

_LOG2_E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(runtime.interpret)  # the interpreter has no inline assembly


@triton.jit
def _reciprocal(x):
    """1 / x for x in [1, inf], within 1 ulp (PTX ISA, `rcp`): one instruction, where a division guards against ranges and takes
    eight."""
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _normal_cdf(x):
    """Phi(x), and exp(-x^2 / 2), sqrt(2 pi) times the density."""
    t = _reciprocal(1.0 + (0.3275911 * 0.7071067811865476) * tl.abs(x))
    poly = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    bell = tl.exp2(x * x * (-0.5 * _LOG2_E))
    tail = 0.5 * poly * bell  # Phi(-|x|), so that small values keep their digits
    return tl.where(x >= 0, 1.0 - tail, tail), bell


@triton.jit
def _sigmoid(x):
    # Divided: one ulp above 1 would leave a derivative's 1 - gate below 0, which a large x multiplies.
    return 1.0 / (1.0 + tl.exp2(x * -_LOG2_E))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of x, fp32. NaN gives NaN, and infinities what PyTorch's functions give."""
    if ACTIVATION == "gelu":
        cdf, _ = _normal_cdf(x)
        y = x * cdf
    elif ACTIVATION == "gelu_tanh":
        y = x * _sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif ACTIVATION == "quick_gelu":
        y = x * _sigmoid(1.702 * x)
    elif ACTIVATION == "silu":
        y = x * _sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x <= 0, 0.0, x)
    return y


@triton.jit
def activate_with_derivative(x, ACTIVATION: tl.constexpr):
    """The activation of x and its derivative at x, fp32."""
    if ACTIVATION == "gelu":
        cdf, bell = _normal_cdf(x)
        y = x * cdf
        dy = cdf + x * bell * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        gate = _sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        y = x * gate
        # Bounded where the gate is shut or open: infinity times its zero would be NaN.
        square = tl.minimum(x * x, 1e4, propagate_nan=tl.PropagateNan.ALL)
        dy = gate + x * (gate * (1.0 - gate)) * (1.5957691216057308 * (1.0 + 3 * 0.044715 * square))
    elif ACTIVATION == "quick_gelu":
        gate = _sigmoid(1.702 * x)
        y = x * gate
        dy = gate + y * (1.0 - gate) * 1.702
    elif ACTIVATION == "silu":
        gate = _sigmoid(x)
        y = x * gate
        dy = gate + y * (1.0 - gate)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x <= 0, 0.0, x)
        dy = tl.where(x <= 0, 0.0, 1.0)
    return y, dy
