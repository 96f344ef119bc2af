"""Labels from a file are the teacher's own, and those of another run are refused."""

import errno
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from fastdeit.commands import cli
from fastdeit.train import cached_labels, run
from fastdeit.train.cached_labels import (
    FIELDS_OF_LABELS,
    CachedTeacher,
    LabelFile,
    cache_labels,
    check_header,
    fingerprint,
    label_header,
    partial_file,
    weights_hash,
)
from fastdeit.train.checkpoints import load_state, save_weights
from fastdeit.train.datasets import load_data
from fastdeit.train.files import WriteError
from fastdeit.train.models import create_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def taught(make_small_config, tmp_path_factory):
    """A configuration with a teacher in a file; its data, that teacher, and its labels for two epochs."""
    folder = tmp_path_factory.mktemp("labels")
    config = make_small_config(epochs=2, teacher_epochs=0, aa="rand-m9-mstd0.5-inc1", repeated_aug=2, drop_path=0.1)
    data = load_data(config)
    torch.manual_seed(5)
    fresh = timm.create_model(config.teacher_model, num_classes=3, in_chans=1, **config.teacher_kwargs)
    fresh.eval().requires_grad_(False)
    images = torch.stack([image for image, _ in data.val])
    fresh.get_classifier().bias -= fresh(images).mean(0)  # else an untrained network says the same of all images
    save_weights(folder / "teacher.safetensors", fresh.state_dict(), config, data.classes)
    config = config.replace(teacher_checkpoint=str(folder / "teacher.safetensors"))
    teacher = create_teacher(config, 3, CPU)
    list(cache_labels(config, data, teacher, CPU, folder / "small.labels"))
    return config, data, teacher, folder / "small.labels"


def test_training_on_labels_is_training_with_the_teacher_to_the_bit(taught, tmp_path):
    config, _, _, labels = taught
    run.train(config, tmp_path / "live")
    run.train(config.replace(teacher_cache=str(labels)), tmp_path / "cached")
    live, cached = (load_state(tmp_path / name / "last.state.pt") for name in ("live", "cached"))
    assert [row["train_loss"] for row in live["history"]] == [row["train_loss"] for row in cached["history"]]
    assert all(torch.equal(live["model"][name], tensor) for name, tensor in cached["model"].items())


def test_training_on_labels_builds_no_teacher(taught, tmp_path, monkeypatch):
    config, _, _, labels = taught
    monkeypatch.setattr(run, "create_teacher", None)
    result = run.train(config.replace(teacher_cache=str(labels), epochs=2), tmp_path / "run")
    assert result.teacher_top1 is None


def test_labels_are_not_all_alike(taught):
    """Else the tests above would show nothing."""
    labels = LabelFile(taught[3]).labels
    assert labels.shape == (2, 96) and len(np.unique(labels)) > 1 and labels.min() >= 0
    assert not np.array_equal(labels[0], labels[1])


def test_an_interrupted_computation_goes_on_to_the_same_file(taught, tmp_path):
    config, data, teacher, whole = taught
    path = tmp_path / "again.labels"
    steps = cache_labels(config, data, teacher, CPU, path)
    for _ in range(4):  # three batches an epoch
        next(steps)
    steps.close()
    assert not path.exists()
    seen = []
    handle = teacher.register_forward_hook(lambda *_: seen.append(1))
    list(cache_labels(config, data, teacher, CPU, path))
    handle.remove()
    assert len(seen) == 2 and path.read_bytes() == whole.read_bytes()


def test_what_there_is_is_written_every_minute(taught, tmp_path, monkeypatch):
    """So that a kill, after which nothing more is written, costs no more."""
    config, data, teacher, whole = taught
    path = tmp_path / "again.labels"
    monkeypatch.setattr(cached_labels, "STORE_EVERY", 0.0)
    steps = cache_labels(config, data, teacher, CPU, path)
    next(steps)
    next(steps)
    after_two = partial_file(path).read_bytes()  # the second batch is stored when the third is asked for, or at once
    steps.close()
    partial_file(path).write_bytes(after_two)
    first, *_ = cache_labels(config, data, teacher, CPU, path)
    assert first >= 64
    assert path.read_bytes() == whole.read_bytes() and not list(tmp_path.glob("*.lock"))


def test_a_gap_is_filled_and_what_follows_computed_anew(taught, tmp_path):
    """As after a power failure, of which later pages may survive."""
    config, data, teacher, whole = taught
    path = tmp_path / "again.labels"
    shutil.copy(whole, partial_file(path))
    file = LabelFile(partial_file(path))
    row = np.array(file.labels[1])
    row[40] = cached_labels.MISSING
    file.store(1, row)
    seen = []
    handle = teacher.register_forward_hook(lambda *_: seen.append(1))
    done = list(cache_labels(config, data, teacher, CPU, path))
    handle.remove()
    assert len(seen) == 2 and done == [192, 192] and path.read_bytes() == whole.read_bytes()


def test_a_second_computation_of_the_same_labels_is_refused(taught, tmp_path):
    config, data, teacher, _ = taught
    path = tmp_path / "two.labels"
    steps = cache_labels(config, data, teacher, CPU, path)
    next(steps)
    with pytest.raises(ValueError, match=rf"labels: {path} is in use by process \d+ on"):
        next(cache_labels(config, data, teacher, CPU, path))
    steps.close()


def test_logits_that_are_not_finite_give_no_labels(taught, tmp_path):
    config, data, _, _ = taught

    class Odd(torch.nn.Module):
        def forward(self, images):
            return torch.full((len(images), 3), float("nan"))

    with pytest.raises(ValueError, match="teacher_model: logits of regnetx_002 are not finite in epoch 0, batch 0"):
        next(cache_labels(config, data, Odd().eval(), CPU, tmp_path / "odd.labels"))
    assert (LabelFile(partial_file(tmp_path / "odd.labels")).labels == cached_labels.MISSING).all()


def test_a_full_disk_is_said_with_what_stands(taught, tmp_path, monkeypatch):
    config, data, teacher, _ = taught
    steps = cache_labels(config, data, teacher, CPU, tmp_path / "full.labels")
    next(steps)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            WriteError, match=r"full\.labels\.partial: cannot be written: the disk is full; what it held"
        ):
            list(steps)
    assert partial_file(tmp_path / "full.labels").exists()


@pytest.mark.parametrize("how, code", [("signal", 143), ("error", 1), ("early", 2)])
def test_the_command_keeps_what_there_is(taught, tmp_path, monkeypatch, capsys, how, code):
    import yaml

    config, _, _, labels = taught
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config.as_dict()))
    path = tmp_path / "out.labels"
    call = ["cache-teacher", "--config", str(tmp_path / "small.yaml"), "--labels", str(path)]
    cache = cached_labels.cache_labels

    def interrupted(*args):
        for number, done in enumerate(cache(*args)):
            if number == 3 and how == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            if number == 3 and how == "error":
                raise RuntimeError("odd")
            if how == "early":
                raise ValueError("aa: odd")
            yield done

    with monkeypatch.context() as patch:
        patch.setattr(cached_labels, "cache_labels", interrupted)
        assert cli.main(call) == code
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdeit")]
    kept = f"The labels so far are in {path}.partial; the same command goes on"
    expected = {
        "signal": f"stopped by SIGTERM; 128 of 192 labels are there. {kept}",
        "error": f"RuntimeError: odd (test_cached_labels.py, line {interrupted.__code__.co_firstlineno + 5}). {kept}",
        "early": "aa: odd",
    }
    assert said == [f"fastdeit cache-teacher: {expected[how]}"]
    assert cli.main(call) == 0 and path.read_bytes() == labels.read_bytes()


def test_the_batches_of_other_ranks_are_computed_too(taught, tmp_path):
    config, data, teacher, _ = taught
    list(cache_labels(config, data, teacher, CPU, tmp_path / "two.labels", ranks=2))
    file = LabelFile(tmp_path / "two.labels")
    assert file.header["ranks"] == 2 and file.labels.min() >= 0


def test_ranks_divide_the_batch(taught, tmp_path):
    config, data, teacher, _ = taught
    with pytest.raises(ValueError, match="ranks: expected a divisor of batch_size 32, got 5"):
        next(cache_labels(config, data, teacher, CPU, tmp_path / "five.labels", ranks=5))


OTHER = dict(
    resize="torch",
    decode_on="device",
    seed=9,
    batch_size=48,
    repeated_aug=3,
    img_size=24,
    mean=[0.1],
    std=[0.1],
    interpolation="bilinear",
    simple_random_crop=True,
    scale=[0.1, 1.0],
    ratio=[0.5, 2.0],
    hflip=0.1,
    vflip=0.1,
    three_augment=True,
    aa=None,
    color_jitter=0.2,
    color_jitter_prob=0.5,
    grayscale_prob=0.1,
    gaussian_blur_prob=0.1,
    reprob=0.1,
    remode="pixel",
    recount=2,
    mixup=0.1,
    cutmix=0.1,
    cutmix_minmax=[0.1, 0.2],
    mixup_prob=0.1,
    mixup_switch_prob=0.1,
    mixup_mode="elem",
    mixup_off_epoch=1,
    precision="bf16",
    teacher_model="regnety_002",
    teacher_kwargs={},
    in_chans=3,
    img_size_schedule=[[0, 8], [1, 16]],
    aa_schedule=[[0, None], [1, "rand-m9-mstd0.5-inc1"]],
)


@pytest.mark.parametrize("field", FIELDS_OF_LABELS)
def test_labels_of_another_augmentation_are_refused_by_field(taught, field):
    config, data, _, labels = taught
    other = config.replace(teacher_cache=str(labels), **{field: OTHER[field]})
    with pytest.raises(ValueError, match=rf"labels of another run: .*{field} \("):
        CachedTeacher(other, data, CPU)


def test_labels_of_another_decoder_are_refused(taught):
    config, data, _, labels = taught
    here = LabelFile(labels).header["decoder"]
    other = next(name for name in ("torchvision", "pillow") if name != here)
    with pytest.raises(ValueError, match=rf"labels of another run: .*decoder \('{here}' there, '{other}' now\)"):
        CachedTeacher(config.replace(teacher_cache=str(labels), decoder=other), data, CPU)


def test_labels_of_a_file_without_a_decoder_are_pillows():
    check_header({"seed": 0}, {"seed": 0, "decoder": "pillow", "resize": "pillow"}, Path("old.labels"))
    with pytest.raises(ValueError, match=r"decoder \('pillow' there, 'simplejpeg' now\)"):
        check_header({"seed": 0}, {"seed": 0, "decoder": "simplejpeg"}, Path("old.labels"))


def test_labels_for_other_ranks_are_refused(taught):
    config, data, _, labels = taught
    with pytest.raises(ValueError, match=r"ranks \(1 there, 2 now\)"):
        CachedTeacher(config.replace(teacher_cache=str(labels)), data, CPU, ranks=2)


def test_labels_of_other_images_are_refused(taught, image_folder, tmp_path):
    config, _, _, labels = taught
    folder = shutil.copytree(image_folder, tmp_path / "images")
    assert fingerprint(load_data(config.replace(data=str(folder))).train) == fingerprint(load_data(config).train)
    shutil.copy(folder / "train/digit-0/0.png", folder / "train/digit-0/1.png")
    other = config.replace(data=str(folder), teacher_cache=str(labels))
    with pytest.raises(ValueError, match=r"labels of another run: dataset \("):
        CachedTeacher(other, load_data(other), CPU)


def test_labels_of_another_teacher_are_refused(taught, tmp_path):
    config, data, teacher, labels = taught
    weights = {name: t + 1 if t.is_floating_point() else t for name, t in teacher.state_dict().items()}
    save_weights(tmp_path / "other.safetensors", weights, config, data.classes)
    other = config.replace(teacher_checkpoint=str(tmp_path / "other.safetensors"), teacher_cache=str(labels))
    with pytest.raises(ValueError, match=r"labels of another run: teacher_weights \("):
        CachedTeacher(other, data, CPU)


def test_what_labels_do_not_depend_on_may_differ(taught):
    config, data, _, labels = taught
    CachedTeacher(
        config.replace(teacher_cache=str(labels), epochs=1, lr=1.0, drop_path=0.3, workers=3, smoothing=0.0), data, CPU
    )


def test_more_epochs_than_labels_are_refused(taught):
    config, data, _, labels = taught
    with pytest.raises(ValueError, match="has 2 epochs, epochs is 3"):
        CachedTeacher(config.replace(teacher_cache=str(labels), epochs=3), data, CPU)


def damaged(content):
    return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]


@pytest.mark.parametrize(
    "change, message",
    [
        (damaged, "damaged, its content does not have the hash"),
        (lambda content: content[:-32], "not complete"),
        (lambda content: content[:-100], "cut off"),
        (lambda content: b"PK" + content[2:], "not a file of fastdeit cache-teacher"),
        (lambda content: b"", "not a file of fastdeit cache-teacher"),
    ],
)
def test_a_damaged_file_is_refused(taught, tmp_path, change, message):
    config, data, _, labels = taught
    path = tmp_path / "bad.labels"
    path.write_bytes(change(labels.read_bytes()))
    with pytest.raises(ValueError, match=message):
        CachedTeacher(config.replace(teacher_cache=str(path)), data, CPU)


def test_the_hash_of_a_teacher_is_that_of_its_weights(taught):
    _, _, teacher, _ = taught
    weights = teacher.state_dict()
    assert weights_hash(weights) == weights_hash(dict(reversed(weights.items())))
    name = next(iter(weights))
    assert weights_hash(weights) != weights_hash({**weights, name: weights[name] + 1})


def test_a_stream_has_no_positions(taught):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    config, data, _, _ = taught
    with pytest.raises(ValueError, match="is a stream, whose images have no position"):
        label_header(config, type(data)(Stream(), data.val, data.classes), CPU, 1, "")


def test_the_command_writes_what_training_takes(taught, tmp_path, capsys):
    import yaml

    config, _, _, labels = taught
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config.as_dict()))
    call = ["cache-teacher", "--config", str(tmp_path / "small.yaml"), "--labels", str(tmp_path / "out.labels")]
    assert cli.main(call) == 0 and (tmp_path / "out.labels").read_bytes() == labels.read_bytes()
    digest = LabelFile(labels).check_whole()
    assert f"2 epochs of 96 labels, SHA-256 {digest}" in capsys.readouterr().out
    assert cli.main(call) == 0 and f"is complete, SHA-256 {digest}" in capsys.readouterr().out
    assert cli.main([*call, "--seed", "4"]) == 2 and "seed (0 there, 4 now)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--distillation-type", "soft"], "distillation_type: labels serve hard distillation"),
        (["--ranks", "0"], "ranks: expected at least 1"),
        ([], "teacher_epochs: expected 0"),
    ],
)
def test_the_command_refuses_what_labels_cannot_serve(changes, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["cache-teacher", *changes]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "header, message",
    [
        ([], "its header has None as epochs"),
        (
            dict(epochs="2", positions=4, classes=3, teacher_weights="x"),
            "its header has '2' as epochs, expected an integer",
        ),
        (dict(epochs=2, positions=-4, classes=3, teacher_weights="x"), "its header has -4 as positions"),
        (dict(epochs=2, positions=4, classes=True, teacher_weights="x"), "its header has True as classes"),
        (
            dict(epochs=2, positions=4, classes=3, teacher_weights=7),
            "its header has 7 as teacher_weights, expected a hash",
        ),
        (dict(epochs=2, positions=4, classes=3, teacher_weights="x"), "cut off at"),
    ],
)
def test_a_header_of_wrong_types_or_sizes_is_named(tmp_path, header, message):
    import json

    text = json.dumps(header).encode()
    (tmp_path / "x.labels").write_bytes(b"FDLABEL1" + len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(ValueError, match=rf"teacher_cache: .*x\.labels: {message}"):
        LabelFile(tmp_path / "x.labels")


@pytest.mark.parametrize("label", [-1, 3, 32767])
def test_a_label_that_is_no_class_is_named(tmp_path, label):
    import numpy as np

    header = dict(positions=4, classes=3, teacher_weights="x")
    file = LabelFile.create(tmp_path / "x.labels", header, 2)
    file.store(0, np.array([0, 1, 2, 0], np.int16))
    file.store(1, np.array([0, 2, label, 0], np.int16))
    with pytest.raises(ValueError, match=rf"epoch 1, position 2: class {label}, expected 0 to 2"):
        file.check_range()
