"""What is known without a GPU: the counts, their record, the roofline tables, the README's section, the picture."""

import json

import pytest

from fastdeit.benchmarks.report import block_counts, readme, static_report
from fastdeit.benchmarks.report.roofline_table import GROUPS, by_group, rooflines
from fastdeit.commands import cli
from fastdeit.cost.models import DEIT, EXECUTIONS, parts, total


@pytest.fixture(scope="module")
def found():
    return static_report.current()


def test_no_count_is_worse_than_on_record(found):
    """A larger one goes on record by `fastdeit bench evidence --update` and a reason in the commit, or not at all."""
    assert static_report.worsened(found, static_report.recorded()) == []


def test_a_worse_count_is_named(found):
    better = {form: {name: value - 1 for name, value in counts.items()} for form, counts in found.items()}
    assert (
        len(static_report.worsened(found, better)) == 10
        and "bf16 fused: bytes_backward" in static_report.worsened(found, better)[-1]
    )
    assert static_report.worsened(found, {})[0].endswith("and nothing is on record")
    worse = {form: {name: value + 1 for name, value in counts.items()} for form, counts in found.items()}
    assert static_report.worsened(found, worse) == []


def test_eager_launches_are_those_of_the_costs(found):
    block = [p for p in parts(DEIT["B"], 2, "eager", "bf16", training=False) if p.count == 12]
    assert found["bf16 eager"]["launches_forward"] == sum(p.forward.launches for p in block) == 10


def test_timm_keeps_36_bytes_under_autocast(found):
    """Two norms' fp32 inputs (8) and results (4), qkv (6), attention's and its output (2), pre-activation and activation (16)."""
    assert found["amp eager"]["saved_bytes"] == pytest.approx(36, abs=0.2)


def test_a_fused_block_keeps_less_and_launches_no_more_forward(found):
    """Under autocast the LayerNorms' parameters are folded into weights, which takes as many small launches as it saves."""
    for precision, share in (("amp", 0.56), ("bf16", 0.65)):
        fused, eager = found[f"{precision} fused"], found[f"{precision} eager"]
        assert fused["launches_forward"] <= eager["launches_forward"]
        assert fused["saved_bytes"] <= share * eager["saved_bytes"]
        assert fused["bytes_forward"] + fused["bytes_backward"] < eager["bytes_forward"] + eager["bytes_backward"]


def test_flops_are_counted_where_branches_run_on_the_samples_that_stochastic_depth_keeps():
    """PyTorch's count of what kernels compute, against arithmetic: 18 tokens of 192 channels, three quarters of the samples."""
    found = block_counts.counts_with_stochastic_depth("deit_tiny_distilled_patch16_224")
    layers, attention = 24 * 192**2 / 1e6, 2 * 18 * 192 / 1e6
    for precision in ("amp", "bf16"):
        timms, mask, skip = (found[f"{precision} {form}"] for form in ("timm", "mask", "skip"))
        for counts in (timms, mask):
            assert counts["mflop_forward"] == pytest.approx(layers + 2 * attention, rel=1e-9)
        assert timms["mflop_backward"] == pytest.approx(2 * layers + 4 * attention, rel=1e-9)
        assert mask["mflop_backward"] == pytest.approx(2 * layers + 5 * attention, rel=1e-9)
        for name in ("mflop_forward", "mflop_backward"):
            assert skip[name] == pytest.approx(0.75 * mask[name], rel=1e-9)
        stream = (
            0 if precision == "amp" else 2 * 2
        )  # bytes that both branches save of all samples: what they normalise again
        expected = 0.75 * (mask["saved_bytes"] - stream) + stream
        assert skip["saved_bytes"] == pytest.approx(expected, abs=0.05)


def test_the_groups_are_all_of_a_step():
    for execution in EXECUTIONS:
        rows = by_group("S", 8, "amp", 1e30, 1e12)  # traffic alone
        assert sum(row[execution] for row in rows[:-1]) == pytest.approx(rows[-1][execution])
        moved = total(parts(DEIT["S"], 8, execution, "amp", training=True)).bytes
        assert rows[-1][execution] == pytest.approx(1e3 * moved / 1e12)
    assert [row["part"] for row in rows] == [*GROUPS, "all"]


def test_twice_the_gpu_is_twice_as_fast():
    for once, twice in zip(rooflines(8, 1e14, 1e12), rooflines(8, 2e14, 2e12), strict=True):
        assert all(twice[e] == pytest.approx(2 * once[e]) for e in EXECUTIONS)


def test_roofline_prints_a_table_for_any_gpu(capsys):
    assert cli.main(["bench", "roofline", "--tflops", "600", "--tbps", "4.3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(DEIT) * 2 * 2 * 2
    assert (
        cli.main(["bench", "roofline", "--tflops", "300", "--tbps", "2", "--parts", "Ti", "--precision", "bf16"]) == 0
    )
    out = capsys.readouterr().out
    assert "arithmetic, not measurements" in out and len(out.splitlines()) == 4 + len(GROUPS) + 1


@pytest.mark.parametrize("option, value", [("--tflops", "0"), ("--tbps", "nan"), ("--batch-size", "-1")])
def test_numbers_that_are_none_are_refused(option, value, capsys):
    arguments = {"--tflops": "600", "--tbps": "4", "--batch-size": "1", option: value}
    assert cli.main(["bench", "roofline", *(f"{name}={value}" for name, value in arguments.items())]) == 2
    assert f"{option}: expected a positive number" in capsys.readouterr().err


def test_evidence_puts_on_record_and_says_what_is_worse(tmp_path, monkeypatch, capsys, found):
    dropping = {"amp skip": dict(mflop_forward=10.625, mflop_backward=21.25, saved_bytes=15.1)}
    monkeypatch.setattr(block_counts, "counts_with_stochastic_depth", lambda: dropping)
    monkeypatch.setattr(static_report, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(static_report, "current", lambda: found)
    assert cli.main(["bench", "evidence", "--update", "--no-host"]) == 0
    out = capsys.readouterr().out
    assert "attention_forward_descriptor_kernel" in out and "worse" not in out
    assert "drops 25% of the samples" in out and "| amp skip " in out and " 10.6 " in out
    assert static_report.recorded() == found
    more = {form: {**counts, "saved_bytes": 99.0} for form, counts in found.items()}
    monkeypatch.setattr(static_report, "current", lambda: more)
    assert cli.main(["bench", "evidence", "--no-host"]) == 1
    assert "worse than on record: amp fused: saved_bytes is 99.0" in capsys.readouterr().out


def test_the_kernels_of_every_file_are_listed():
    rows = static_report.kernels()
    committed = json.loads(static_report.RESOURCES_FILE.read_text())["rows"]
    assert sum(row["configurations"] for row in rows) == len(committed)
    assert {row["kernel"] for row in rows} == {row["kernel"] for row in committed}


def test_the_readme_has_the_section_that_would_be_written(capsys):
    """Stale? `fastdeit bench readme` writes it anew."""
    assert cli.main(["bench", "readme", "--check"]) == 0


def test_the_section_is_written_and_a_stale_one_noticed(tmp_path):
    file, page = tmp_path / "README.md", tmp_path / "performance.md"
    for path in (file, page):
        path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    where = ["--readme", str(file), "--performance", str(page)]
    assert cli.main(["bench", "readme", "--check", *where]) == 1
    assert cli.main(["bench", "readme", *where]) == 0
    assert "DeiT-B" in page.read_text() and "old" not in page.read_text()
    text = file.read_text()
    assert (
        text.startswith("before\n") and text.endswith("\nafter\n") and readme.UNMEASURED in text and "old" not in text
    )
    assert cli.main(["bench", "readme", "--check", *where]) == 0


def test_a_readme_without_the_section_is_refused(tmp_path, capsys):
    (tmp_path / "README.md").write_text("nothing")
    assert cli.main(["bench", "readme", "--readme", str(tmp_path / "README.md")]) == 2
    assert "readme: expected a section between" in capsys.readouterr().err


def test_results_are_summed_up_by_suite_and_direction(tmp_path, monkeypatch):
    def case(direction, *microseconds):
        rows = [{"median_us": us} for us in microseconds]
        return {"name": "test_x[a]", "extra_info": {"rows": rows, "shape": {"direction": direction}}}

    cases = [
        case("forward", 1.0, 2.0, 8.0),
        case("forward", 1.0, None, 0.5),
        case("backward", 2.0, 2.0),
        case("both", None, 1.0),
    ]
    monkeypatch.setattr(readme.results_folder, "read", lambda folder: ({"gpu": "a GPU", "torch": "2"}, cases, ["left"]))
    monkeypatch.setattr(readme.results_folder, "suite_of", lambda benchmark: "attention")
    (tmp_path / "a-gpu").mkdir()
    text = readme.section(tmp_path)
    assert (
        readme.UNMEASURED not in text
        and "on a GPU (gpu a GPU, torch 2)" in text
        and "1 cases were not measured" in text
    )
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["attention forward", "2", "0.50x", "1.00x", "2.00x"] in lines
    assert ["attention backward", "1", "1.00x", "1.00x", "1.00x"] in lines


def test_the_picture_is_drawn(tmp_path):
    from PIL import Image

    assert cli.main(["bench", "pictures", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "performance.png") as image:
        assert image.width > 1000 and len(image.convert("L").getcolors()) > 20


def test_roofline_shows_frozen_models_in_each_precision(capsys):
    command = ["bench", "roofline", "--tflops", "600", "--tbps", "4.3", "--frozen"]
    assert cli.main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == [f"DeiT-{name}" for name in DEIT]
    assert cli.main([*command, "--json", "--rate", "3"]) == 0
    faster = json.loads(capsys.readouterr().out)
    for row, other in zip(rows, faster, strict=True):
        assert row["fp8 / compile"] == pytest.approx(row["fp8"] / row["compile, bf16"])
        assert other["fp8"] > row["fp8"] and other["bf16"] == row["bf16"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rate", "2"], "--rate: is for --frozen"),
        (["--frozen", "--rate", "0"], "--rate: expected a positive number, got 0.0"),
        (["--frozen", "--precision", "amp"], "--precision: expected nothing with --frozen"),
    ],
)
def test_options_of_frozen_models_are_checked(options, said, capsys):
    assert cli.main(["bench", "roofline", "--tflops", "600", "--tbps", "4.3", *options]) == 2
    assert said in capsys.readouterr().err
