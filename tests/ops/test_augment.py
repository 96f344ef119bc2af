"""`ops.augment` is Pillow, bit for bit: each operation over its whole range, on photographs; layouts, flips, levels, bad input."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from fastdeit import backends, ops
from fastdeit.benchmarks.photographs import fitted
from fastdeit.kernels.augment import apply
from fastdeit.kernels.augment.operations import ROW, Operation
from fastdeit.testing import interpreter_active, kernel_device, poisoned_memory

DEVICE = kernel_device()
FILL = (124, 116, 104)


@pytest.fixture(autouse=True)
def one_block_an_image(monkeypatch, request):
    """The interpreter's time goes by programs. Tests that ask for `shipped_blocks` have the kernels' own."""
    if interpreter_active() and "shipped_blocks" not in request.fixturenames:
        for name in ("BLOCK", "PART"):
            monkeypatch.setattr(apply, name, 2048)


@pytest.fixture
def shipped_blocks():
    pass


FACTORS = [(factor,) for factor in np.linspace(0.0, 2.5, 26)]


def on_pillow(operation, *arguments):
    """The operation with Pillow, of an image."""
    enhance = {
        Operation.CONTRAST: ImageEnhance.Contrast,
        Operation.BRIGHTNESS: ImageEnhance.Brightness,
        Operation.COLOR: ImageEnhance.Color,
        Operation.SHARPNESS: ImageEnhance.Sharpness,
    }
    if operation in enhance:
        return lambda image: enhance[operation](image).enhance(arguments[0])
    return {
        Operation.NONE: lambda image: image,
        Operation.AUTOCONTRAST: ImageOps.autocontrast,
        Operation.EQUALIZE: ImageOps.equalize,
        Operation.INVERT: ImageOps.invert,
        Operation.POSTERIZE: functools.partial(_posterize, *arguments),
        Operation.SOLARIZE: lambda image: ImageOps.solarize(image, arguments[0]),
        Operation.SOLARIZE_ADD: lambda image: image.point(
            [min(255, i + arguments[0]) if i < 128 else i for i in range(256)] * len(image.getbands())
        ),
    }[operation]


def _posterize(bits, image):
    return image if bits >= 8 else image.point([i & ~(2 ** (8 - bits) - 1) for i in range(256)] * len(image.getbands()))


ARGUMENTS = {
    Operation.NONE: [()],
    Operation.AUTOCONTRAST: [()],
    Operation.EQUALIZE: [()],
    Operation.INVERT: [()],
    Operation.POSTERIZE: [(bits,) for bits in range(9)],
    Operation.SOLARIZE: [(threshold,) for threshold in range(0, 257, 16)] + [(1,), (255,)],
    Operation.SOLARIZE_ADD: [(added,) for added in range(0, 129, 8)] + [(1,), (110,)],
    Operation.CONTRAST: FACTORS,
    Operation.BRIGHTNESS: FACTORS,
    Operation.COLOR: FACTORS,
    Operation.SHARPNESS: FACTORS,
}


def row(operation, *arguments):
    return [float(operation), 0.0, *arguments, *[0.0] * (ROW - 2 - len(arguments))]


def affine(matrix, bicubic):
    return [float(Operation.AFFINE), float(bicubic), *matrix]


def matrices(width, height):
    """Shears, translations and rotations over timm's range and beyond it."""
    for share in np.linspace(-1, 1, 9):
        yield (1, 0.3 * share, 0, 0, 1, 0)
        yield (1, 0, 0, 0.3 * share, 1, 0)
        yield (1, 0, 0.45 * share * width, 0, 1, 0)
        yield (1, 0, 0, 0, 1, 0.45 * share * height)
    for degrees in (*range(-30, 31, 5), 0.1, 45, 133.7):
        found = []
        grabber = Image.new("L", (width, height))
        grabber.transform = lambda size, method, data, *rest, found=found, **options: found.append(data)
        Image.Image.rotate(grabber, degrees, resample=Image.Resampling.BICUBIC)
        yield from found


def as_batch(images):
    arrays = [np.asarray(image).reshape(image.height, image.width, -1) for image in images]
    return (
        torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(DEVICE)
    )  # channels last in memory, as a loader has it


def plan_of(rows):
    return torch.tensor([[r] for r in rows], dtype=torch.float64, device=DEVICE)


def pictures(mode, width=40, height=32):
    images = [image.convert(mode) for image in fitted(width, height)]
    flat = Image.new(
        mode, (width, height), 77 if mode == "L" else (0, 77, 255)
    )  # one level: nothing to stretch or equalize
    return [*images, flat]


def check(images, operations, expected, backend, **options):
    with backends.use_backend(backend), poisoned_memory():
        got = ops.augment(as_batch(images), plan_of(operations), **options)
    assert got.is_contiguous() and got.dtype == torch.uint8
    assert torch.equal(got, as_batch(expected))


backend = pytest.mark.parametrize("backend", ["reference", "triton"])
mode = pytest.mark.parametrize("mode", ["RGB", "L"])


@backend
@mode
@pytest.mark.parametrize("operation", ARGUMENTS, ids=lambda o: o.name.lower())
def test_an_operation_is_pillows_over_its_whole_range(operation, mode, backend):
    images = pictures(mode)
    arguments = ARGUMENTS[operation]
    if backend == "triton":  # interpreted: every argument once, each on one of the images
        cases = [
            (images[i % len(images)], arguments[i % len(arguments)]) for i in range(max(len(images), len(arguments)))
        ]
    else:
        cases = [(image, given) for image in images for given in arguments]
    chosen = [image for image, _ in cases]
    expected = [on_pillow(operation, *given)(image) for image, given in cases]
    check(chosen, [row(operation, *given) for _, given in cases], expected, backend)


@backend
@mode
@pytest.mark.parametrize("bicubic", [True, False])
def test_an_affine_operation_is_pillows(bicubic, mode, backend):
    images = pictures(mode)
    fill = FILL[: len(images[0].getbands())]
    moves = list(matrices(*images[0].size))[:: 3 if backend == "triton" else 1]
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    cases = [(images[i % len(images)], matrix) for i, matrix in enumerate(moves)]
    expected = [
        image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill) for image, matrix in cases
    ]
    check([image for image, _ in cases], [affine(m, bicubic) for m in moves], expected, backend, fill=fill)


@pytest.mark.parametrize("bicubic", [True, False])
def test_an_affine_operation_at_full_size(bicubic):
    images = fitted(224, 224)[:3]
    moves = list(matrices(224, 224))[1::11]
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    cases = [(image, matrix) for image in images for matrix in moves]
    expected = [i.transform(i.size, Image.Transform.AFFINE, m, resample, fillcolor=FILL) for i, m in cases]
    check([i for i, _ in cases], [affine(m, bicubic) for _, m in cases], expected, "reference", fill=FILL)


def mixed_plan(count, layers):
    """Every operation, the next image one operation on."""
    kinds = [
        *(row(operation, *given[len(given) // 2]) for operation, given in ARGUMENTS.items()),
        affine((0.9, 0.2, 3.0, -0.2, 0.9, 5.0), True),
        affine((0.9, 0.2, 3.0, -0.2, 0.9, 5.0), False),
    ]
    rows = [[kinds[(i + 5 * layer) % len(kinds)] for layer in range(layers)] for i in range(count)]
    return torch.tensor(rows, dtype=torch.float64, device=DEVICE).view(count, layers, ROW)


@mode
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_layers_flips_and_levels_on_the_kernels(layers, channels_last, mode):
    images = as_batch([image for image in pictures(mode, 33, 17) for _ in range(2)])
    images = images if channels_last else images.contiguous()
    flips = (torch.arange(len(images), device=DEVICE) % 4).to(torch.uint8)
    levels = torch.randn(images.shape[1], 256, device=DEVICE)
    plan = mixed_plan(len(images), layers)
    for options in (dict(), dict(flips=flips), dict(flips=flips, levels=levels)):
        expected = ops.augment_reference(images, plan, fill=FILL, **options)
        with backends.use_backend("triton"), poisoned_memory():
            got = ops.augment(images, plan, fill=FILL, **options)
        assert torch.equal(got, expected) and got.is_contiguous()


def test_the_blocks_that_ship(shipped_blocks):
    images, plan = as_batch(fitted(35, 31)), mixed_plan(6, 5)[:, [0, 2, 4]].contiguous()
    plan[0, 0], plan[1, 1] = (mixed_plan(13, 1)[kind, 0] for kind in (11, 12))  # affine operations
    with backends.use_backend("triton"), poisoned_memory():
        assert torch.equal(ops.augment(images, plan, fill=FILL), ops.augment_reference(images, plan, fill=FILL))


def test_flips_come_before_the_operations():
    image, matrix = fitted(40, 32)[0], (1, 0.2, 3, 0, 1, 0)
    for flips, methods in (
        (1, [Image.Transpose.FLIP_LEFT_RIGHT]),
        (2, [Image.Transpose.FLIP_TOP_BOTTOM]),
        (3, [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM]),
    ):
        expected = image
        for method in methods:
            expected = expected.transpose(method)
        expected = expected.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL
        )
        given = torch.tensor([flips], dtype=torch.uint8, device=DEVICE)
        check([image], [affine(matrix, True)], [expected], "triton", flips=given, fill=FILL)


def test_normalised_levels_are_the_formula_to_the_bit():
    images = as_batch(fitted(40, 32))
    mean, std = (
        torch.tensor(v, device=DEVICE).view(-1, 1, 1) * 255 for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    levels = torch.arange(256, device=DEVICE).float().expand(3, 1, 256).sub(mean).div(std)[:, 0].contiguous()
    plan = torch.empty(len(images), 0, ROW, dtype=torch.float64, device=DEVICE)
    with backends.use_backend("triton"):
        got = ops.augment(images, plan, levels=levels)
    assert torch.equal(got, images.contiguous().float().sub(mean).div(std))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (3, 2)])
def test_images_of_a_few_pixels(size):
    images = torch.randint(256, (14, 3, *size), dtype=torch.uint8, device=DEVICE)
    plan = mixed_plan(14, 2)
    with backends.use_backend("triton"), poisoned_memory():
        assert torch.equal(ops.augment(images, plan), ops.augment_reference(images, plan))


def test_an_empty_batch():
    plan = torch.empty(0, 2, ROW, dtype=torch.float64, device=DEVICE)
    assert ops.augment(torch.empty(0, 3, 8, 8, dtype=torch.uint8, device=DEVICE), plan).shape == (0, 3, 8, 8)


def test_the_registered_op():
    images, plan = as_batch(fitted(40, 32)), mixed_plan(6, 2)
    levels = torch.randn(3, 256, device=DEVICE)
    flips = torch.tensor([0, 1, 2, 3, 0, 1], dtype=torch.uint8, device=DEVICE)
    for options in ((None, None), (flips, levels)):
        torch.library.opcheck(torch.ops.fastdeit.augment.default, (images, plan, *options, list(FILL)))


def test_the_input_is_not_written_to():
    images = as_batch(fitted(40, 32))
    before = images.clone()
    with backends.use_backend("triton"):
        ops.augment(images, mixed_plan(6, 2))
    assert torch.equal(images, before)


IMAGES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
PLAN = torch.zeros(2, 1, ROW, dtype=torch.float64)


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, "images: expected a tensor of torch.uint8, got torch.float32", dict(images=IMAGES.float())),
        (TypeError, "plan: expected a tensor of torch.float64, got list", dict(plan=[])),
        (
            TypeError,
            "flips: expected a tensor of torch.uint8, got torch.bool",
            dict(flips=torch.zeros(2, dtype=torch.bool)),
        ),
        (TypeError, "levels: expected a tensor of torch.float32", dict(levels=torch.zeros(3, 256).double())),
        (ValueError, r"images: expected shape \(B, 1 or 3, H, W\) with pixels", dict(images=IMAGES[:, :2])),
        (ValueError, r"images: expected shape", dict(images=IMAGES[..., :0])),
        (ValueError, r"plan: expected shape \(2, any, 8\), got \(1, 1, 8\)", dict(plan=PLAN[:1])),
        (ValueError, r"plan: expected operations from 0 to 11, got 12", dict(plan=PLAN + 12)),
        (ValueError, r"plan: expected operations from 0 to 11, got 0.5", dict(plan=PLAN + 0.5)),
        (ValueError, r"flips: expected shape \(2,\)", dict(flips=torch.zeros(3, dtype=torch.uint8))),
        (ValueError, r"levels: expected shape \(3, 256\)", dict(levels=torch.zeros(1, 256))),
        (ValueError, "plan: expected device cpu as images has, got meta", dict(plan=PLAN.to("meta"))),
        (ValueError, "fill: expected 3 integers from 0 to 255", dict(fill=(1, 2))),
        (ValueError, "fill: expected 3 integers from 0 to 255", dict(fill=(1, 2, 256))),
    ],
)
def test_bad_arguments_are_named(error, message, changes):
    given = dict(images=IMAGES, plan=PLAN) | changes
    with pytest.raises(error, match=message):
        ops.augment(given.pop("images"), given.pop("plan"), **given)
