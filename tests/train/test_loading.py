"""Batches: the same for any number of workers, unreadable images replaced and named, streams from their beginning."""

import contextlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastdeit.commands import cli
from fastdeit.train import copying
from fastdeit.train.datasets import Stream, load_data, train_transform
from fastdeit.train.loading import TrainLoader
from fastdeit.train.sampling import EpochBatches, UnreadableImageError

CPU = torch.device("cpu")


def epoch_of(config, epoch=0, first_batch=0, **batching):
    dataset = load_data(config).train
    batches = EpochBatches(len(dataset), config.batch_size, config.seed, repeats=config.repeated_aug, **batching)
    batches.set_epoch(epoch, first_batch)
    loader = TrainLoader(dataset, batches, config, CPU)
    return [(images.clone(), classes) for images, classes in loader], loader


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


KEEPS_ITS_LOADER = """
import torch
from fastdeit.train.config import Config
from fastdeit.train.datasets import load_data
from fastdeit.train.loading import TrainLoader
from fastdeit.train.sampling import EpochBatches

config = Config(data="digits", img_size=16, batch_size=32, workers=2)
dataset = load_data(config).train
batches = EpochBatches(len(dataset), config.batch_size, config.seed)
loader = TrainLoader(dataset, batches, config, torch.device("cpu"))
batches.set_epoch(0)
print(len(next(iter(loader))[1]))
iterator = iter(loader)
next(iterator)
"""


def test_a_program_that_keeps_its_loader_ends():
    """Workers ignore the SIGTERM by which multiprocessing ends those that are left."""
    ended = subprocess.run([sys.executable, "-c", KEEPS_ITS_LOADER], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (0, ["32"], "")


@pytest.fixture
def damaged_config(make_small_config, image_folder, tmp_path):
    """Three of 96 training images cannot be decoded: cut off, empty, and text."""
    root = shutil.copytree(image_folder, tmp_path / "images")
    names = [root / "train" / f"digit-{digit}" / "7.png" for digit in range(3)]
    names[0].write_bytes(names[0].read_bytes()[:60])
    names[1].write_bytes(b"")
    names[2].write_text("no image")
    return make_small_config(data=str(root), aa="rand-m9-mstd0.5-inc1"), [str(name) for name in names]


def test_augmented_images_of_a_folder_do_not_depend_on_workers(make_small_config):
    config = make_small_config(aa="rand-m9-mstd0.5-inc1", color_jitter=0.3, repeated_aug=3)
    none, some = (epoch_of(config.replace(workers=workers), epoch=4)[0] for workers in (0, 2))
    assert same(none, some) and none[0][0].dtype == torch.uint8


def test_workers_that_stay_give_the_epochs_of_those_that_start(make_small_config):
    config = make_small_config(workers=2)
    dataset = load_data(config).train
    batches = EpochBatches(len(dataset), 32, config.seed)
    loader = TrainLoader(dataset, batches, config, CPU)
    for epoch, first_batch in ((0, 0), (1, 2), (2, 0)):
        batches.set_epoch(epoch, first_batch)
        assert same(list(loader), epoch_of(config.replace(workers=0), epoch, first_batch)[0])
    batches.set_epoch(3)
    next(iter(loader))  # left after a batch, as when a run stops
    assert same(list(loader), epoch_of(config.replace(workers=0), 3)[0])


def test_a_copy_to_a_gpu_is_issued_before_the_step_it_runs_beside(monkeypatch):
    """The order of work on both streams, with stand-ins for CUDA's: batch 1 is copied before batch 0 is given."""
    log = []

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            log.append("wait")

        def record_event(self):
            return Event()

    class Event:
        def query(self):
            return False

        def synchronize(self):
            log.append("copied")

    step_stream = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step_stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: log.append("record"), raising=False)

    def host():
        for number in range(3):
            log.append(f"load {number}")
            tensors = torch.full((2,), number), torch.full((2,), number)
            yield copying.HostBatch(tensors, lambda number=number: log.append(f"free {number}"))

    for images, classes in copying.copied_ahead(host(), CPU):
        log.append(f"step {images[0]}")
        assert torch.equal(images, classes)
    assert [entry for entry in log if entry != "record"] == [
        "load 0",
        "wait",
        "load 1",
        "copied",
        "free 0",
        "step 0",
        "wait",
        "load 2",
        "copied",
        "free 1",
        "step 1",
        "wait",
        "step 2",
        "copied",
        "free 2",
    ]
    assert log.count("record") == 6


def test_unreadable_images_are_named_once_and_replaced(damaged_config, capsys):
    config, names = damaged_config
    batches, loader = epoch_of(config)
    assert sum(len(images) for images, _ in batches) == 96
    for _ in loader:
        pass
    err = capsys.readouterr().err
    assert all(err.count(f"unreadable image, replaced by the next: {name}: ") == 1 for name in names)
    assert same(batches, epoch_of(config.replace(workers=2))[0])


def test_the_replacement_is_the_next_image_under_the_same_key(damaged_config, image_folder):
    config, names = damaged_config
    whole, _ = epoch_of(config.replace(data=str(image_folder)))
    replaced, _ = epoch_of(config)
    different = [
        (image, other)
        for (images, _), (others, _) in zip(whole, replaced, strict=True)
        for image, other in zip(images, others, strict=True)
        if not torch.equal(image, other)
    ]
    assert len(different) == len(names)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_unreadable_image_too_many_stops(damaged_config, workers):
    config, _ = damaged_config
    with pytest.raises(UnreadableImageError, match=r"3 images cannot be read, max_bad_images is 2; the last: .*7\.png"):
        epoch_of(config.replace(max_bad_images=2, workers=workers))


def test_a_folder_of_unreadable_images_stops(damaged_config):
    config, _ = damaged_config
    for path in load_data(config).train.source.samples:
        open(path[0], "w").close()
    with pytest.raises(UnreadableImageError, match=r"\.png: cannot be read as an image: UnidentifiedImageError"):
        epoch_of(config)


def test_an_unreadable_validation_image_is_an_error_that_names_it(damaged_config):
    config, _ = damaged_config
    val = load_data(config).val
    open(val.source.samples[3][0], "w").close()
    with pytest.raises(UnreadableImageError, match=r"val/digit-0/\d+\.png: "):
        val[3]


def test_training_on_damaged_images_is_one_line_when_it_stops(damaged_config, tmp_path, capsys):
    config, _ = damaged_config
    import yaml

    (tmp_path / "damaged.yaml").write_text(yaml.safe_dump(config.as_dict()))
    call = [
        "train",
        "--config",
        str(tmp_path / "damaged.yaml"),
        "--output",
        str(tmp_path / "run"),
        "--max-bad-images",
        "0",
    ]
    assert cli.main(call) == 1
    assert "fastdeit train: " in (err := capsys.readouterr().err) and "7.png" in err.splitlines()[-1]


def test_repeated_augmentation_on_one_process(make_small_config):
    """Each of a third of the images three times in a row, each time another augmentation, the epoch as long as before."""
    config = make_small_config(repeated_aug=3, scale=[0.3, 1.0])
    batches, _ = epoch_of(config)
    images = torch.cat([images for images, _ in batches])
    classes = torch.cat([classes for _, classes in batches])
    assert len(images) == 96
    assert all(len(set(classes[i : i + 3].tolist())) == 1 for i in range(0, 96, 3))
    assert sum(torch.equal(images[i], images[i + 1]) for i in range(0, 96, 3)) < 3
    keys = [key for batch in EpochBatches(96, 32, 0, repeats=3) for key in batch]
    counts = np.unique([key.index for key in keys], return_counts=True)[1]
    assert len(counts) == 32 and set(counts) == {3}


def test_repetitions_go_to_different_ranks():
    ranks = [list(EpochBatches(96, 16, 0, rank, 3, repeats=3)) for rank in range(3)]
    for batches in zip(*ranks, strict=True):
        indices = [[key.index for key in keys] for keys in batches]
        assert indices[0] == indices[1] == indices[2] and len(set(indices[0])) == 16


class Reader:
    """Stands in for timm's readers of streams: shuffled by epoch, split among workers."""

    num_samples = 40

    def __init__(self, count):
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        order = np.random.RandomState(self.epoch).permutation(self.count)
        for number in order[worker.id :: worker.num_workers] if worker else order:
            yield Image.new("L", (20, 20), int(number)), int(number)


def stream_of(config, epoch=0, first_batch=0, count=40):
    dataset = Stream(Reader(count), train_transform(config))
    batches = EpochBatches(len(dataset), 8, config.seed)
    batches.set_epoch(epoch, first_batch)
    return [(images.clone(), classes) for images, classes in TrainLoader(dataset, batches, config, CPU)]


def test_a_stream_gives_an_epoch_again(make_small_config):
    config = make_small_config()
    first, again, other = (stream_of(config, epoch) for epoch in (2, 2, 3))
    assert same(first, again) and not same(first, other)
    assert sorted(torch.cat([classes for _, classes in first]).tolist()) == list(range(40))


def test_a_stream_does_not_start_in_the_middle_of_an_epoch(make_small_config):
    with pytest.raises(ValueError, match="a stream starts at the beginning of an epoch only, not at batch 2"):
        stream_of(make_small_config(), first_batch=2)


def test_a_stream_that_ends_early_is_an_error(make_small_config):
    with pytest.raises(ValueError, match="the stream ended after 3 of 5 batches of epoch 0"):
        stream_of(make_small_config(), count=30)
