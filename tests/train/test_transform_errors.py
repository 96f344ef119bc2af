"""An error of a transform is no unreadable image: it stops, and says on what and where, from a worker as well."""

import pickle

import pytest
import torch
from PIL import Image

from fastdeit.train.datasets import load_data
from fastdeit.train.error_passing import ErrorPassingLoader
from fastdeit.train.loading import TrainLoader
from fastdeit.train.sampling import EpochBatches, Key, KeyedDataset, eval_loader
from fastdeit.train.transform_errors import NamedTransforms, TransformError, TransformFailure
from fastdeit.train.transforms import policy_operations


def fail(image):
    raise KeyError("no such\nthing")


def failing(images, option="aa"):
    """With a step that fails before the last one, which makes a tensor."""
    *steps, last = images.transform.steps
    images.transform = NamedTransforms([*steps, (option, fail), last])
    return images


def fail_in_policy(images):
    """With operations whose magnitude cannot be computed, whether they are carried out at once or planned."""
    for operation in policy_operations(images.transform.steps):
        operation.prob, operation.level_fn = 1.0, lambda level, options: fail(level)
    return images


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_training_names_image_epoch_position_and_option(small_config, workers, augment_on):
    config = small_config.replace(workers=workers, augment_on=augment_on, aa="rand-m9-n2")
    data = fail_in_policy(load_data(config).train)
    batches = EpochBatches(len(data), 32, seed=5)
    batches.set_epoch(2, 1)
    loader = TrainLoader(data, batches, config, torch.device("cpu"))
    with pytest.raises(TransformError) as error:
        next(iter(loader))
    key = next(iter(batches))[0]
    assert str(error.value) == (
        f"aa: the transform fails on {data.filename(key.index)}: KeyError: 'no such\\nthing' "
        f"(seed 5, epoch 2, position {key.position}, image {key.index} of 96)"
    )
    assert key.position == 32  # and by these the failure comes again
    with pytest.raises(TransformError, match=r"^aa: .*position 32"):
        KeyedDataset(fail_in_policy(load_data(config.replace(augment_on="cpu")).train), 5)[Key(2, 32, key.index)]


STEPS = {
    "scale": "timm.data.transforms.RandomResizedCropAndInterpolation.get_params",
    "hflip": "fastdeit.train.image_pipeline.flipped",
    "aa": "fastdeit.train.plans.Planner.write",
}


@pytest.mark.parametrize("option", [*STEPS, "img_size"])
def test_no_step_of_the_pipeline_counts_as_unreadable(small_config, monkeypatch, option):
    config = small_config.replace(aa="rand-m9-n2", augment_on="device" if option == "aa" else "cpu", max_bad_images=96)
    data = load_data(config).train
    if option == "img_size":
        data.transform = NamedTransforms([("scale", lambda image: image), *data.transform.steps[1:]])  # of 20 pixels
    else:
        monkeypatch.setattr(STEPS[option], lambda *_: fail(None))
    with pytest.raises(TransformError, match=rf"^{option}: the transform fails on \S+\.png: .*epoch 0, position 0,"):
        next(iter(TrainLoader(data, EpochBatches(96, 32, seed=0), config, torch.device("cpu"))))


def test_a_failing_batch_on_the_device_is_named(small_config, monkeypatch):
    config = small_config.replace(aa="rand-m9-n2", augment_on="device")
    loader = TrainLoader(load_data(config).train, EpochBatches(96, 32, seed=7), config, torch.device("cpu"))
    batches = iter(loader)
    next(batches)
    monkeypatch.setattr("fastdeit.train.device_stage.augment", lambda *_, **__: fail(None))
    message = (
        r"^augment_on: the augmentation of a batch fails on cpu: KeyError.*\(seed 7, epoch 0, positions 32 to 63\)$"
    )
    with pytest.raises(TransformError, match=message):
        next(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_names_image_and_option(small_config, workers):
    data = failing(load_data(small_config).val, "crop_pct")
    with pytest.raises(TransformError) as error:
        next(iter(eval_loader(data, 8, workers, False)))
    assert str(error.value).startswith(f"crop_pct: the transform fails on {data.filename(0)}: KeyError: ")
    assert "\n" not in str(error.value)


def test_an_error_of_another_data_set_names_its_key():
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise ZeroDivisionError("by zero")

    with pytest.raises(
        TransformError,
        match=r"data: image 3: ZeroDivisionError: by zero \(seed 1, epoch 2, position 7, image 3 of 4\)",
    ):
        KeyedDataset(Broken(), 1, max_bad=100)[Key(2, 7, 3)]


def test_the_first_failing_step_is_named_and_later_ones_do_not_run():
    steps = NamedTransforms([("scale", lambda image: image), ("aa", fail), ("hflip", lambda image: 1 / 0)])
    with pytest.raises(TransformFailure) as failure:
        steps(Image.new("L", (2, 2)))
    assert failure.value.option == "aa"


def test_the_error_pickles_as_it_is():
    error = TransformError("aa: fails")
    assert str(pickle.loads(pickle.dumps(error))) == "aa: fails"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from (1, 2, 3)
        raise TransformError("aa: the transform fails on image 3")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_streams_error_is_not_lost_in_a_batch_that_is_not_full(workers):
    loader = ErrorPassingLoader(Stream(), batch_size=2, drop_last=True, num_workers=workers)
    batches = iter(loader)
    assert next(batches).tolist() == [1, 2]
    with pytest.raises(TransformError, match=r"^aa: the transform fails on image 3$"):
        next(batches)


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(a + b)


class Odd(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise Unpicklable("a", "b")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_cannot_be_sent_is_described(workers):
    with pytest.raises(RuntimeError, match=r"^Unpicklable: ab$"):
        next(iter(ErrorPassingLoader(Odd(), num_workers=workers)))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_that_cannot_be_collated_are_an_error(workers):
    with pytest.raises(TypeError, match="default_collate"):
        next(iter(ErrorPassingLoader([object()], num_workers=workers)))
