"""`decode_on: device`: files that reach the device encoded, whatever is in them, with a CPU in the device's place."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastdeit.benchmarks.photographs import fitted
from fastdeit.testing import fake_cuda
from fastdeit.testing.fake_cuda.events import WAITS
from fastdeit.train import device_decoding, run
from fastdeit.train.checkpoints import check_same_run, load_state
from fastdeit.train.config import load_config
from fastdeit.train.copying import HostBatch, copied
from fastdeit.train.data_stages import measure_stages
from fastdeit.train.datasets import load_data
from fastdeit.train.decoders import Box, is_installed
from fastdeit.train.device_decoding import create_device_decoder, resized
from fastdeit.train.dry_run import describe
from fastdeit.train.encoded_images import Part
from fastdeit.train.engine import Trainer
from fastdeit.train.image_files import UnreadableImageError
from fastdeit.train.loading import TrainLoader
from fastdeit.train.phases import config_at
from fastdeit.train.sampling import EpochBatches
from fastdeit.train.transform_errors import TransformError

CPU = torch.device("cpu")
AUGMENTED = "rand-m9-mstd0.5-inc1"


@pytest.fixture(params=["nvimgcodec", "torchvision"])
def decoder(request):
    if not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 JPEG files in two classes, among them grey and progressive ones, a CMYK one and a PNG."""
    root = tmp_path_factory.mktemp("photographs")
    for split, copies in (("train", 4), ("val", 1)):
        for number, image in enumerate(fitted(90, 70)):
            place = root / split / f"class-{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            for copy in range(copies):
                shifted = image.transform(image.size, Image.Transform.AFFINE, (1, 0, copy, 0, 1, 2 * copy))
                shifted = shifted.convert({1: "L", 2: "CMYK"}.get(number if copy == 1 else 0, "RGB"))
                shifted.save(place / f"{number}-{copy}.jpg", quality=90, progressive=copy == 2)
    Image.open(root / "train" / "class-0" / "0-0.jpg").save(root / "train" / "class-0" / "0-4.png")
    return root


@pytest.fixture
def config(make_small_config, folder, decoder):
    return make_small_config(
        data=str(folder),
        in_chans=3,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        img_size=32,
        batch_size=4,
        aa=None,
        decoder=decoder,
        resize="torch",
        decode_on="device",
        augment_on="device",
    )


def loader_of(config):
    train = load_data(config).train
    batches = EpochBatches(len(train), config.batch_size, config.seed)
    return TrainLoader(train, batches, config, CPU), batches


def epoch_of(config, epoch=0):
    loader, batches = loader_of(config)
    batches.set_epoch(epoch)
    return list(loader)


def near(a, b):
    """But for the rounding and clipping between the two passes of the kernel for uint8, which that for float32 does not do."""
    difference = torch.stack([(x.int() - y.int()).abs() for (x, _), (y, _) in zip(a, b, strict=True)]).float()
    labels = all(torch.equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))
    return labels and difference.max() <= 16 and difference.mean() < 0.25 and (difference > 2).float().mean() < 0.02


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_pixels_are_those_of_the_resize_on_the_cpu_but_for_rounding(config, interpolation):
    config = config.replace(interpolation=interpolation)
    there, here = epoch_of(config), epoch_of(config.replace(decode_on="cpu"))
    assert len(there) == 6 and near(there, here) and not same(there, here)


@pytest.mark.parametrize("aa", [AUGMENTED, "rand-m7-n3-p1-t3aw-inc1"])  # the second with blurs, which no plan describes
def test_batches_do_not_depend_on_workers_or_decoding_before(config, aa):
    config = config.replace(aa=aa, workers=2, prefetch=1)
    loader, batches = loader_of(config)
    for epoch in (1, 2):
        batches.set_epoch(epoch)
        assert same(list(loader), epoch_of(config.replace(workers=0), epoch))


def test_grey_images_have_pillows_levels(config):
    grey = config.replace(in_chans=1, mean=[0.5], std=[0.25])
    there, here = epoch_of(grey), epoch_of(grey.replace(decode_on="cpu"))
    assert there[0][0].shape == (4, 1, 32, 32) and near(there, here)


def test_a_crop_of_the_results_size_keeps_its_levels():
    crop = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    for mode in ("bilinear", "bicubic"):
        assert torch.equal(resized([crop], [mode], (32, 32, 3), CPU)[0], crop)
    expected = np.asarray(Image.fromarray(crop.numpy()).convert("L"))
    assert np.array_equal(resized([crop], ["bicubic"], (32, 32, 1), CPU)[0, ..., 0].numpy(), expected)
    assert resized([], [], (32, 32, 3), CPU).shape == (0, 32, 32, 3)


def test_files_that_fill_the_slot_go_with_the_ticket(config, tmp_path):
    """Of 16 pixels and batches of 4 a slot has 3,072 bytes, a file of noise about as many: most do not fit."""
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        (tmp_path / name / "noise").mkdir(parents=True)
        for number in range(8):
            image = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
            image.save(tmp_path / name / "noise" / f"{number}.jpg", quality=90)
    config = config.replace(data=str(tmp_path), img_size=16, workers=1)
    loader, _ = loader_of(config)
    tickets = list(loader.loader)
    assert all(0 < len(ticket.beyond) <= 4 for ticket in tickets)
    assert near(epoch_of(config), epoch_of(config.replace(decode_on="cpu")))


def test_a_crop_far_larger_than_the_result_is_resized_by_the_worker(config, monkeypatch):
    monkeypatch.setattr("fastdeit.train.image_pipeline.LARGEST_REDUCTION", 2.4)
    loader, _ = loader_of(config)
    encoded = [Part.of_row(row).encoded for t in loader.loader for row in loader.ring.read(t).parts.tolist()]
    assert 0 < sum(encoded) < len(encoded) == 24
    assert near(epoch_of(config), epoch_of(config.replace(decode_on="cpu")))


@pytest.fixture
def damaged(config, folder, tmp_path):
    """Three files: one that ends early, one whose header is no JPEG's though its markers are, one that is damaged inside."""
    root = shutil.copytree(folder, tmp_path / "images")
    names = [root / "train" / "class-1" / f"{name}.jpg" for name in ("1-0", "3-0", "5-0")]
    content = [name.read_bytes() for name in names]
    names[0].write_bytes(content[0][: len(content[0]) // 2])
    scan = content[1].index(b"\xff\xda")
    names[1].write_bytes(content[1][: scan + 2] + b"\xff\xd9")
    middle = len(content[2]) // 2
    names[2].write_bytes(content[2][:middle] + b"\xff\xd8\xff\xc0" + content[2][middle:])
    return config.replace(data=str(root), aa=AUGMENTED), [str(name) for name in names]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_those_of_the_cpu(damaged, workers, capsys):
    """Named once and replaced, whether a worker finds them or the device's decoder."""
    config, names = damaged
    loader, _ = loader_of(config.replace(workers=workers))
    list(loader)
    here, _ = loader_of(config.replace(decode_on="cpu"))
    list(here)
    assert {m.partition(": ")[0] for m in loader.unreadable} == {m.partition(": ")[0] for m in here.unreadable}
    assert names[0] in {m.partition(": ")[0] for m in loader.unreadable} and names[1] in "".join(loader.unreadable)
    assert capsys.readouterr().err.count(f"{names[0]}: cannot be read") == 2
    with pytest.raises(UnreadableImageError, match="cannot be read as an image"):
        list(loader_of(config.replace(workers=workers, max_bad_images=0))[0])


class Refusing:
    """A decoder that refuses every file, or gives something of another shape."""

    def __init__(self, answer=None):
        self.answer = answer

    def decode(self, files, parts):
        return [self.answer for _ in files]


@pytest.mark.parametrize("answer", [None, torch.zeros(3, 3, 3, dtype=torch.uint8), torch.zeros(3, 3, 3)])
def test_what_the_decoder_refuses_is_made_by_pillow(config, answer, monkeypatch):
    config = config.replace(aa=AUGMENTED)
    monkeypatch.setattr(device_decoding, "create_device_decoder", None)
    monkeypatch.setattr("fastdeit.train.loading.create_device_decoder", lambda *_: Refusing(answer))
    assert same(epoch_of(config.replace(workers=2)), epoch_of(config.replace(decode_on="cpu", decoder="pillow")))


def test_one_bad_file_does_not_cost_torchvision_the_others():
    file = io.BytesIO()
    fitted(40, 30)[0].save(file, "JPEG")
    good = np.frombuffer(file.getvalue(), np.uint8)
    bad = good[:100].copy()
    part = Part(0, len(good), True, Box(3, 2, 20, 10), 0)
    for name in ("torchvision", "nvimgcodec"):
        if is_installed(name):
            made = {"torchvision": device_decoding._Torchvision, "nvimgcodec": device_decoding._NvImageCodec}[name](CPU)
            found = made.decode([good, bad, good], [part] * 3)
            assert found[1] is None and torch.equal(found[0], found[2]) and found[0].shape == (10, 20, 3)


def test_a_transform_that_fails_names_image_and_place(config, monkeypatch):
    config = config.replace(aa=AUGMENTED)
    loader, _ = loader_of(config)

    def failing(recorder, rows):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(loader.loader.dataset.dataset.pipeline.planner, "write", failing)
    with pytest.raises(
        TransformError, match=r"aa: the transform fails on .*jpg: .*planted \(seed 0, epoch 0, position 0, "
    ):
        list(loader)


def test_an_image_that_a_worker_augments_and_cannot_decode_is_unreadable(config, damaged):
    """Not a transform that failed: a policy of blurs decodes in the worker."""
    broken, names = damaged
    loader, _ = loader_of(broken.replace(aa="rand-m7-n3-p1-t3aw-inc1"))
    list(loader)
    assert any(names[1] in message for message in loader.unreadable)


def test_a_run_depends_on_where_it_decodes_and_not_on_workers(config, tmp_path):
    config = config.replace(aa=AUGMENTED, teacher_epochs=0, distillation_type="none", epochs=2)
    run.train(config, tmp_path / "whole")
    run.train(config.replace(workers=2), tmp_path / "again")
    whole, again = (load_state(tmp_path / name / "last.state.pt") for name in ("whole", "again"))
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in whole["model"].items())
    with pytest.raises(ValueError, match=r"another configuration: decode_on \('device' there, 'cpu' now\)$"):
        check_same_run(whole, config.replace(decode_on="cpu"), tmp_path)


SIZES = [[0, 16], [1, 32]]


def test_crops_have_the_size_of_the_phase(config):
    config = config.replace(img_size_schedule=SIZES)
    for epoch, size in SIZES:
        current = config_at(config, epoch)
        there, here = epoch_of(current, epoch), epoch_of(current.replace(decode_on="cpu"), epoch)
        assert there[0][0].shape == (4, 3, size, size) and near(there, here)


@pytest.mark.parametrize("step", [5, 6, 7])
def test_a_run_at_growing_sizes_goes_on_across_a_change(config, tmp_path, monkeypatch, step):
    """Interrupted before the last of six updates at 16 pixels, and before the first and the second of six at 32."""
    plain = dict(aa=AUGMENTED, teacher_epochs=0, distillation_type="none", warmup_epochs=0)
    config = config.replace(img_size_schedule=SIZES, epochs=2, checkpoint_steps=1, **plain)
    shown, train_step = [], Trainer._train_step

    def interrupted(trainer, epoch, images, classes):
        shown.append(images.shape[-1])
        if len(shown) == 12 + step + 1:
            raise SystemExit
        train_step(trainer, epoch, images, classes)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    run.train(config, tmp_path / "whole")
    with pytest.raises(SystemExit):
        run.train(config, tmp_path / "run")
    run.train(config, tmp_path / "run", resume=True)
    sizes = [16] * 6 + [32] * 6
    assert shown == sizes + sizes[: step + 1] + sizes[step:]
    whole, found = (load_state(tmp_path / name / "last.state.pt") for name in ("whole", "run"))
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in whole["model"].items())


def test_stages(config):
    loader, _ = loader_of(config.replace(aa=AUGMENTED))
    stages = measure_stages(loader, config, images=16)
    assert {name for name, value in stages.ms.items() if value > 0} == {"read", "decode", "augment", "collate"}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(resize="pillow"), "decode_on: the device resizes by PyTorch, expected resize torch, got 'pillow'"),
        (
            dict(decoder="simplejpeg"),
            "decode_on: simplejpeg decodes on the CPU only, expected decoder auto, nvimgcodec or",
        ),
        (dict(augment_on="cpu"), "decode_on: what the device decodes it augments, expected augment_on auto or device"),
        (dict(decode_on="gpu"), "decode_on: expected one of cpu, device, got 'gpu'"),
    ],
)
def test_options_that_contradict_it_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        load_config("deit_base", {"resize": "torch", "decode_on": "device", **changes})


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(aa="augmix-m3"), "aa: AugMix mixes images"),
        (dict(augment_on="auto"), "the device is the CPU itself"),
        (dict(data="digits", in_chans=1, mean=[0.5], std=[0.5]), "they are in memory, decoded"),
    ],
)
def test_images_that_the_device_cannot_decode_are_refused_with_the_reason(config, changes, reason, tmp_path):
    config = config.replace(distillation_type="none", teacher_epochs=0, **changes)
    for refused in (lambda: describe(config), lambda: run.train(config, tmp_path / "run")):
        with pytest.raises(
            ValueError,
            match=f"^decode_on: the images cannot be decoded on the device: {reason}.*; set decode_on to cpu",
        ):
            refused()


def test_a_dry_run_says_where_images_are_decoded(config):
    assert f"loader: decoder {config.decoder}; resize torch, both on the device; flips" in describe(config)


def test_auto_takes_a_decoder_that_a_device_has(config, monkeypatch):
    monkeypatch.setattr("fastdeit.train.decoders.is_installed", lambda name: name != "nvimgcodec")
    assert "loader: decoder torchvision; resize torch, both" in describe(config.replace(decoder="auto"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_decoder_that_does_not_work_on_the_device_is_an_error_that_says_what_to_do(config):
    expected = (
        f"decode_on: {config.decoder} cannot decode JPEG files on cuda:0: .*It needs nvJPEG .*or set decode_on to cpu"
    )
    with pytest.raises(ImportError, match=expected):
        create_device_decoder(config, torch.device("cuda:0"))


def test_a_decoder_that_gives_nothing_is_an_error(config, monkeypatch):
    monkeypatch.setattr(device_decoding, "_Torchvision", lambda device: Refusing())
    with pytest.raises(ImportError, match="torchvision cannot decode JPEG files on cpu: the library gives no image"):
        create_device_decoder(config.replace(decoder="torchvision"), CPU)


def test_a_batch_is_decoded_before_its_memory_is_given_back():
    log = []
    batch = HostBatch((), lambda: log.append("given back"), lambda: log.append("decoded") or (torch.zeros(1),))
    assert len(list(copied(iter([batch, batch]), CPU))) == 2 and log == ["decoded", "given back"] * 2


class Blank:
    """A decoder whose images are black."""

    def decode(self, files, parts):
        return [torch.zeros(part.box.height, part.box.width, 3, dtype=torch.uint8, device="cuda") for part in parts]


@pytest.mark.fake_device
def test_a_batch_on_a_gpu_takes_two_launches_an_image_and_waits_for_nothing(config, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdeit.train.loading.create_device_decoder", lambda *_: Blank())
    common = shutil.copytree(folder, tmp_path / "common")
    for name in ("0-4.png", "2-1.jpg"):  # a PNG, and a JPEG of CMYK: images that workers make
        (common / "train" / "class-0" / name).unlink()

    def events_of_an_epoch(root, size):
        train = load_data(config.replace(data=str(root))).train
        loader = TrainLoader(train, EpochBatches(len(train), size, config.seed), config, torch.device("cuda"))
        with fake_cuda.record() as events:
            for images, _ in loader:
                assert images.shape == (size, 3, 32, 32) and images.is_cuda
        return [event for event in events if "FillFunctor" not in event.name], len(loader)  # the decoder's

    of_a_batch = []
    for size in (4, 8):
        events, count = events_of_an_epoch(common, size)
        launches = [event for event in events if event.kind == "launch"]
        assert all(event.stream for event in launches)  # the stream of copies, which is not the default one
        of_a_batch.append(len(launches) / count - 2 * size)
        assert not {"copy_to_device_pageable", *WAITS} & {event.kind for event in events}
    assert of_a_batch == [4, 4]
    events, _ = events_of_an_epoch(folder, 24)
    assert not {"copy_to_device_pageable", *WAITS} & {event.kind for event in events}


@pytest.mark.gpu
@pytest.mark.numeric
def test_nvjpegs_pixels_are_near_those_of_the_cpu(config):
    device = torch.device("cuda")
    try:
        create_device_decoder(config, device)
    except ImportError as error:
        pytest.skip(str(error))
    config = config.replace(img_size=64)
    train = load_data(config).train
    batches = EpochBatches(len(train), config.batch_size, config.seed)
    there = torch.cat([images.cpu() for images, _ in TrainLoader(train, batches, config, device)])
    here = torch.cat([images for images, _ in epoch_of(config.replace(decode_on="cpu"))])
    normalised = (here.float() / 255 - 0.5) / 0.25  # as a GPU's loader gives images
    assert (there - normalised).abs().mean() < 3 / 255 / 0.25
