"""Processes learn why another one failed, and that it is gone; none waits for ever."""

import json
import time

import pytest
import torch.distributed as dist

from fastdeit.train import failures, locks, peers
from fastdeit.train.distributed import World
from fastdeit.train.peers import MAIN_GONE, Peers


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(peers, "LOOK", 0.02)


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def join(store):
    """join(rank, size): the watch of a process; all of one test are of one start."""
    joined = []

    def make(rank, size=2):
        joined.append(Peers(rank, size, "127.0.0.1", store.port, "start"))
        return joined[-1]

    yield make
    for each in joined:
        each.end()


def told(store, key, value):
    dist.PrefixStore("fastdeit/start", store).set(key, value)


def pretend(store, rank, **changes):
    """The identity of a process that says nothing more."""
    told(store, f"identity/{rank}", json.dumps({**locks.identity(), **changes}))


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_all_learn_the_first_cause(join):
    main, other, third = join(0, 3), join(1, 3), join(2, 3)
    assert main.cause is None and not other.main_knows
    assert other.tell("out of luck") and other.main_knows
    assert third.tell("the connection is closed")  # for that reason
    for each in (main, other, third):
        assert each.cause_within(10.0) == "rank 1: out of luck"


def test_nobody_waits_for_a_cause_that_does_not_come(join):
    begun = time.monotonic()
    assert join(0, 1).cause_within(0.2) is None
    assert 0.2 <= time.monotonic() - begun < 5


def test_a_process_of_this_host_that_is_gone_is_named(join, store):
    pretend(store, 1, started=1)
    assert join(0).cause_within(
        10.0
    ) == f"rank 1 is gone (process {locks.identity()['pid']} on {locks.identity()['host']}): " + (
        "killed, or out of memory"
    )


def test_the_others_watch_the_main_process(join, store):
    pretend(store, 0, started=1)
    watch = join(1)
    assert watch.cause_within(10.0) == MAIN_GONE and not watch.main_knows


def test_a_process_that_left_is_not_missed(join, store):
    pretend(store, 1, started=1)
    told(store, "left/1", "")
    assert join(0).cause_within(0.3) is None


def test_who_leaves_says_so(join, store):
    main, other = join(0), join(1)
    other.end()
    assert dist.PrefixStore("fastdeit/start", store).check(["left/1"]) and main.cause is None


def test_elsewhere_a_count_that_stands_still_is_a_sign(join, store, monkeypatch):
    pretend(store, 1, host="elsewhere", pid=7)
    monkeypatch.setattr(peers, "LOST", 0.5)
    begun = time.monotonic()
    assert join(0).cause_within(10.0) == "rank 1 is gone (process 7 on elsewhere): killed, or out of memory"
    assert time.monotonic() - begun >= 0.5


def test_elsewhere_a_count_that_goes_on_is_life(join, store, monkeypatch):
    main, other = join(0), join(1)
    monkeypatch.setattr(peers, "LOST", 0.5)
    monkeypatch.setattr(locks, "same_place", lambda holder: False)
    assert main.cause_within(1.5) is None and other.cause is None


def test_a_store_that_is_gone_means_the_main_process(join, store, monkeypatch):
    main, other = join(0), join(1)

    def closed(*args):
        raise RuntimeError("Broken pipe")

    for watch in (main, other):
        monkeypatch.setattr(
            watch, "store", type("Closed", (), dict.fromkeys(("add", "check", "compare_set", "set"), closed))()
        )
    assert other.cause_within(10.0) == MAIN_GONE and main.cause_within(0.2) is None
    assert not main.tell("odd")


@pytest.mark.parametrize("rank, says", [(0, True), (1, False)])
def test_a_process_that_is_stuck_is_ended(join, monkeypatch, capsys, rank, says):
    """As in a collective of a GPU, which waits for a process that has failed."""
    monkeypatch.setattr(peers, "STUCK", 0.1)
    left = []
    monkeypatch.setattr(peers, "leave", left.append)
    watch, failing = join(rank, 3), join(2, 3)
    watch.stands = lambda: "The state at step 7 is saved"
    failing.tell("odd")
    assert until(lambda: left) and left[0] == 1
    watch.seen_to = True
    assert ("fastdeit train: rank 2: odd. The state at step 7 is saved\n" in capsys.readouterr().err) is says


def test_a_process_that_sees_to_it_is_let_be(join, monkeypatch):
    monkeypatch.setattr(peers, "STUCK", 0.1)
    left = []
    monkeypatch.setattr(peers, "leave", left.append)
    watch, failing = join(0), join(1)
    failing.tell("odd")
    assert watch.cause_within(10.0)
    time.sleep(0.4)
    assert not left


def test_a_failure_is_told_once_and_the_first_one_is_the_cause(join, monkeypatch):
    main, other = join(0), join(1)
    for watch, error, expected in (
        (other, ValueError("data: odd"), "data: odd"),
        (main, RuntimeError("Connection closed by peer"), "rank 1: data: odd"),
    ):
        monkeypatch.setattr(World, "peers", watch)
        assert failures.known_cause(World(watch.rank, 2), error) == expected


@pytest.mark.parametrize(
    "error, waits",
    [
        (RuntimeError("[enforce] Gloo: Connection closed by peer"), True),
        (RuntimeError("NCCL error"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("data: no connection"), False),
    ],
)
def test_a_cause_is_waited_for_where_processes_work_together(error, waits):
    assert (failures.patience(error) > 0) is waits
