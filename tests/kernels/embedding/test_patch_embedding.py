"""The pointwise kernels of the patch embedding, against their formulas in float64."""

import pytest
import torch

from fastdeit.kernels.embedding.patch_embedding import (
    ELEMENTS,
    IMAGES,
    NUM_WARPS,
    Config,
    backward_elements,
    patch_embedding_backward,
    patch_embedding_forward,
    select_config,
)
from fastdeit.testing import assert_close_to_oracle, kernel_device, kernel_dtypes, poisoned_memory

DEVICE = kernel_device()
DTYPES = kernel_dtypes()
# images, patches, channels: one element, odd sizes, more than one step of images, tables of more than one block
SHAPES = [(1, 1, 1), (3, 5, 7), (2 * IMAGES + 1, 4, 24), (2, 9, ELEMENTS // 4 + 16)]


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def formula(product, bias, positions, class_token, more_tokens, dtype):
    product, bias, positions, class_token, more_tokens = (
        t if t is None else t.to(dtype) for t in (product, bias, positions, class_token, more_tokens)
    )
    patches = product if bias is None else product + bias
    prefix = [t.expand(len(product), -1, -1) for t in (class_token, more_tokens) if t is not None]
    tokens = torch.cat([*prefix, patches], 1)
    if positions is not None:
        tokens[:, tokens.shape[1] - positions.shape[1] :] += positions
    return tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "patches", "channels"), SHAPES)
@pytest.mark.parametrize(("one", "more", "placed"), [(1, 0, "all"), (1, 3, "all"), (1, 1, "patches"), (0, 2, "none")])
def test_tokens_are_rounded_once(one, more, placed, images, patches, channels, dtype):
    product, bias = randn(images, patches, channels, dtype=dtype), randn(channels)
    rows = {"all": patches + one + more, "patches": patches, "none": 0}[placed]
    added = [randn(1, count, channels) if count else None for count in (rows, one, more)]
    with poisoned_memory():
        tokens = patch_embedding_forward(product, bias, *added, torch.float32)
    exact, eager = (formula(product, bias, *added, kind) for kind in (torch.float64, torch.float32))
    assert_close_to_oracle("tokens", tokens, exact, eager, exact.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_the_dtype_asked_for(dtype):
    given = randn(3, 4, 16, dtype=dtype), *(randn(*shape, dtype=dtype) for shape in ((16,), (5, 16), (1, 16))), None
    with poisoned_memory():
        tokens = patch_embedding_forward(*given, dtype)
    assert torch.equal(
        tokens, formula(*(t if t is None else t.view(-1, *t.shape[-2:]) for t in given), torch.float32).to(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("images", "patches", "channels"), SHAPES)
def test_the_gradient_is_cast_packed_and_summed(images, patches, channels, prefix, dtype):
    dtokens = randn(images, prefix + patches, channels)
    with poisoned_memory():
        dproduct, total = patch_embedding_backward(dtokens, prefix, dtype, needs_sum=True)
    assert torch.equal(dproduct, dtokens[:, prefix:].to(dtype).reshape(-1, channels))
    largest = dtokens.abs().sum(0).max().item()
    assert_close_to_oracle("sum", total, dtokens.double().sum(0), dtokens.sum(0), largest)


def test_only_what_is_asked_for():
    dtokens = randn(3, 4, 8)
    both = patch_embedding_backward(dtokens, 1, torch.float16, needs_sum=True)
    assert torch.equal(patch_embedding_backward(dtokens, 1, torch.float16, needs_sum=False)[0], both[0])
    assert torch.equal(patch_embedding_backward(dtokens, 1, None, needs_sum=True)[1], both[1])
    assert patch_embedding_backward(dtokens, 1, None, needs_sum=False) == (None, None)


def test_a_sum_over_many_strips_repeats_to_the_bit(monkeypatch):
    monkeypatch.setattr("fastdeit.kernels.embedding.patch_embedding.multiprocessors", lambda x: 1)
    dtokens = randn(5 * IMAGES - 1, 3, 8)
    first, again = (patch_embedding_backward(dtokens, 1, None, needs_sum=True)[1] for _ in range(2))
    assert select_config(len(dtokens), 24, 1, backward_elements(4)).strips == 5
    assert torch.equal(first, again)


def test_no_images():
    with poisoned_memory():
        assert patch_embedding_forward(randn(0, 4, 8), None, None, randn(1, 8), None, torch.float16).shape == (0, 5, 8)
        dproduct, total = patch_embedding_backward(randn(0, 5, 8), 1, torch.float16, needs_sum=True)
    assert dproduct.shape == (0, 8) and total.shape == (5, 8) and not total.any()


@pytest.mark.parametrize(
    ("images", "size", "expected"),
    [
        (256, 198 * 768, Config(512, 297, 4, 64)),
        (256, 198 * 192, Config(512, 75, 13, 20)),
        (1, 198 * 192, Config(512, 75, 1, 4)),
        (5, 1, Config(512, 1, 2, 4)),
    ],
)
def test_strips_fill_the_gpu_and_cover_the_batch(images, size, expected):
    assert select_config(images, size, 132) == expected


def test_a_backward_thread_reads_16_bytes_of_an_image():
    assert [backward_elements(size) * size // (32 * NUM_WARPS) * IMAGES for size in (2, 4)] == [16, 16]
    assert select_config(256, 198 * 768, 132, backward_elements(4)) == Config(128, 1188, 1, 256)
