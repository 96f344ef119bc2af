"""Which backend a product gets."""

import pytest
import torch

from fastdeit.aot.catalog import ARCHITECTURES
from fastdeit.kernels.gemm import config as gemm_config
from fastdeit.kernels.gemm.config import CUBLAS, EPILOGUES, Gemm, Measured, Tile, candidates, select_gemm, use_gemm

ENTRY = Measured(range(100, 400), 3072, 768, torch.bfloat16, "activation", Gemm("tma", Tile(128, 128)))


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(gemm_config, "GEMMS", {90: (ENTRY,)})
    gemm_config._select.cache_clear()
    yield
    gemm_config._select.cache_clear()


def test_what_is_not_measured_is_the_librarys():
    assert select_gemm(50432, 3072, 768, torch.bfloat16, "activation", 90) is CUBLAS


@pytest.mark.parametrize(
    ("change", "ours"),
    [
        ({}, True),
        (dict(M=399), True),
        (dict(M=400), False),
        (dict(N=768), False),
        (dict(K=192), False),
        (dict(dtype=torch.float16), False),
        (dict(epilogue="activation_z"), False),
        (dict(arch=80), False),
        (dict(tuned_activation=False), False),
    ],
)
def test_an_entry_speaks_for_its_own_shapes_alone(change, ours, measured):
    call = dict(M=100, N=3072, K=768, dtype=torch.bfloat16, epilogue="activation", arch=90) | change
    assert select_gemm(**call) == (ENTRY.gemm if ours else CUBLAS)


def test_the_table_s_form_is_python():
    names = dict(Measured=Measured, Gemm=Gemm, Tile=Tile, torch=torch, range=range)
    assert eval(repr({90: (ENTRY,)}), names) == {90: (ENTRY,)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_candidates_are_what_the_architecture_can_run(epilogue, arch):
    backends = {gemm.backend for gemm in candidates(arch, epilogue)}
    assert "cublas" not in backends and ("tma" in backends) == (arch >= 90)


def test_a_backend_is_forced_within_the_statement_alone():
    with use_gemm("triton"):
        assert select_gemm(8, 8, 8, torch.float16, "activation", 80).backend == "triton"
        with use_gemm("cublas"):
            assert select_gemm(8, 8, 8, torch.float16, "activation", 80) is CUBLAS
    with use_gemm("tma"):
        assert select_gemm(8, 8, 8, torch.float16, "activation", 80) is CUBLAS  # which has none
    assert select_gemm(8, 8, 8, torch.float16, "activation", 80) is CUBLAS


def test_an_unknown_backend_is_named():
    with (
        pytest.raises(ValueError, match="backend: expected one of cublas, triton, tma, got 'cutlass'"),
        use_gemm("cutlass"),
    ):
        pass


def test_a_measurement_speaks_for_half_to_twice_its_rows():
    assert gemm_config.around(197) == range(99, 394)
