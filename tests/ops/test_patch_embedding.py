"""`ops.patch_embedding`: numerics by the contract, odd images and weights, both paths, bad input."""

import pytest
import torch

from fastdeit import backends, ops, testing
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

DEVICE = kernel_device()
DTYPES = kernel_dtypes()
PRODUCTS = kernel_dtypes(products=True)
NAMES = ("images", "weight", "bias", "positions", "class_token", "more_tokens")


def tensors(batch=3, size=(12, 8), patch=(4, 4), channels=24, more=1, placed="all", dtype=torch.float32, colours=3):
    """In the order of NAMES."""
    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    given = (
        torch.randn(batch, colours, *size),
        torch.randn(channels, colours, *patch) * (colours * patch[0] * patch[1]) ** -0.5,
        0.1 * torch.randn(channels),
        0.2 * torch.randn(1, patches + (1 + more if placed == "all" else 0), channels),
        torch.randn(1, 1, channels),
        torch.randn(1, more, channels),
    )
    return [t.to(DEVICE, dtype) for t in given]


def under(function, autocast):
    """The function, under autocast to the dtype given, but for the oracle."""

    def call(images, *rest):
        enabled = autocast is not None and images.dtype != torch.float64
        with torch.autocast(DEVICE.type, dtype=autocast, enabled=enabled):
            return function(images, *rest)

    return call


def assert_accurate(given, frozen=(), autocast=None):
    pair = (under(f, autocast) for f in (ops.patch_embedding, ops.patch_embedding_reference))
    assert_as_accurate_as_eager(*pair, *given, frozen=frozen)


form = pytest.mark.parametrize(
    ("dtype", "autocast"),
    [*((dtype, None) for dtype in DTYPES), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)],
)


@form
@pytest.mark.parametrize("placed", ["all", "patches"])
@pytest.mark.parametrize("more", [1, 4])
def test_as_accurate_as_eager(more, placed, dtype, autocast):
    assert_accurate(tensors(more=more, placed=placed, dtype=dtype), autocast=autocast)


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_are_read_less_128(dtype):
    """Raw images give what those levels give as numbers, to the bit, whatever their memory layout."""
    _, *rest = tensors(dtype=dtype)
    levels = torch.randint(0, 256, (3, 3, 12, 8), dtype=torch.uint8, device=DEVICE)
    with backends.use_backend("triton"):
        expected = ops.patch_embedding(levels.to(dtype) - 128, *rest)
        for images in (levels, levels.to(memory_format=torch.channels_last), levels.repeat(1, 1, 1, 2)[..., :8]):
            assert torch.equal(ops.patch_embedding(images, *rest), expected)
    assert_accurate([levels.to(dtype) - 128, *rest])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", [{i} for i in range(2, 6)] + [{2, 3}, {4, 5}, {3, 4, 5}, {2, 3, 4, 5}], ids=str)
def test_without_some_of_them(absent, dtype):
    given = tensors(placed="all" if absent.isdisjoint({4, 5}) else "patches", dtype=dtype)
    assert_accurate([None if i in absent else t for i, t in enumerate(given)])


@pytest.mark.parametrize("autocast", [None, torch.float16])
@pytest.mark.parametrize("trained", range(6), ids=NAMES)
def test_one_input_trained(trained, autocast):
    assert_accurate(tensors(), [i for i in range(6) if i != trained], autocast)


@pytest.mark.parametrize("frozen", range(6), ids=NAMES)
def test_one_input_frozen(frozen):
    assert_accurate(tensors(), [frozen])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(batch=17, size=(1, 1), patch=(1, 1), channels=1),
        dict(batch=5, size=(7, 11), patch=(3, 2), channels=13, colours=1),  # pixels left over
        dict(batch=2, size=(10, 15), patch=(5, 5), channels=130, colours=5),
    ],
)
def test_sizes_that_fit_no_tile(sizes, dtype):
    assert_accurate(tensors(**sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_images_and_weights(dtype):
    images, weight, *rest = tensors(dtype=dtype)
    last = torch.channels_last
    assert_accurate([images.contiguous(memory_format=last), weight.contiguous(memory_format=last), *rest])
    assert_accurate([images.transpose(2, 3).contiguous().transpose(2, 3), weight, *rest])
    wide = torch.randn(3, 3, 12, 19, device=DEVICE).to(dtype)[..., 1:17:2]
    assert_accurate([wide, weight, *rest])


def run(function, given):
    given = [t if t is None else t.detach().clone().requires_grad_() for t in given]
    with backends.use_backend("triton"):
        out = function(*given)
        out.float().square().sum().backward()
    return [out.detach(), *(t.grad for t in given if t is not None)]


@form
def test_all_paths_and_repeats_give_the_same_bits(dtype, autocast):
    torch.compiler.reset()
    function = under(ops.patch_embedding, autocast)
    eager, again = (run(function, tensors_of_seed(dtype)) for _ in range(2))
    compiled = run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors_of_seed(dtype))
    for other in (again, compiled):
        assert all(torch.equal(a, b) for a, b in zip(eager, other, strict=True))


def tensors_of_seed(dtype):
    torch.manual_seed(3)
    return tensors(dtype=dtype)


@pytest.mark.parametrize("trained", [range(6), [1, 2], [0], [3]], ids=str)
def test_registered_op_passes_opcheck(trained):
    given = [t.requires_grad_(i in trained) for i, t in enumerate(tensors(batch=2, placed="patches"))]
    op = torch.ops.fastdeit.patch_embedding_forward
    torch.library.opcheck(op, (*given, torch.float32, 1 in trained))
    torch.library.opcheck(op, (*given[:2], None, None, None, given[5], torch.bfloat16, 1 in trained))


def test_no_two_gradients_share_memory():
    gradients = run(ops.patch_embedding, tensors())[1:]
    storages = {g.untyped_storage().data_ptr() for g in gradients}
    assert len(storages) == len(gradients)


@pytest.mark.parametrize("placed", ["all", "patches"])
@pytest.mark.parametrize("registered", [False, True])
def test_gradients_have_the_strides_of_their_parameters(placed, registered, monkeypatch):
    """DDP warns of others, those of dimensions of size one included, and copies each gradient once more."""
    monkeypatch.setattr(backends, "registered_path", lambda *_: registered)
    given = [t.requires_grad_() for t in tensors(placed=placed)]
    with backends.use_backend("triton"):
        gradients = torch.autograd.grad(ops.patch_embedding(*given).sum(), given)
    for name, tensor, gradient in zip(NAMES, given, gradients, strict=True):
        assert gradient.stride() == tensor.stride(), name


def test_saves_the_patches_in_the_dtype_of_the_product_and_only_for_the_weight(saved_bytes):
    given = tensors()
    parameters = [t.requires_grad_() for t in given[1:]]
    op = under(ops.patch_embedding, torch.bfloat16)
    with backends.use_backend("triton"):
        assert saved_bytes(op, given, parameters, casts=False) == 2 * given[0].numel()
        parameters[0].requires_grad_(False)
        assert saved_bytes(op, given, parameters, casts=False) == 0


def test_products_that_overflow_do_as_in_the_reference():
    given = tensors(dtype=torch.float16)
    given[0] = given[0] * 3e4
    with backends.use_backend("triton"):
        tokens = ops.patch_embedding(*given)
    expected = ops.patch_embedding_reference(*given)
    assert not expected.isfinite().all() and expected[:, :2].isfinite().all()
    assert torch.equal(tokens.isfinite(), expected.isfinite())


def test_a_prefix_gradient_that_overflows_stays_out_of_the_weight():
    given = [t.requires_grad_() for t in tensors()]
    with backends.use_backend("triton"):
        (ops.patch_embedding(*given)[:, 0] * float("inf")).sum().backward()
    assert given[4].grad.isinf().all()
    assert not given[1].grad.any() and not given[2].grad.any()


def test_empty_batch():
    given = [t.requires_grad_() for t in tensors(batch=0)]
    with backends.use_backend("triton"), testing.poisoned_memory():
        out = ops.patch_embedding(*given)
        out.sum().backward()
    assert out.shape == (0, 8, 24)
    assert not any(t.grad.any() for t in given)


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["sum", "squares"])
def test_a_second_derivative_is_refused_clearly(loss):
    images, *rest = tensors(dtype=PRODUCTS[0])
    images.requires_grad_()
    with backends.use_backend("triton"):
        (gradient,) = torch.autograd.grad(loss(ops.patch_embedding(images, *rest)), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_reference_in_an_exported_graph_takes_other_batch_sizes():
    class Embedding(torch.nn.Module):
        def forward(self, images, *rest):
            return ops.patch_embedding(images, *rest)

    given, two = (tensors(batch=batch) for batch in (3, 2))
    shapes = {0: torch.export.Dim("batch", max=8)}, (None,) * 5
    with backends.use_backend("reference"):
        program = torch.export.export(Embedding(), tuple(given), dynamic_shapes=shapes, strict=False)
        torch.testing.assert_close(program.module()(*two), ops.patch_embedding(*two))


@pytest.mark.parametrize("placed", ["all", "patches"])
def test_reference_gradients(placed):
    given = [t.cpu().double().requires_grad_() for t in tensors(2, (4, 4), (2, 2), 3, placed=placed)]
    assert torch.autograd.gradcheck(ops.patch_embedding, given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(images=torch.ones(3, 12, 8)), ValueError, r"images: expected shape \(B, K, H, W\), got \(3, 12, 8\)"),
        (dict(images=torch.ones(1, 3, 12, 3)), ValueError, "images: expected at least 4 x 4 pixels.*got 12 x 3"),
        (
            dict(weight=torch.ones(8, 3, 0, 4)),
            ValueError,
            "weight: expected patches of at least 1 x 1 pixels, got 0 x 4",
        ),
        (dict(images=torch.ones(1, 3, 12, 8).char()), TypeError, "images: expected a floating-point.*torch.int8"),
        (
            dict(weight=torch.ones(24, 1, 4, 4)),
            ValueError,
            r"weight: expected shape \(C, 3, P, Q\), got \(24, 1, 4, 4\)",
        ),
        (dict(weight=None), TypeError, "weight: expected a floating-point tensor, got NoneType"),
        (dict(weight=torch.ones(24, 3, 4, 4).half()), TypeError, "weight: expected torch.float32.*got torch.float16"),
        (dict(bias=torch.ones(23)), ValueError, r"bias: expected shape \(24,\), got \(23,\)"),
        (
            dict(positions=torch.ones(1, 7, 24)),
            ValueError,
            r"positions: .*\(1, 8, 24\) or \(1, 6, 24\), got \(1, 7, 24\)",
        ),
        (dict(positions=torch.ones(1, 8, 24, device="meta")), ValueError, "positions: expected device cpu.*got meta"),
        (
            dict(class_token=torch.ones(3, 1, 24)),
            ValueError,
            r"class_token: expected shape \(1, 1, 24\), got \(3, 1, 24\)",
        ),
        (dict(more_tokens=torch.ones(1, 24)), ValueError, r"more_tokens: expected shape \(1, any, 24\), got \(1, 24\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = dict(zip(NAMES, (t.cpu() for t in tensors()), strict=True)) | change
    with pytest.raises(error, match=message):
        ops.patch_embedding(**given)
