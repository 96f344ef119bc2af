"""What cannot be written says so, with what stands; what was there before is still there."""

import errno
import os
import resource

import pytest
import torch

from fastdeit.train import files
from fastdeit.train.files import WriteError, remove_temporaries, temporary_name, why, write_atomically


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "last.state.pt"
    path.write_bytes(b"old")
    return path


def refuse(monkeypatch, name, number):
    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, refused)


def test_the_old_content_is_kept_under_another_name(path):
    previous = path.with_name("previous")
    for content in (b"new", b"newer"):
        write_atomically(path, lambda file, content=content: file.write(content), previous)
    assert path.read_bytes() == b"newer" and previous.read_bytes() == b"new"
    assert len(list(path.parent.iterdir())) == 2


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(path):
    for name in (path.name, "previous"):
        path.with_name(temporary_name(name)).write_bytes(b"half")
    write_atomically(path, lambda file: file.write(b"new"), path.with_name("previous"))
    assert path.read_bytes() == b"new" and path.with_name("previous").read_bytes() == b"old"
    assert len(list(path.parent.iterdir())) == 2


def test_nothing_is_kept_where_nothing_was(tmp_path):
    write_atomically(tmp_path / "a", lambda file: file.write(b"new"), tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("number", files.WITHOUT_LINKS)
def test_a_file_system_without_links_keeps_it_as_well(path, monkeypatch, number):
    refuse(monkeypatch, "link", number)
    write_atomically(path, lambda file: file.write(b"new"), path.with_name("previous"))
    assert path.read_bytes() == b"new" and path.with_name("previous").read_bytes() == b"old"


def test_a_link_that_fails_for_another_reason_leaves_all_as_it_was(path, monkeypatch):
    refuse(monkeypatch, "link", errno.ENOSPC)
    with pytest.raises(WriteError, match="the disk is full; the former one stands"):
        write_atomically(path, lambda file: file.write(b"new"), path.with_name("previous"))
    assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1


def test_the_folder_is_synced_after_the_file_has_its_name(path, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append((os.path.isdir(f"/proc/self/fd/{descriptor}"), path.read_bytes()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_atomically(path, lambda file: file.write(b"new"))
    assert synced == [(False, b"old"), (True, b"new")]


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "no permission"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_the_reason_is_in_words(path, monkeypatch, number, words):
    refuse(monkeypatch, "fsync", number)
    with pytest.raises(WriteError, match=rf"last\.state\.pt: cannot be written: {words}; the former one stands"):
        write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1


def test_a_folder_that_is_gone_is_named(path):
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(WriteError, match=rf"{path}: cannot be written: the folder is gone$"):
        write_atomically(path, lambda file: file.write(b"new"))


def test_an_error_without_number_is_said_as_it_is():
    assert why(OSError("strange")) == "strange"


def test_a_limit_within_a_state_is_the_reason_that_is_given(path):
    """torch.save raises an error of its own over the one of the file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(WriteError, match="larger than the file system or the limit"):
            write_atomically(path, lambda file: torch.save({"a": torch.zeros(100_000)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1


def test_other_errors_while_writing_stay_themselves(path):
    def write(file):
        raise RuntimeError("not of the file")

    with pytest.raises(RuntimeError, match="not of the file"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1


def test_temporaries_are_this_processs_own_and_can_be_cleared(path, monkeypatch):
    own = temporary_name(path.name)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert temporary_name(path.name) != own
    monkeypatch.setattr(files.platform, "node", lambda: "elsewhere")
    assert "elsewhere" in temporary_name(path.name)
    for name in (own, temporary_name("other")):
        path.with_name(name).touch()
    remove_temporaries(path.parent, path.name)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, temporary_name("other")])
    remove_temporaries(path.parent)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
