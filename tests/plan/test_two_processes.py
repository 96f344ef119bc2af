"""Two processes train planned models under DistributedDataParallel, over gloo, each on a fake device of its own (two_ranks.py)."""

import json

import pytest

from fastdeit.testing.fake_cuda import start_python, why_unavailable
from tests.plan.models import needs_plans

pytestmark = [pytest.mark.long, needs_plans, pytest.mark.skipif(why_unavailable() is not None, reason="no fake device")]
OPS, RECORDED, REPEATED = (0, 0), (1, 0), (0, 1)
RUNS = (  # of each rank by step
    [OPS, RECORDED, REPEATED, REPEATED, REPEATED, OPS, RECORDED, REPEATED],
    [OPS, RECORDED, REPEATED, OPS, RECORDED, REPEATED, REPEATED, REPEATED],
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    """What each rank reports of its steps."""
    folder = tmp_path_factory.mktemp("two_processes")
    logs = [(folder / f"{rank}.log").open("w+") for rank in (0, 1)]
    processes = [
        start_python(
            "-m", "tests.plan.two_ranks", str(rank), str(folder), cwd=request.config.rootpath, stdout=log, stderr=log
        )
        for rank, log in enumerate(logs)
    ]
    try:
        ended = [process.wait(timeout=400) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    assert ended == [0, 0], "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in (0, 1))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_a_rank_records_while_the_other_repeats(ranks):
    assert [rank["errors"] for rank in ranks] == [[], []]
    for rank, expected in zip(ranks, RUNS, strict=True):
        assert [(step["recorded"], step["repeated"]) for step in rank["steps"]] == expected


def test_gradients_are_reduced_in_every_step(ranks):
    for rank in ranks:
        assert [step["gradients"] for step in rank["steps"]] == [[1.0 + 2.0]] * len(RUNS[0])


def test_both_ranks_reduce_the_same_buckets_while_other_spans_run(ranks):
    first, second = ([step["buckets"] for step in rank["steps"]] for rank in ranks)
    assert first == second and all(buckets == first[1] for buckets in first[1:])
    for rank in ranks:
        for step in rank["steps"][1:]:  # from the second on, DDP has buckets in the order of the gradients
            begun = step["begun"]
            assert len(begun) >= 5 and begun == sorted(begun) and begun[0] < 0.35
            assert len({share for share in begun if share < 0.9}) >= 3
