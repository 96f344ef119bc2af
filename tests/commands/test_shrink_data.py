"""`fastdeit shrink-data`: what becomes of each image, calls that are repeated or refused, and disks that are full."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from fastdeit.commands import cli
from fastdeit.train import files, shrinking
from fastdeit.train.config import Config
from fastdeit.train.datasets import load_data


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def source(tmp_path):
    """Two classes; in the first every kind of image."""
    root = tmp_path / "images"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name / "deep").mkdir(parents=True)
            Image.fromarray(noise(60, 80, 3)).save(root / split / name / "large.jpg")
    first = root / "train" / "a"
    Image.fromarray(noise(20, 30, 3)).save(first / "small.png")
    Image.fromarray(noise(64, 48)).save(first / "deep" / "grey.png")
    Image.fromarray(noise(64, 64).astype(np.uint16) * 257).save(first / "sixteen.png")
    Image.fromarray(noise(64, 64, 4), "CMYK").save(first / "cmyk.jpg")
    Image.fromarray(noise(100, 40, 4)).save(first / "alpha.png")
    return root


def shrink(source, target, *arguments) -> int:
    return cli.main(["shrink-data", str(source), str(target), "--short-side", "32", *map(str, arguments)])


def described(root) -> dict:
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != shrinking.NOTE):
        with Image.open(path) as image:
            found[str(path.relative_to(root))] = (image.format, image.mode, image.size)
    return found


def test_training_images_are_shrunk_and_the_rest_is_copied(source, tmp_path, capsys):
    assert shrink(source, tmp_path / "small") == 0
    assert described(tmp_path / "small") == {
        "train/a/alpha.png.jpg": ("JPEG", "RGB", (32, 80)),
        "train/a/cmyk.jpg": ("JPEG", "RGB", (32, 32)),
        "train/a/deep/grey.png.jpg": ("JPEG", "L", (32, 43)),
        "train/a/large.jpg": ("JPEG", "RGB", (43, 32)),
        "train/a/sixteen.png.jpg": ("JPEG", "L", (32, 32)),
        "train/a/small.png": ("PNG", "RGB", (30, 20)),
        "train/b/large.jpg": ("JPEG", "RGB", (43, 32)),
        "val/a/large.jpg": ("JPEG", "RGB", (80, 60)),
        "val/b/large.jpg": ("JPEG", "RGB", (80, 60)),
    }
    for name in ("train/a/small.png", "val/a/large.jpg"):
        assert (tmp_path / "small" / name).read_bytes() == (source / name).read_bytes()
    assert "6 shrunk, 3 copied" in capsys.readouterr().out


def test_the_pixels_are_those_of_pillow(source, tmp_path):
    assert shrink(source, tmp_path / "small", "--quality", "100", "--val") == 0
    with Image.open(source / "val/a/large.jpg") as image, Image.open(tmp_path / "small/val/a/large.jpg") as found:
        expected = np.asarray(image.resize((43, 32), Image.Resampling.BICUBIC), dtype=int)
        assert np.abs(np.asarray(found.convert("RGB"), dtype=int) - expected).mean() < 12  # noise, with halved chroma
    with Image.open(tmp_path / "small/train/a/sixteen.png.jpg") as found:
        expected = np.asarray(Image.fromarray(noise(64, 64)).resize((32, 32), Image.Resampling.BICUBIC), dtype=int)
        assert np.abs(np.asarray(found, dtype=int) - expected).max() <= 3


def test_the_copy_is_a_data_set_of_the_same_classes(source, tmp_path):
    shrink(source, tmp_path / "small")
    made, before = (load_data(Config(data=str(root), img_size=16)) for root in (tmp_path / "small", source))
    assert made.classes == before.classes and len(made.train) == len(before.train)
    assert made.train[0][0].shape == (3, 16, 16)


def test_a_second_call_makes_what_is_missing_or_has_changed(source, tmp_path, capsys):
    target = tmp_path / "small"
    shrink(source, target)
    (target / "train/b/large.jpg").unlink()
    (target / "train/a/large.jpg.host.1.tmp").write_bytes(b"of a call that was killed")
    Image.fromarray(noise(90, 90, 3)).save(source / "train/a/large.jpg")
    os.utime(source / "train/a/large.jpg", (1, 1))
    stands = (target / "train/a/cmyk.jpg").stat().st_ino
    capsys.readouterr()
    assert shrink(source, target) == 0
    assert "2 shrunk, 7 kept" in capsys.readouterr().out
    assert described(target)["train/a/large.jpg"][2] == (32, 32) and (target / "train/b/large.jpg").exists()
    assert (target / "train/a/cmyk.jpg").stat().st_ino == stands and not list(target.rglob("*.tmp"))


def test_pils_own_limit_on_size_does_not_count(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert shrink(source, tmp_path / "small") == 0


def test_unreadable_images_are_named_and_left_out(source, tmp_path, capsys):
    damaged = source / "train/a/large.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    assert shrink(source, tmp_path / "small") == 1
    printed = capsys.readouterr()
    assert f"unreadable image, left out: {damaged}: cannot be read as an image" in printed.err
    assert "1 unreadable" in printed.out and "train/a/large.jpg" not in described(tmp_path / "small")
    assert shrink(source, tmp_path / "small", "--max-image-megapixels", 1e-6) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--short-side", "0"], "short_side: expected at least 1 pixel, got 0"),
        (["--quality", "101"], "quality: expected 1 to 100, got 101"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--max-image-megapixels", "nan"], "max_megapixels: expected more than 0, got nan"),
    ],
)
def test_impossible_numbers_are_refused(source, tmp_path, capsys, arguments, message):
    assert shrink(source, tmp_path / "small", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "small").exists()


def test_targets_that_would_mix_images_are_refused(source, tmp_path, capsys):
    for target in (source, source / "train" / "c", source.parent):
        assert shrink(source, target) == 2
        assert "must not lie in one another" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert shrink(source, tmp_path / "mine") == 2
    assert f"is not empty and has no {shrinking.NOTE}" in capsys.readouterr().err
    shrink(source, tmp_path / "small")
    assert shrink(source, tmp_path / "small", "--quality", "80") == 2
    assert "quality 90, val False, not with short_side 32, quality 80" in capsys.readouterr().err
    for text in ("[]", "{"):
        (tmp_path / "small" / shrinking.NOTE).write_text(text)
        assert shrink(source, tmp_path / "small") == 2
        assert str(tmp_path / "small" / shrinking.NOTE) in capsys.readouterr().err


def test_names_that_would_become_one_are_refused(source, tmp_path, capsys):
    Image.fromarray(noise(9, 9, 3)).save(source / "train/a/small.png.jpg")
    assert shrink(source, tmp_path / "small") == 2
    assert "small.png.jpg; rename one of them" in capsys.readouterr().err


def test_a_full_disk_is_named_and_the_same_command_goes_on(source, tmp_path, capsys, monkeypatch):
    written = files.write_atomically

    def full(path, write, keep_as=None):
        if path.parent.name == "deep":
            raise files.WriteError(f"{path}: cannot be written: the disk is full")
        written(path, write, keep_as)

    monkeypatch.setattr(shrinking, "write_atomically", full)
    assert shrink(source, tmp_path / "small", "--threads", "1") == 2
    assert "the disk is full" in capsys.readouterr().err
    monkeypatch.setattr(shrinking, "write_atomically", written)
    assert shrink(source, tmp_path / "small") == 0
    assert len(described(tmp_path / "small")) == 9
    assert json.loads((tmp_path / "small" / shrinking.NOTE).read_text())["short_side"] == 32
