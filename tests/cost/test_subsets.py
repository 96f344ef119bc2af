"""What a step costs whose branches run on the samples that stochastic depth keeps."""

import json

import pytest

from fastdeit.commands import cli
from fastdeit.cost.models import DEIT, PRECISIONS, parts, seconds, total
from fastdeit.cost.subsets import SKIPPED_SAMPLES, block_rates, parts_on_subsets

SHAPE, BATCH, RATES = DEIT["B"], 256, (600e12, 4.3e12)


@pytest.mark.parametrize("execution", ["eager", "fastdeit"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_a_rate_it_is_the_plain_step(execution, precision):
    found = parts_on_subsets(SHAPE, BATCH, execution, precision, rates=[0.0] * 12)
    assert total(found) == total(parts(SHAPE, BATCH, execution, precision, training=True))


def test_the_arithmetic_of_blocks_shrinks_by_the_rate():
    def flops(found):
        return sum(
            p.count * (p.forward + p.backward).flops
            for p in found
            if p.name not in ("patch embedding", "heads and loss")
        )

    half = flops(parts_on_subsets(SHAPE, BATCH, "fastdeit", rates=[0.5] * 12))
    assert half == flops(parts(SHAPE, BATCH, "fastdeit", training=True)) / 2
    rising = flops(parts_on_subsets(SHAPE, BATCH, "eager", rates=block_rates(0.5, 12, uniform=False)))
    assert rising == pytest.approx(0.75 * flops(parts(SHAPE, BATCH, "eager", training=True)), rel=0.01)


def test_the_stream_of_skipped_samples_costs_traffic():
    found = parts_on_subsets(SHAPE, BATCH, "fastdeit", rates=block_rates(0.1, 12, uniform=False))
    passes = [part for part in found if part.name == SKIPPED_SAMPLES]
    assert len(passes) == 11  # the first block drops nothing
    elements = SHAPE.tokens * SHAPE.channels
    assert passes[-1].forward.bytes == 2 * elements * 8 * (256 - 230) and passes[-1].forward.flops == 0


@pytest.mark.parametrize(
    "name, rate, uniform, precision, gain",
    [
        ("B", 0.1, False, "amp", 1.04),
        ("B", 0.2, True, "amp", 1.23),
        ("L", 0.45, True, "amp", 1.74),
        ("B", 0.1, False, "bf16", 0.97),
        ("B", 0.2, True, "bf16", 1.14),
    ],
)
def test_the_gain_by_the_roofline(name, rate, uniform, precision, gain):
    """docs/less-time.md has these figures."""
    shape = DEIT[name]
    rates = block_rates(rate, shape.depth, uniform)
    plain = seconds(parts(shape, BATCH, "fastdeit", precision, training=True), *RATES)
    skips = seconds(parts_on_subsets(shape, BATCH, "fastdeit", precision, rates=rates), *RATES)
    assert plain / skips == pytest.approx(gain, abs=0.006)


def test_the_rates_of_blocks():
    assert block_rates(0.2, 3, uniform=False) == [0.0, 0.1, 0.2] and block_rates(0.2, 3, uniform=True) == [0.2] * 3
    with pytest.raises(ValueError, match="rates: expected 12, one for each block, got 3"):
        parts_on_subsets(SHAPE, BATCH, "fastdeit", rates=[0.1] * 3)


def test_the_roofline_has_a_column_for_it(capsys):
    options = ["bench", "roofline", "--tflops", "600", "--tbps", "4.3", "--json"]
    assert cli.main([*options, "--drop-path", "0.45", "--drop-path-uniform"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["skip"] == row["fastdeit"] for row in rows if row["work"] == "inference")
    large = [row for row in rows if row["model"] == "DeiT-L" and row["work"] == "training step"]
    assert len(large) == 4 and all(row["skip"] > 1.5 * row["fastdeit"] for row in large)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--drop-path", "1"], "--drop-path: expected a rate from 0 to less than 1, got 1"),
        (["--drop-path", "0.1", "--parts", "B"], "--drop-path: is for the table of models"),
        (["--drop-path-uniform"], "--drop-path-uniform: belongs to --drop-path"),
    ],
)
def test_rates_that_cannot_be_are_refused(capsys, given, message):
    assert cli.main(["bench", "roofline", "--tflops", "600", "--tbps", "4.3", *given]) != 0
    assert message in capsys.readouterr().err
