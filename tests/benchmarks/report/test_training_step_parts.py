"""The parts of a training step: that each runs, and what the step takes beyond them, from times that are known."""

import pytest
import torch

from fastdeit.benchmarks import results_folder
from fastdeit.benchmarks.report import results_report as report
from fastdeit.benchmarks.report.training_step_parts import CAPTURED, sentences
from fastdeit.benchmarks.suites import test_training


def case(part, batch=256, **times):
    rows = [dict(candidate=name, median_us=us) for name, us in times.items()]
    return dict(shape=dict(part=part, batch=batch), rows=rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="toy sizes are a CPU's")
@pytest.mark.parametrize("part", test_training.PARTS)
def test_every_part_runs_at_toy_size(part):
    candidates, inputs, facts = test_training._PARTS[part](2, True)
    names = list(candidates)
    assert names[0] == "fastdeit" and len(names) >= 2 and facts["cost"].bytes > 0
    assert (CAPTURED in names) is (part == "loop")
    for candidate in candidates.values():
        found = candidate(*inputs())
        assert not isinstance(found, torch.Tensor) or found.isfinite().all()


def test_the_step_with_its_teacher_beside_both_alone():
    cases = [case("distilled", fastdeit=1020.0), case("teacher", fastdeit=400.0), case("step", fastdeit=600.0)]
    assert sentences(cases) == [
        "Batch 256: the step with its teacher takes 1.020 of the teacher's and the student's time alone (aimed at: at most 1.03)."
    ]


def test_what_a_runs_step_spends_outside_the_model():
    cases = [
        case("loop", fastdeit=1000.0, **{CAPTURED: 960.0}),
        case("student", fastdeit=900.0),
        case("optimizer", fastdeit=30.0),
        case("ema", fastdeit=20.0),
    ]
    plain, captured = sentences(cases)
    assert plain == (
        "Batch 256, kernel by kernel: 10.0% of a run's step is spent outside forward and backward (aimed at: at most 4%): "
        "optimizer 3.0%, moving average 2.0%, the host and the rest 5.0%."
    )
    assert captured.startswith("Batch 256, as a graph: 6.2% ") and captured.endswith("the host and the rest 1.0%.")


def test_parts_without_a_time_or_of_another_batch_are_not_put_together():
    cases = [case("distilled", fastdeit=None), case("teacher", fastdeit=4.0), case("step", fastdeit=6.0)]
    cases += [case("loop", fastdeit=5.0), case("student", batch=64, fastdeit=3.0)]
    assert sentences(cases) == []


def test_the_report_says_it_of_a_gpu_alone(tmp_path):
    folder = results_folder.Folder(tmp_path)
    folder.begin(dict(gpu="G"))
    parts = [("distilled", 9.0), ("teacher", 4.0), ("step", 5.0)]
    for ceilings in (dict(tflops=700.0, tb_per_s=4.0), None):
        folder.plan([f"training-{part}" for part, _ in parts])
        for part, us in parts:
            row = dict(
                candidate="fastdeit", median_us=us, first_quartile_us=us, third_quartile_us=us, status="ok", kernels=[]
            )
            row |= dict.fromkeys(("peak_mib", "launches", "plain_call_us")) | dict(
                tflops=1.0, gb_per_s=1.0, timed_by=""
            )
            row |= dict(max_errors=[], rms_errors=[])
            info = case(part) | dict(rows=[row], ceilings=ceilings)
            folder.write(f"training-{part}", dict(benchmarks=[dict(name=f"test_training[{part}]", extra_info=info)]))
        assert ("takes 1.000 of the teacher's" in report.markdown(tmp_path)) is (ceilings is not None)
