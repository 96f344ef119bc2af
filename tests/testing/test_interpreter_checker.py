"""Every op's kernels, forward and backward, under the checker for Triton's interpreter; and the checker finds planted faults.

With `-s` the last line says how much was checked.
"""

from collections import Counter

import pytest
import torch
import triton
import triton.language as tl

from fastdeit import backends, ops, testing
from fastdeit.kernels.gemm import tiles
from fastdeit.kernels.gemm.folded_weights import fold_both_forward
from fastdeit.kernels.runtime.launch import launch
from fastdeit.testing.interpreter_checker import checked_interpreter
from fastdeit.testing.merged_folds import folded_in_one_launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
MULTIPLES = (tiles.assume_multiple_of,)
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def randn(*shape, dtype=fp32):
    return torch.randn(shape).to(dtype)


def offset(x, elements=1):
    """The same values with a base so many elements behind a 16-byte boundary."""
    storage = torch.empty(x.numel() + elements, dtype=x.dtype)
    return storage[elements:].view(x.shape).copy_(x)


def gapped(x, gap):
    """The same values with a gap behind each row."""
    return torch.nn.functional.pad(x, (0, gap), value=float("nan"))[..., : x.shape[-1]]


def transposed(x):
    """The same values with the samples innermost."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def same(x):
    return x


CHECKED = Counter()  # calls of ops, and the checker's counts over all of them


@pytest.fixture(scope="module", autouse=True)
def totals():
    yield
    print("\nchecked:", ", ".join(f"{count} {what}" for what, count in CHECKED.items()))


def check(op, *inputs, frozen=()):
    """Runs op and its gradients of all floating-point inputs but the frozen, and returns what the checker found."""
    leaves = [x.detach() for x in inputs]
    for i, x in enumerate(leaves):
        if x.is_floating_point() and i not in frozen:
            x.requires_grad_()
    with backends.use_backend("triton"), testing.poisoned_memory(), checked_interpreter(MULTIPLES) as checker:
        outputs = op(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [y for y in outputs if y.requires_grad]
        torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], [torch.randn_like(y) for y in outputs])
    assert checker.counts["launches"] > 1 and checker.counts["stores"] > 1
    CHECKED.update(
        {"ops, forward and where they have one backward": 1}, findings=len(checker.findings), **checker.counts
    )
    return checker.findings


@pytest.mark.parametrize(
    "tokens, head_dim, heads, dtype, layout",
    [
        (130, 64, 1, bf16, same),
        (1, 32, 1, fp16, same),
        (17, 72, 1, bf16, same),
        (65, 80, 1, fp16, lambda x: gapped(x, 8)),
        (66, 104, 1, bf16, offset),
        (33, 48, 2, fp16, lambda x: gapped(x, 1)),
        (5, 64, 3, fp32, transposed),
    ],
)
def test_attention(tokens, head_dim, heads, dtype, layout):
    qkv = layout(randn(2, tokens, 3 * heads * head_dim, dtype=dtype))
    assert check(lambda x: ops.attention(x, heads), qkv) == []


def test_attention_through_descriptors(monkeypatch):
    """What a grid that fills a GPU runs; as small a one as this runs pointers and tiles of half the size."""
    from fastdeit.kernels.attention import forward

    plain = forward.select_config
    monkeypatch.setattr(forward, "select_config", lambda batch, *rest: plain(4096, *rest))
    assert check(lambda x: ops.attention(x, 1), randn(1, 66, 3 * 80, dtype=bf16)) == []


@pytest.mark.parametrize("queries, keys", [(37, 70), (64, 3)])
def test_attention_qkv(queries, keys):
    q = transposed(randn(2, queries, 2, 64, dtype=fp16))
    k, v = gapped(randn(2, keys, 2, 64, dtype=fp16), 4), offset(randn(2, keys, 2, 64, dtype=fp16), 2)
    assert check(ops.attention_qkv, q, k, v) == []


@pytest.mark.parametrize(
    "channels, dtype, layout",
    [
        (192, bf16, same),
        (193, fp32, same),
        (384, fp16, offset),
        (1000, bf16, lambda x: gapped(x, 3)),
        (64, fp32, lambda x: x[:, 1:]),
    ],
)
def test_layer_norm(channels, dtype, layout):
    x, weight, bias, gamma = (
        layout(randn(3, 5, channels, dtype=dtype)),
        randn(channels),
        randn(channels),
        randn(channels),
    )
    assert check(ops.layer_norm, x, weight, bias) == []
    stream, scale = layout(randn(3, 5, channels)), torch.tensor([0.0, 1.25, 1.0])
    added = lambda x, b, w, v, g: ops.add_layer_norm(x, b, w, v, gamma=g, drop_path_scale=scale)  # noqa: E731
    assert check(added, stream, x, weight, bias, gamma) == []
    assert check(added, stream, x, weight, bias, gamma, frozen=(1, 2, 4)) == []


@pytest.mark.parametrize("width, attended, hidden", [(33, 40, 65), (192, 192, 384)])
@pytest.mark.parametrize("complete", [False, True])
def test_folds_of_two_branches_in_one_launch(width, attended, hidden, complete):
    def fold(rows, inner):
        head, tail = ((randn(*shape), randn(shape[0])) for shape in ((rows, width), (width, inner)))
        factors = [randn(width) if complete else None for _ in range(3)]
        options = dict(zip(("column_scale", "column_shift", "row_scale"), factors, strict=True))
        return lambda: fold_both_forward(head, tail, bf16, **options)

    with testing.poisoned_memory(), checked_interpreter(MULTIPLES) as checker:
        made = folded_in_one_launch([fold(3 * attended, attended), fold(hidden, hidden)])
    assert checker.findings == [] and checker.counts["launches"] == 1 and checker.counts["programs"] > 10
    assert all(tensor.isfinite().all() for both in made for layer in both for tensor in layer)


@pytest.mark.parametrize(
    "channels, hidden, rows, dtype", [(192, 768, 7, bf16), (33, 65, 5, fp16), (64, 130, 70, bf16), (24, 1, 1, fp16)]
)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_mlp(channels, hidden, rows, dtype, activation):
    inputs = [
        randn(*s, dtype=dtype)
        for s in ((rows, channels), (hidden, channels), (hidden,), (channels, hidden), (channels,))
    ]
    assert check(lambda *given: ops.mlp(*given, activation=activation), *inputs) == []
    assert check(lambda *given: ops.linear(*given, activation=activation), *inputs[:3]) == []


@pytest.mark.parametrize("batch, tokens, channels, hidden, autocast", [(3, 5, 48, 96, True), (2, 35, 40, 72, False)])
def test_branches(batch, tokens, channels, hidden, autocast):
    stream, low = (fp32, bf16) if autocast else (fp16, fp16)
    scale = torch.tensor([0.0, 1.25, 1.0])[:batch]
    head = [randn(batch, tokens, channels, dtype=stream), randn(batch, tokens, channels, dtype=low)]
    head += [randn(channels, dtype=stream) for _ in range(3)]

    def weights(inner, outputs):
        return [randn(*s, dtype=stream) for s in ((inner, channels), (inner,), (channels, outputs), (channels,))]

    def mlp(x, branch, norm, shift, gamma, *w):
        return ops.add_layer_norm_mlp(x, branch, norm, shift, 1e-6, *w, gamma=gamma, drop_path_scale=scale)

    def attention(x, branch, norm, shift, gamma, *w):
        return ops.add_layer_norm_attention(x, branch, norm, shift, 1e-6, *w, 1, gamma=gamma, drop_path_scale=scale)

    with torch.autocast("cpu", bf16, enabled=autocast):
        assert check(mlp, *head, *weights(hidden, hidden)) == []
        assert check(attention, *head, *weights(96, 32)) == []
        assert (
            check(
                lambda x, b, n, s, g, *w: ops.layer_norm_mlp(x, n, s, 1e-6, *w),
                *head,
                *weights(hidden, hidden),
                frozen=(1, 4),
            )
            == []
        )


@pytest.mark.parametrize("channels, more, dtype", [(32, True, bf16), (36, False, fp16), (33, True, fp32)])
def test_patch_embedding(channels, more, dtype):
    inputs = [randn(5, 3, 33, 49, dtype=dtype), randn(channels, 3, 16, 16, dtype=dtype), randn(channels, dtype=dtype)]
    inputs += [
        randn(1, 7 + more, channels, dtype=dtype),
        *(randn(1, 1, channels, dtype=dtype) for _ in range(1 + more)),
    ]
    assert check(ops.patch_embedding, *inputs, frozen=(0,)) == []


@pytest.mark.parametrize(
    "classes, kind, base, dtype, layout",
    [
        (1000, "hard", "cross_entropy", bf16, same),
        (1001, "soft", "cross_entropy", fp16, same),
        (1000, "soft", "binary_cross_entropy", fp32, lambda x: gapped(x, 4)),
        (24, "hard", "cross_entropy", bf16, offset),
        (5000, "soft", "cross_entropy", bf16, same),
        (48, "none", "cross_entropy", fp16, lambda x: gapped(x, 2)),
    ],
)
def test_distillation(classes, kind, base, dtype, layout):
    target, teacher = torch.rand(4, classes).softmax(1), layout(randn(4, classes, dtype=dtype))

    def loss(head, dist=None):
        given = None if kind == "none" else teacher
        return ops.distillation_cross_entropy(head, dist, target, given, kind=kind, base=base, tau=3.0)

    assert check(loss, *(layout(randn(4, classes, dtype=dtype)) for _ in range(1 if kind == "none" else 2))) == []


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("branch_kept, kept", [(3, 2), (None, 1), (5, None)])
def test_branches_on_subsets(branch_kept, kept, autocast):
    """The last sample is in neither subset, where there are two."""
    stream, low = (fp32, bf16) if autocast else (fp16, fp16)
    x, branch = randn(5, 7, 40, dtype=stream), randn(branch_kept or 5, 7, 40, dtype=low)
    places = torch.tensor([2, 1, 3, 0, 4])
    options = dict(branch_slots=places if branch_kept else None, slots=places.flip(0).roll(-1) if kept else None)
    options |= dict(kept=kept, drop_path_scale=torch.full((5,), 5 / 3))
    norm = [1 + 0.1 * randn(40), randn(40)]

    def weights(inner, outputs):
        return [randn(*s, dtype=stream) for s in ((inner, 40), (inner,), (40, outputs), (40,))]

    def mlp(x, branch, norm, shift, *w):
        return ops.add_layer_norm_mlp(x, branch, norm, shift, 1e-6, *w, **options)

    def attention(x, branch, norm, shift, *w):
        return ops.add_layer_norm_attention(x, branch, norm, shift, 1e-6, *w, 1, **options)

    with torch.autocast("cpu", bf16, enabled=autocast):
        for op, inner, outputs in ((mlp, 72, 72), (attention, 96, 32)):
            for frozen in ((), (0,), (1,)):
                inputs = (x, branch, *(p.to(stream) for p in norm), *weights(inner, outputs))
                assert check(op, *inputs, frozen=frozen) == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bits(dtype, monkeypatch):
    """The ops without a gradient. Attention over pointers, of separate heads, and through descriptors."""
    from fastdeit.kernels.attention import forward

    x, branch, step = randn(2, 5, 100, dtype=bf16), randn(2, 5, 100, dtype=bf16), torch.tensor([0.1])
    weight, bias, gamma = (randn(100) for _ in range(3))
    q, k, v = (transposed(randn(2, 37, 2, 48, dtype=bf16)) for _ in range(3))
    plain = forward.select_config
    with backends.use_backend("triton"), testing.poisoned_memory(), checked_interpreter(MULTIPLES) as checker:
        ops.add_layer_norm_quantize(x, branch, weight, bias, gamma=gamma, dtype=dtype)
        ops.rescale(x, scale=step, activation="gelu", out_dtype=dtype)
        ops.rescale(
            torch.ones(7, 33, dtype=torch.int32), row_scale=torch.ones(7), column_scale=torch.ones(33), out_dtype=bf16
        )
        ops.attention_quantize(randn(2, 70, 3 * 72, dtype=bf16), 1, step, dtype=dtype)
        ops.attention_qkv_quantize(q, k, v, step, dtype=dtype)
        monkeypatch.setattr(forward, "select_config", lambda batch, *rest: plain(4096, *rest))
        ops.attention_quantize(randn(1, 66, 3 * 80, dtype=bf16), 1, step, dtype=dtype)
    assert checker.findings == [] and checker.counts["launches"] == 6
    CHECKED.update(
        {"ops, forward and where they have one backward": 6}, findings=len(checker.findings), **checker.counts
    )


# ---- planted faults


@triton.jit(do_not_specialize=["N"])
def copy_kernel(x_ptr, y_ptr, N, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if FAULT == "read past the end":
        x = tl.load(x_ptr + at)
    else:
        x = tl.load(x_ptr + at, at < N, other=0.0)
    if FAULT == "multiple_of":
        at = tl.multiple_of(at, 2 * BLOCK)
    if FAULT == "max_contiguous":
        at = tl.max_contiguous(at // 2 * 2, BLOCK)
        at = tl.arange(0, BLOCK) + tl.program_id(0) * BLOCK
    if FAULT == "assume":
        tl.assume(N > 100)
    if FAULT == "multiple":
        at += tiles.assume_multiple_of(N, 16) - N // 16 * 16
    if FAULT == "write past the end":
        tl.store(y_ptr + at, x)
    elif FAULT == "one address":
        tl.store(y_ptr + at % BLOCK, x, at < N)
    elif FAULT == "twice in a store":
        tl.store(y_ptr + at // 2, x, at < N)
    elif FAULT == "of another":
        tl.store(y_ptr + at, x + tl.load(y_ptr + (at + BLOCK) % N, at < N, other=0.0), at < N)
    elif FAULT == "what it stored":
        tl.store(y_ptr + at, x, at < N)
        tl.store(x_ptr + at, tl.load(y_ptr + at, at < N, other=0.0), at < N)
    else:
        tl.store(y_ptr + at, x, at < N)


@pytest.mark.parametrize(
    "fault, finding",
    [
        ("", None),
        ("read past the end", "a lane reads outside every argument's elements"),
        ("write past the end", "a lane writes outside every argument's elements"),
        ("one address", "two programs write one address"),
        ("twice in a store", "a store writes an address twice"),
        ("of another", "a program reads what another writes"),
        ("what it stored", "a program reads what it has stored"),
        ("multiple_of", "multiple_of(16) is false"),
        ("max_contiguous", "max_contiguous(8) is false"),
        ("assume", "assume() is false"),
        ("multiple", "a value is no multiple of 16, as it is said to be"),
    ],
)
def test_a_planted_fault_is_found(fault, finding):
    storage = torch.zeros(2, 32)
    x, y = storage[:, :20].unbind()
    with checked_interpreter(MULTIPLES) as checker:
        launch(copy_kernel, (3,), (x, y, 20), (fault, 8), 1)
    assert checker.findings == ([] if finding is None else [f"copy_kernel: {finding}"])
    assert checker.counts["programs"] == 3


def test_programs_run_in_another_order_and_a_gap_is_no_element():
    """Only the gaps behind rows are written: the storage is there, the elements are not."""
    x, y = torch.arange(24.0), torch.zeros(4, 8)[:, :6]
    with checked_interpreter(seed=1) as checker:
        launch(copy_kernel, (3,), (x, y, 24), ("", 8), 1)
    assert checker.findings == ["copy_kernel: a lane writes outside every argument's elements"]


def test_the_interpreter_is_as_before():
    x, y = torch.arange(20.0), torch.zeros(20)
    with checked_interpreter(MULTIPLES) as checker:
        pass
    launch(copy_kernel, (3,), (x, y, 20), ("multiple", 8), 1)
    assert torch.equal(x, y) and not checker.counts
