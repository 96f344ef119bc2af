"""One run in a folder: while it lives no other, when it is gone any other, and never two."""

import errno
import json
import os
import signal
import threading
import time

import pytest

from fastdeit.train import locks
from fastdeit.train.files import WriteError
from fastdeit.train.locks import EXPIRED, LOCK, Lock, LockedError, alive, claimed, identity, process_lives, read_holder


def stored(path, **changes):
    """A lock as another process would leave it."""
    path.write_text(json.dumps({"token": "other", "since": "then", **identity(), **changes}))


def test_a_folder_is_claimed_once_and_given_back(tmp_path):
    with claimed(tmp_path) as lock:
        lock.check()
        with pytest.raises(
            LockedError, match=rf"output: {tmp_path} is in use by process {os.getpid()} on .* remove .*run\.lock"
        ):
            Lock(tmp_path / LOCK, f"output: {tmp_path}")
        with pytest.raises(LockedError, match=rf"^output: {tmp_path} is in use"), claimed(tmp_path):
            pass
        with pytest.raises(LockedError, match=r"^labels: x is in use"), claimed(tmp_path, LOCK, "labels: x"):
            pass
        lock.check()
        assert [p.name for p in tmp_path.iterdir()] == [LOCK]
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path):
        pass


def test_folders_that_nothing_came_into_are_removed_again(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path / "runs" / "a"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "args.yaml").touch()
    assert [p.name for p in (tmp_path / "runs" / "a").iterdir()] == ["args.yaml"]


def test_a_lock_of_a_killed_process_is_taken(tmp_path):
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        Lock(tmp_path / LOCK, "it")
        os.write(writing, b"held")
        time.sleep(60)
        os._exit(1)
    assert os.read(reading, 4) == b"held"
    with pytest.raises(LockedError, match=f"process {holder}"):
        Lock(tmp_path / LOCK, "it")
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)  # gone, though its parent has not asked for it yet
    Lock(tmp_path / LOCK, "it").release()
    os.waitpid(holder, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("age, lives", [(0, True), (EXPIRED - 5, True), (EXPIRED + 5, False)])
@pytest.mark.parametrize("place", ["host", "boot", "namespace"])
def test_elsewhere_the_heartbeat_counts(tmp_path, place, age, lives):
    path = tmp_path / LOCK
    stored(path, **{place: "other"}, pid=1 if lives else os.getpid(), started=1)
    os.utime(path, (time.time() - age,) * 2)
    assert alive(read_holder(path), path) is lives
    assert [p.name for p in tmp_path.iterdir()] == [LOCK]
    if lives:
        with pytest.raises(LockedError, match=r"process 1 on"):
            Lock(path, "it")
    else:
        Lock(path, "it").release()


def test_here_the_process_counts_whatever_the_age(tmp_path):
    stored(tmp_path / LOCK)
    os.utime(tmp_path / LOCK, (0, 0))
    with pytest.raises(LockedError):
        Lock(tmp_path / LOCK, "it")


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path):
    stored(tmp_path / LOCK, started=identity()["started"] - 1)
    Lock(tmp_path / LOCK, "it").release()


def test_processes_are_told_apart(monkeypatch):
    started = identity()["started"]
    assert identity()["namespace"] == os.readlink("/proc/self/ns/pid") and len(identity()["boot"]) == 36
    assert process_lives(os.getpid(), started) and process_lives(os.getpid(), None)
    assert not process_lives(os.getpid(), started + 1) and not process_lives(2**22 + 1, None)
    assert process_lives(1, None)

    def others(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", others)
    assert process_lives(os.getpid(), started)
    monkeypatch.setattr(locks, "_read", lambda path: None)  # without /proc
    assert process_lives(os.getpid(), started) and identity()["started"] is None


def test_a_file_that_is_no_lock_counts_while_it_is_young(tmp_path):
    (tmp_path / LOCK).write_text("[]")
    with pytest.raises(LockedError, match="a process that its lock does not name"):
        Lock(tmp_path / LOCK, "it")
    os.utime(tmp_path / LOCK, (0, 0))
    Lock(tmp_path / LOCK, "it").release()


def test_a_lock_that_is_released_while_it_is_looked_at_is_no_obstacle(tmp_path):
    assert not alive({"host": "other"}, tmp_path / LOCK)


def test_the_holder_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    with claimed(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        until = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert time.time() - (tmp_path / LOCK).stat().st_mtime < 5


def test_a_claim_that_was_lost_is_noticed_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    lock = Lock(tmp_path / LOCK, "output: it")
    stored(tmp_path / LOCK, pid=7)
    os.utime(tmp_path / LOCK, (0, 0))
    time.sleep(0.1)
    assert (tmp_path / LOCK).stat().st_mtime == 0  # no heartbeat for another's
    with pytest.raises(
        LockedError, match=r"output: it is no longer this process's: .*run\.lock: process 7 on .* has it"
    ):
        lock.check()
    lock.release()
    assert read_holder(tmp_path / LOCK)["pid"] == 7
    (tmp_path / LOCK).unlink()
    with pytest.raises(LockedError, match="the file is gone"):
        lock.check()
    tmp_path.rmdir()
    with pytest.raises(WriteError, match=f"{tmp_path}: the folder is gone"):
        lock.check()
    tmp_path.mkdir()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path, monkeypatch):
    """Threads of one process, each with a name of its own for what it writes."""
    monkeypatch.setattr(locks, "temporary_name", lambda name: f"{name}.{threading.get_ident()}.tmp")
    for _ in range(50):
        stored(tmp_path / LOCK, started=1)
        got, refused, ready = [], [], threading.Barrier(4)

        def claim(got=got, refused=refused, ready=ready):
            ready.wait()
            try:
                got.append(Lock(tmp_path / LOCK, "it"))
            except LockedError:
                refused.append(1)

        threads = [threading.Thread(target=claim) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and len(refused) == 3
        got[0].check()
        got[0].release()
        assert not list(tmp_path.iterdir())


def test_one_that_was_taken_in_the_meantime_is_left_alone(tmp_path):
    """Another process has removed the stale lock and claimed the folder, before this one removes what it takes for stale."""
    lock = Lock(tmp_path / LOCK, "it")
    Lock._remove(lock, {"token": "stale"})
    lock.check()
    assert [p.name for p in tmp_path.iterdir()] == [LOCK]
    lock.release()
    Lock._remove(lock, {"token": "stale"})  # none there


def test_a_file_system_without_links_has_locks_too(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(locks.WITHOUT_LINKS[0], "no links")

    monkeypatch.setattr(os, "link", unsupported)
    with claimed(tmp_path) as lock:
        lock.check()
        with pytest.raises(LockedError):
            Lock(tmp_path / LOCK, "it")


def test_a_lock_that_cannot_be_linked_for_another_reason_is_not_copied(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError(errno.EDQUOT, "no space")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(WriteError, match=r"run\.lock: cannot be written: the disk quota is used up"):
        Lock(tmp_path / LOCK, "it")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_or_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    made = claimed(tmp_path / "file" / "run")
    with pytest.raises(WriteError, match=r"file/run: cannot be made: a part of the path is a file"), made:
        pass
    with pytest.raises(WriteError, match=r"none/run\.lock: cannot be written: the folder is gone"):
        Lock(tmp_path / "none" / LOCK, "it")
