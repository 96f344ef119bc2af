"""A linear layer with what surrounds its matrix product, forward and backward, by the backend that the table names for its shape.

Where that is cuBLAS, or where the Triton kernels cannot read the operands, pointwise kernels do the rest.
"""

import torch

from fastdeit.kernels.gemm.backward import gemm_backward
from fastdeit.kernels.gemm.config import CUBLAS, EPILOGUES, Gemm, select_gemm
from fastdeit.kernels.gemm.folded_weights import fold_forward
from fastdeit.kernels.gemm.forward import fits, gemm_forward
from fastdeit.kernels.mlp.activation import activation_backward, activation_forward
from fastdeit.kernels.norm.residual_branch import scale_add_forward
from fastdeit.kernels.runtime.architecture import architecture
from fastdeit.kernels.runtime.column_sums import Table, add_all, sum_columns


def linear_forward(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    activation: str | None = None,
    gamma: torch.Tensor | None = None,
    drop_path_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    needs_z: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """residual + drop_path_scale * gamma * activation(rows weight^T + bias) (M, N), and the pre-activation, rows' dtype, if needed.

    Args:
        rows: (M, K), whose dtype the product runs in.
        weight: (N, K) and bias: (N,) or None, of any dtype. Casts are made again in backward rather than kept.
        gamma: (N,); drop_path_scale: fp32, M being a multiple of its length; residual: (M, N). Contiguous or None.
        out_dtype: rows' by default; of no effect without gamma, drop_path_scale and residual.
    """
    weight, bias = fold_forward(weight, bias, rows.dtype)
    scales = not (gamma is None and drop_path_scale is None and residual is None)
    gemm = CUBLAS
    if scales or activation is not None:
        epilogue = "residual" if scales else "activation_z" if needs_z else "activation"
        gemm = _select((rows, weight), weight.shape[0], rows.shape[1], epilogue, activation)
    if gemm is not CUBLAS:
        return gemm_forward(
            rows,
            weight,
            gemm,
            bias=bias,
            activation=activation,
            gamma=gamma,
            drop_path_scale=drop_path_scale,
            residual=residual,
            out_dtype=out_dtype if scales else None,
            needs_z=needs_z,
        )
    weight = weight.t()
    z = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
    out = z if activation is None else activation_forward(z, activation)
    if scales:
        out = scale_add_forward(out, residual, gamma, drop_path_scale, out_dtype or rows.dtype)
    return out, z if needs_z else None


def activation_gradient(
    dy: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    activation: str,
    *,
    needs_h: bool = True,
    dbias_dtype: torch.dtype | None = None,
    dy_sum: torch.Tensor | None = None,
    later: list[Table] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dz = (dy weight) * activation'(z), the gradient that passes a linear layer (O, H) and the activation before it.

    Args:
        dy, weight, z: (M, O), (O, H) and (M, H) of one dtype; z is contiguous.
        dy_sum: (O,), where the column sums of dy go, which is contiguous then.
        later: with it all column sums are there once `add_partial_sums` has run on it.

    Returns:
        dz (M, H), activation(z) if needed, and the column sums of dz (H,) in dbias_dtype if that is given.
    """
    gemm = _select((dy, weight, z), *weight.t().shape, "derivative", activation)
    tables = [] if later is None else later
    if gemm is not CUBLAS:
        if dy_sum is not None:
            sum_columns((dy, dy_sum), later=tables)
        made = gemm_backward(dy, weight, z, activation, gemm, needs_h=needs_h, dbias_dtype=dbias_dtype, later=tables)
    else:
        summed = None if dy_sum is None else (dy, dy_sum)
        dh = torch.mm(dy, weight)
        made = activation_backward(
            dh, z, activation, needs_h=needs_h, dbias_dtype=dbias_dtype, summed=summed, later=tables
        )
    if later is None:
        add_all(tables)
    return made


def _select(operands: tuple[torch.Tensor, ...], N: int, K: int, epilogue: str, activation: str | None) -> Gemm:
    """The table's choice for a product (M, K) x (K, N), or cuBLAS where that backend cannot compute it."""
    first = operands[0]
    tuned = activation == EPILOGUES[epilogue]
    gemm = select_gemm(first.shape[0], N, K, first.dtype, epilogue, architecture(first), tuned_activation=tuned)
    if gemm is CUBLAS or gemm.backend == "cublas":
        return CUBLAS
    if first.is_cuda and first.dtype == torch.float32:  # IEEE products have no matrix instructions
        return CUBLAS
    return gemm if fits(gemm, N, *operands) else CUBLAS
