"""What Triton 3.7 and newer emit and 3.6 does not: other spellings of instructions, and parameters that are selected by address."""

import numpy as np
import pytest
import torch

from fastdeit.testing.ptx.program import PtxError
from tests.testing.ptx.test_tensor_copy import load


def test_shared_memory_of_the_own_block_by_its_full_name(execute):
    body = """shl.b32 %r30, %tid, 2;
        st.shared::cta.b32 [%r30], %r1;
        bar.sync 0;
        xor.b32 %r30, %r30, 124;
        ld.shared::cta.b32 %r2, [%r30];"""
    (read,) = execute(body, {"%r1": np.arange(32, dtype=np.int32)}, ["%r2"], shared=128)
    assert read.tolist() == list(range(31, -1, -1))


def test_an_atomic_addition_whose_order_and_scope_are_spelled_out(execute):
    body = """mov.b32 %r30, 0;
        setp.eq.b32 %p1, %tid, 0;
        @%p1 st.shared.b32 [%r30], %r30;
        bar.sync 0;
        atom.relaxed.sys.shared.add.u32 %r2, [%r30], %r1;"""
    (before,) = execute(body, {"%r1": np.full(32, 3, np.int32)}, ["%r2"], shared=128)
    assert sorted(before.tolist()) == [3 * i for i in range(32)]


def test_the_bytes_of_a_load_that_are_used_are_no_matter_of_the_machine(execute):
    body = """shl.b32 %r30, %tid, 2;
        st.shared.b32 [%r30], %r1;
        .pragma "used_bytes_mask 0xf";
        ld.shared.b32 %r2, [%r30];"""
    (read,) = execute(body, {"%r1": np.arange(32, dtype=np.int32)}, ["%r2"], shared=128)
    assert read.tolist() == list(range(32))
    with pytest.raises(PtxError, match=r"cannot parse '\.pragma"):
        execute(body.replace("used_bytes_mask", "nounroll"), {"%r1": np.arange(32, dtype=np.int32)}, ["%r2"])


SELECTED = """ld.param.u64 %rd3, [p0];
    ld.param.u64 %rd4, [p1];
    mov.b64 %rd5, p0;
    mov.b64 %rd6, p1;
    and.b32 %r30, %r1, 1;
    setp.eq.b32 %p1, %r30, 0;
    selp.b64 %rd7, %rd5, %rd6, %p1;
    ld.param.b64 %rd8, [%rd7];
    sub.s64 %rd1, %rd8, %rd3;
    sub.s64 %rd2, %rd8, %rd4;"""


def test_a_parameter_is_read_at_a_selected_address(execute):
    odd = np.arange(32, dtype=np.int32)
    first, second = execute(SELECTED, {"%r1": odd}, ["%rd1", "%rd2"])
    assert ((first == 0) == (odd % 2 == 0)).all() and ((second == 0) == (odd % 2 == 1)).all()


@pytest.mark.parametrize("line", ["add.s64 %rd7, %rd7, 7;", "mov.b64 %rd7, 4096;"])
def test_an_address_that_is_no_parameters_is_refused(line, execute):
    body = SELECTED.replace("    ld.param.b64 %rd8", f"    {line}\n    ld.param.b64 %rd8")
    with pytest.raises(PtxError, match="no parameter's"):
        execute(body, {"%r1": np.arange(32, dtype=np.int32)}, ["%rd1", "%rd2"])


def test_a_tensor_copy_to_the_own_block(execute):
    x = torch.arange(8 * 32, dtype=torch.int32).view(8, 32)
    body = load(8 * 32 * 4, "%r41, %r41").replace("shared::cluster", "shared::cta")
    (read,) = execute(body, {}, ["%r51"], threads=256, shared=33024, maps=[(x, (8, 32), 0)])
    assert read.tolist() == x.flatten().tolist()
