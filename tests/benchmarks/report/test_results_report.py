"""Tables and plots of results."""

import json
from pathlib import Path

import pytest

from fastdeit.benchmarks import results_folder, timing
from fastdeit.commands import cli


def row(candidate: str, us: float | None, **facts) -> dict:
    """A row as it is stored, by default of a candidate that took `us` with 3% between the quartiles."""
    filled = timing.Row(candidate)
    if us is not None:
        filled.median_us, filled.first_quartile_us, filled.third_quartile_us = us, 0.985 * us, 1.015 * us
    for name, value in facts.items():
        setattr(filled, name, value)
    return filled.derived(4e6, 2e6, 1.0)


def write(directory: Path, cases: dict[str, list[dict]], ceilings=None, **identity) -> Path:
    folder = results_folder.Folder(directory)
    folder.begin(identity)
    folder.plan(list(cases))
    for case, rows in cases.items():
        suite, _, name = case.partition("-")
        info = dict(shape=dict(case=name), rows=rows, ceilings=ceilings, floor_us=1.0, compile_floor_us=1.5)
        info |= dict(flops=4e6, bytes=2e6)
        folder.write(case, dict(benchmarks=[dict(name=f"test_{suite}[{name}]", extra_info=info)]))
    return directory


def test_a_row_shows_time_ratios_rates_errors_and_launches(tmp_path, capsys):
    ours = row("fastdeit", 2.0, launches=3, peak_mib=1.5, timed_by="graph replay", plain_call_us=20.0)
    ours |= dict(max_errors=[2e-3], rms_errors=[1e-4], kernels=["our_kernel"], images_per_s=123.4)
    eager = row(
        "eager", 5.0, timed_by="graph replay", max_errors=[1e-3], rms_errors=[2e-4], kernels=["cudnn_sdpa", "a"]
    )
    path = write(tmp_path / "r", {"x-1": [ours, eager]}, dict(tflops=700.0, tb_per_s=4.0), gpu="G")
    assert cli.main(["bench", "report", str(path)]) == 0
    out = capsys.readouterr().out
    start = "| case 1 | fastdeit | 2.0 | 2.0-2.0 | 1.00x | 50% | 2.0 | 1000 | 123 | 1.5 | 3 | 20.0 |"
    assert f"{start} 2.0e-03, 2.00x | 1.0e-04, 0.50x |  | graph replay |" in out
    assert "| case 1 | eager | 5.0 | 4.9-5.1 | 2.50x | 20% |" in out
    assert "| case 1 | the floor | 1.0 |  | 0.50x |" in out and "| case 1 | an ideal torch.compile | 1.5 |" in out
    assert "gpu G" in out and "700 TFLOP/s bf16, 4.00 TB/s" in out
    assert "- fastdeit: `our_kernel`" in out and "- eager: `cudnn_sdpa`, `a`" in out
    assert {p.name for p in path.glob("*.png")} == {"roofline.png", "speedup.png"}


def test_what_did_not_run_has_a_row_and_what_is_left_a_line(tmp_path, capsys):
    missing = row("baseline", None, status="not installed: baseline")
    path = write(tmp_path / "r", {"x-1": [row("fastdeit", 2.0), missing]}, gpu="G")
    results_folder.Folder(path).plan(["x-2"])
    assert cli.main(["bench", "report", str(path)]) == 0
    out = capsys.readouterr().out
    assert "| baseline |  |  |" in out and "| not installed: baseline |" in out
    assert "Not measured, the time was over" in out and "\n- x-2\n" in out


def test_results_of_a_cpu_are_called_what_they_are(tmp_path, capsys):
    path = write(tmp_path / "r", {"x-1": [row("fastdeit", 2.0)]}, toy=True)
    assert cli.main(["bench", "report", str(path), "--plots", str(tmp_path / "p")]) == 0
    assert "these times show that the suites run, and nothing else" in capsys.readouterr().out
    assert (tmp_path / "p" / "speedup.png").stat().st_size > 1000 and not list(path.glob("*.png"))


def test_results_without_any_time_have_a_table_and_no_plot(tmp_path, capsys):
    path = write(tmp_path / "r", {"x-1": [row("fastdeit", None, status="out of memory"), row("eager", 3.0)]})
    assert cli.main(["bench", "report", str(path)]) == 0
    out = capsys.readouterr().out
    assert "| out of memory |" in out and "| eager | 3.0 | 3.0-3.0 |  |" in out
    assert not list(path.glob("*.png"))


def test_two_sets_are_compared(tmp_path, capsys):
    old = write(tmp_path / "old", {"x-1": [row("fastdeit", 3.0), row("eager", 5.0)]}, source="a")
    new = write(tmp_path / "new", {"x-1": [row("fastdeit", 2.0), row("eager", 5.0)]}, source="b")
    assert cli.main(["bench", "report", str(old), str(new)]) == 0
    out = capsys.readouterr().out
    assert "# new against old" in out and "Different: source a then, b now." in out
    assert "1 of 2 rows changed beyond noise." in out
    assert "| x: case 1 | fastdeit | 3.0 | 2.0 | -33.3% | +0.0% | **faster** |" in out


def test_a_folder_that_holds_no_results_is_named(tmp_path, capsys):
    assert cli.main(["bench", "report", str(tmp_path)]) == 2
    assert "expected results that fastdeit bench wrote" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["rows", "shape"])
def test_results_of_another_form_are_named(tmp_path, capsys, damage):
    path = write(tmp_path / "r", {"x-1": [row("fastdeit", 2.0)]})
    (file,) = (path / "cases").iterdir()
    content = json.loads(file.read_text())
    del content["benchmarks"][0]["extra_info"][damage]
    file.write_text(json.dumps(content))
    assert cli.main(["bench", "report", str(path)]) == 2
    assert "expected results that fastdeit bench wrote" in capsys.readouterr().err
