"""The ring of shared slots: slow readers, early stops, killed workers, and a reader that breaks its promise."""

import itertools
import os
import signal
import time

import pytest
import torch

from fastdeit.benchmarks.photographs import fitted
from fastdeit.train.datasets import Images, load_data
from fastdeit.train.image_pipeline import ImagePipeline
from fastdeit.train.loading import TrainLoader
from fastdeit.train.ring import HELD, OverwrittenError, Ring, Ticket
from fastdeit.train.sampling import EpochBatches
from fastdeit.train.workers import WorkerDiedError

CPU = torch.device("cpu")


def loader_of(config):
    train = load_data(config).train
    batches = EpochBatches(len(train), config.batch_size, config.seed)
    return TrainLoader(train, batches, config, CPU), batches


def epoch_of(config, epoch):
    loader, batches = loader_of(config)
    batches.set_epoch(epoch)
    return list(loader)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.fixture
def config(make_small_config):
    return make_small_config(batch_size=4, workers=2, prefetch=2, aa="rand-m9-mstd0.5-inc1")


@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_a_slow_reader_gets_every_batch_as_it_was(config, augment_on):
    """24 batches through 8 slots, the workers always ahead."""
    config = config.replace(augment_on=augment_on)
    loader, batches = loader_of(config)
    batches.set_epoch(1)
    got = []
    for number, batch in enumerate(loader):
        if number % 6 == 0:
            time.sleep(0.05)
        got.append(batch)
    assert len(got) == 24 and same(got, epoch_of(config.replace(workers=0, augment_on="cpu"), 1))


def test_one_worker_that_loads_one_batch_ahead(config):
    config = config.replace(workers=1, prefetch=1)
    assert same(epoch_of(config, 2), epoch_of(config.replace(workers=0), 2))


@pytest.mark.parametrize("held", [0, 3 * 64 * 48])  # all in turn; two images at a time
def test_batches_do_not_depend_on_how_many_images_wait(make_small_config, held, tmp_path, monkeypatch):
    """JPEG files, one of them damaged inside, and PNG files among them: planned first as far as they are held, then decoded."""
    for split in ("train", "val"):
        (tmp_path / split / "photographs").mkdir(parents=True)
        for number, image in enumerate(fitted(64, 48) * 2):
            path = tmp_path / split / "photographs" / f"{number}.{'png' if number % 4 == 1 else 'jpg'}"
            image.save(path)
    damaged = tmp_path / "train" / "photographs" / "2.jpg"
    data = damaged.read_bytes()
    damaged.write_bytes(data[: data.index(b"\xff\xda") + 2] + b"\xff\xd9")  # its header is whole
    config = make_small_config(data=str(tmp_path), batch_size=4, aa="rand-m9-mstd0.5-inc1", decoder="torchvision")
    expected = epoch_of(config, 3)  # images are augmented as they come
    monkeypatch.setattr("fastdeit.train.batched_images.HELD_BYTES", held)
    config = config.replace(augment_on="device")
    loader, batches = loader_of(config)
    batches.set_epoch(3)
    assert len(expected) == 3 and same(list(loader), expected)
    assert [message.partition(": ")[0] for message in loader.unreadable] == [str(damaged)]


@pytest.mark.parametrize("held, order", [(2**25, "dddd rrrr"), (3 * 64 * 48, "dd rr dd rr"), (0, "d r d r d r d r")])
def test_images_are_decoded_in_a_row_and_then_resized(make_small_config, held, order, tmp_path, monkeypatch):
    """As many as HELD_BYTES of them."""
    for split in ("train", "val"):
        (tmp_path / split / "photographs").mkdir(parents=True)
        for number, image in enumerate(fitted(64, 48)[:2] * 2):
            image.save(tmp_path / split / "photographs" / f"{number}.jpg")
    config = make_small_config(data=str(tmp_path), batch_size=4, decoder="torchvision", augment_on="device")
    monkeypatch.setattr("fastdeit.train.batched_images.HELD_BYTES", held)
    done = []
    cropped, resize_into = ImagePipeline.cropped, ImagePipeline.resize_into
    monkeypatch.setattr(ImagePipeline, "cropped", lambda *given: done.append("d") or cropped(*given))
    monkeypatch.setattr(ImagePipeline, "resize_into", lambda *given: done.append("r") or resize_into(*given))
    assert len(epoch_of(config, 0)) == 1 and "".join(done) == order.replace(" ", "")


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_epochs_after_early_stops(config, taken):
    loader, batches = loader_of(config)
    for epoch in range(3):
        batches.set_epoch(epoch)
        kept = list(itertools.islice(loader, taken))
        expected = epoch_of(config.replace(workers=0), epoch)[:taken]
        assert same(kept, expected)
    batches.set_epoch(7)
    assert same(list(loader), epoch_of(config.replace(workers=0), 7)) and same(kept, expected)


def test_a_killed_worker_is_named_and_nothing_hangs(config):
    loader, _ = loader_of(config)
    iterator = iter(loader)
    next(iterator)
    victim = loader.loader._iterator._workers[1].pid
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=rf"process {victim}\) was killed by SIGKILL"):
        list(iterator)


def test_slots_are_as_many_as_the_proof_needs():
    ring = Ring(2, (4, 4, 3), 1, workers=3, prefetch=2, pinned=False)
    assert ring.slots_each == 2 + HELD + 1
    assert all(t.is_shared() and len(t) == 3 * ring.slots_each for t in ring._all.tensors())
    assert not Ring(2, (4, 4, 3), 1, workers=0, prefetch=2, pinned=False)._all.images.is_shared()


def test_a_slot_that_was_filled_again_is_an_error():
    ring = Ring(2, (4, 4, 3), 1, workers=0, prefetch=2, pinned=False)
    slot, number, _ = ring.next_slot()
    ticket = Ticket(slot, number, [])
    for _ in range(ring.slots_each - 1):
        ring.next_slot()
    ring.check(ticket)
    ring.next_slot()
    with pytest.raises(OverwrittenError, match="slot 0 of the loader was filled again before batch 1 of it was copied"):
        ring.check(ticket)


def test_batches_own_their_memory(config):
    loader, _ = loader_of(config.replace(workers=0))
    first, *rest = list(loader)
    assert len({images.data_ptr() for images, _ in (first, *rest)}) == 24


def test_no_memory_is_mapped_for_a_batch(config):
    """What a worker sends is a ticket."""
    loader, _ = loader_of(config)
    ticket = next(iter(loader.loader))
    assert isinstance(ticket, Ticket) and ticket.unreadable == []


def test_a_run_does_not_depend_on_where_it_augments_and_how_it_loads(make_small_config, tmp_path):
    """Stopped and resumed with other workers and augmentation elsewhere: the same weights."""
    from fastdeit.train import run
    from fastdeit.train.checkpoints import load_state

    config = make_small_config(aa="rand-m9-mstd0.5-inc1", teacher_epochs=0, distillation_type="none", epochs=2)
    run.train(config, tmp_path / "cpu")
    run.train(config.replace(augment_on="device", workers=2), tmp_path / "device")
    models = [load_state(tmp_path / name / "last.state.pt")["model"] for name in ("cpu", "device")]
    assert all(torch.equal(models[0][name], tensor) for name, tensor in models[1].items())


def test_an_image_is_read_once(config, monkeypatch):
    read, source_of = [], Images.source_of

    def counted(images, index):
        read.append(index)
        return source_of(images, index)

    monkeypatch.setattr(Images, "source_of", counted)
    epoch_of(config.replace(workers=0), 0)
    assert sorted(read) == list(range(96))
