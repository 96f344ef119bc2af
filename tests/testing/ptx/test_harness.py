"""What is known of a launch before it is executed."""

import pytest
import torch

from fastdeit.kernels.runtime.launch import launch
from fastdeit.testing.ptx.compiler import why_untested
from fastdeit.testing.ptx.harness import executing


class Kernel:
    """Stands for a compiled kernel, which these tests never compile."""

    __name__, arg_names = "kernel", ["x_ptr", "N", "BLOCK"]


@pytest.mark.skipif(why_untested() is not None, reason=str(why_untested()))
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")
@pytest.mark.parametrize("fp_fusion", [True, False])
def test_a_launch_is_noted_as_what_it_compiles(fp_fusion):
    noted = []
    with (
        executing(80, before_launch=lambda *args: noted.append(args)),
        pytest.raises(RuntimeError, match="interpreted kernels cannot be compiled"),
    ):
        x = torch.zeros(4)
        launch(Kernel(), (2,), (x, 4), (16,), 4, 3, fp_fusion=fp_fusion)
    ((variant, grid, args),) = noted
    assert variant.types == (("x_ptr", "*fp32"), ("N", "i32"), ("BLOCK", ("constexpr", 16)))
    assert (variant.num_warps, variant.num_stages, variant.fp_fusion) == (4, 3, fp_fusion)
    assert grid == (2,) and args[0] is x
