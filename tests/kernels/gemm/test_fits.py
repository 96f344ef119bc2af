"""Which matrices a GEMM kernel of ours takes: each condition by itself, on host tensors."""

import pytest
import torch

from fastdeit.kernels.gemm.config import candidates
from fastdeit.kernels.gemm.forward import LONGEST_STRIDE, fits

GEMMS = {gemm.backend: gemm for gemm in candidates(90, "activation")}


def matrices(dtype=torch.bfloat16):
    return torch.zeros(64, 32, dtype=dtype), torch.zeros(48, 32, dtype=dtype)


@pytest.mark.parametrize("backend", GEMMS)
def test_dense_matrices_fit(backend):
    assert fits(GEMMS[backend], 48, *matrices())


@pytest.mark.parametrize("backend", GEMMS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.t().contiguous().t(),  # columns next to each other instead of rows
        lambda x: x.repeat(1, 2)[:, ::2],  # every other element
        lambda x: x[:0],
        lambda x: x[:, :0],
        lambda x: x[:1].expand_as(x),  # one row again and again
        lambda x: torch.as_strided(x.new_zeros(32), (1, 32), (LONGEST_STRIDE + 8, 1)),
    ],
    ids=["transposed", "every other", "no rows", "no columns", "one row", "too far apart"],
)
def test_others_do_not(backend, which, change):
    operands = list(matrices())
    operands[which] = change(operands[which])
    assert not fits(GEMMS[backend], 48, *operands)


@pytest.mark.parametrize("change", [lambda x: x.repeat(1, 2)[:, 4:36], lambda x: x.repeat(1, 2)[:, :32]])
def test_a_slice_of_wider_rows_fits_pointers(change):
    assert fits(GEMMS["triton"], 48, change(matrices()[0]), matrices()[1])


def test_descriptors_need_16_bytes():
    assert not fits(GEMMS["tma"], 48, matrices()[0].repeat(1, 2)[:, 4:36], matrices()[1])
    assert fits(GEMMS["tma"], 48, matrices()[0].repeat(1, 2)[:, 8:40], matrices()[1])
    assert not fits(GEMMS["tma"], 44, *matrices())
