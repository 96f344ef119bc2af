"""A change is one beyond noise, and of the candidate rather than of the machine."""

import pytest

from fastdeit.benchmarks.comparison import changes


def case(name: str = "1", spread: float = 0.02, **times: float) -> dict:
    rows = [
        dict(candidate=c, median_us=t, first_quartile_us=t * (1 - spread), third_quartile_us=t * (1 + spread))
        for c, t in times.items()
    ]
    return dict(name="test_x[1]", extra_info=dict(shape=dict(case=name), rows=rows))


def verdicts(before: dict, after: dict) -> dict[str, str]:
    return {change.candidate: change.verdict for change in changes([before], [after])}


@pytest.mark.parametrize(
    "factor, verdict", [(0.9, "faster"), (1.1, "slower"), (1.03, "within noise"), (0.97, "within noise")]
)
def test_quartiles_that_lie_apart_are_a_change(factor, verdict):
    found = verdicts(case(fastdeit=100.0, eager=100.0), case(fastdeit=100.0 * factor, eager=100.0))
    assert found == {"fastdeit": verdict, "eager": "within noise"}


def test_what_all_candidates_share_is_the_machine():
    found = verdicts(case(fastdeit=100.0, eager=100.0, compile=80.0), case(fastdeit=130.0, eager=130.0, compile=104.0))
    assert found == dict.fromkeys(("fastdeit", "eager", "compile"), "as the machine")


def test_on_a_slower_machine_a_gain_has_to_show_in_the_time_itself():
    found = verdicts(case(fastdeit=100.0, eager=100.0), case(fastdeit=100.0, eager=130.0))
    assert found["fastdeit"] == "within noise"
    found = verdicts(case(fastdeit=100.0, eager=100.0), case(fastdeit=90.0, eager=130.0))
    assert found["fastdeit"] == "faster"


def test_wide_quartiles_hide_a_change():
    assert verdicts(case(spread=0.2, fastdeit=100.0), case(spread=0.2, fastdeit=80.0)) == {"fastdeit": "within noise"}


def test_only_what_both_have_a_time_of_is_compared():
    before, after = case(fastdeit=100.0, old=1.0), case(fastdeit=50.0, new=1.0)
    after["extra_info"]["rows"].append(dict(candidate="old", median_us=None))
    assert set(verdicts(before, after)) == {"fastdeit"}
    assert changes([before], [case(name="2", fastdeit=1.0)]) == []


def test_a_change_has_its_ratio_and_the_machines():
    (change, _) = changes([case(fastdeit=100.0, eager=10.0)], [case(fastdeit=50.0, eager=11.0)])
    assert change.ratio == 0.5 and change.machine == pytest.approx(1.1)
