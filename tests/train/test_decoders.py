"""Decoders give Pillow's pixels of every kind of file, in whole and in part; what cannot be read is an error on each of them."""

import io

import numpy as np
import pytest
from PIL import Image

from fastdeit.benchmarks.photographs import fitted, photographs
from fastdeit.train import decoders
from fastdeit.train.checkpoints import check_same_run
from fastdeit.train.config import Config
from fastdeit.train.config_checks import DECODERS
from fastdeit.train.datasets import load_validation
from fastdeit.train.decoders import Box, create_decoder, is_installed, resolved_decoder
from fastdeit.train.image_sources import DecodedImage, EncodedJpeg, image_source
from fastdeit.train.jpeg_header import common_jpeg

BOXES = (Box(50, 40, 200, 100), Box(0, 0, 1, 1), Box(299, 224, 1, 1), Box(16, 0, 17, 225), Box(3, 210, 200, 15), None)


@pytest.fixture(params=[name for name in DECODERS if name != "pillow"])
def decoder(request):
    if not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    return create_decoder(request.param)


def encoded(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PHOTOGRAPH = fitted(300, 225)[0]
TURNED = Image.Exif()
TURNED[0x112] = 6
FILES = {
    "4:2:0": encoded(PHOTOGRAPH, quality=90),
    "4:2:2": encoded(PHOTOGRAPH, quality=75, subsampling=1),
    "4:4:4": encoded(PHOTOGRAPH, quality=95, subsampling=0),
    "grey": encoded(PHOTOGRAPH.convert("L"), quality=90),
    "progressive": encoded(PHOTOGRAPH, quality=90, progressive=True),
    "restarts": encoded(PHOTOGRAPH, quality=90, restart_marker_blocks=7),
    "turned by EXIF": encoded(PHOTOGRAPH, quality=90, exif=TURNED),
    "CMYK": encoded(PHOTOGRAPH.convert("CMYK"), quality=90),
    "RGB as it is": encoded(PHOTOGRAPH, quality=90, keep_rgb=True),
    "with something behind it": encoded(PHOTOGRAPH, quality=90) + b"\0" * 7,
    "PNG": encoded(PHOTOGRAPH, "PNG"),
    "PNG with a palette": encoded(PHOTOGRAPH.convert("P"), "PNG"),
    "PNG with alpha": encoded(PHOTOGRAPH.convert("RGBA"), "PNG"),
    "WebP": encoded(PHOTOGRAPH, "WEBP"),
}
COMMON = ("4:2:0", "4:2:2", "4:4:4", "grey", "progressive", "restarts", "turned by EXIF")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_pillows(kind, mode, decoder):
    with Image.open(io.BytesIO(FILES[kind])) as image:
        expected = np.asarray(image.convert(mode)).reshape(225, 300, -1)
    source = image_source(FILES[kind], mode, decoder)
    assert (source.width, source.height) == (300, 225)
    assert isinstance(source, EncodedJpeg if kind in COMMON else DecodedImage)
    for box in BOXES:
        left, top, width, height = box or (0, 0, 300, 225)
        part = expected[top : top + height, left : left + width]
        assert np.array_equal(np.asarray(source.image(box)).reshape(part.shape), part), box
        assert source.image(box).mode == mode
        if box is not None:
            assert np.array_equal(source.array(box), part), box


@pytest.mark.parametrize("kind", COMMON)
def test_common_files_do_not_go_to_pillow(kind, decoder, monkeypatch):
    monkeypatch.setattr("fastdeit.train.image_sources.open_image", None)
    for box in BOXES:
        image_source(FILES[kind], "RGB", decoder).image(box)


def test_whole_photographs(decoder):
    for image in photographs():
        data = encoded(image, quality=92)
        with Image.open(io.BytesIO(data)) as expected:
            assert np.array_equal(np.asarray(image_source(data, "RGB", decoder).image()), np.asarray(expected))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_an_error_wherever_the_crop_lies(share, decoder):
    data = FILES["4:2:0"][: int(share * len(FILES["4:2:0"]))]
    with pytest.raises(Exception) as by_pillow, Image.open(io.BytesIO(data)) as image:
        image.convert("RGB")
    with pytest.raises(by_pillow.type):
        image_source(data, "RGB", decoder).image(Box(0, 0, 8, 8))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff\xd9", b"no image", FILES["4:2:0"][:40] + b"\xff\xd9"])
def test_what_is_no_image_is_an_error_that_is_always_the_same(data, decoder):
    messages = set()
    for _ in range(2):
        with pytest.raises(OSError) as raised:
            image_source(data, "RGB", decoder).image()
        messages.add(str(raised.value))
    assert len(messages) == 1


@pytest.mark.parametrize("place", [0.4, 0.5, 0.7])
def test_pixels_of_a_damaged_file_are_pillows_where_it_gives_any(place, decoder):
    data = bytearray(FILES["4:4:4"])
    at = int(place * len(data))
    data[at : at + 2] = b"\x5a\xa5"
    with Image.open(io.BytesIO(bytes(data))) as image:
        expected = np.asarray(image.convert("RGB"))
    assert not np.array_equal(expected, np.asarray(image_source(FILES["4:4:4"], "RGB", None).image()))
    assert np.array_equal(np.asarray(image_source(bytes(data), "RGB", decoder).image()), expected)


def test_a_decoder_that_fails_leaves_the_file_to_pillow():
    class Failing:
        def decode(self, data, header, box):
            raise RuntimeError("of its own kind")

    class OfAnotherShape:
        def decode(self, data, header, box):
            return np.zeros((1, 2, 3), np.uint8)

    with Image.open(io.BytesIO(FILES["4:2:0"])) as image:
        expected = np.asarray(image)[40:140, 50:250]
    for one in (Failing(), OfAnotherShape()):
        assert np.array_equal(np.asarray(image_source(FILES["4:2:0"], "RGB", one).image(BOXES[0])), expected)


def test_headers():
    assert common_jpeg(FILES["4:2:0"]) == (300, 225, 3) and common_jpeg(FILES["grey"]) == (300, 225, 1)
    data = FILES["4:2:0"]
    frame = data.index(b"\xff\xc0")
    for place, value in (
        (frame + 1, 0xC9),  # arithmetic coding
        (frame + 1, 0xC3),  # lossless
        (frame + 4, 12),  # bits
        (frame + 9, 4),  # components
        (frame + 11, 0x41),  # sampling of luma
        (frame + 14, 0x21),  # of chroma
    ):
        changed = bytearray(data)
        changed[place] = value
        assert common_jpeg(bytes(changed)) is None
    assert common_jpeg(data[:frame] + b"\xff\xff" + data[frame:]) == (300, 225, 3)  # fill bytes


def test_the_first_that_is_installed(monkeypatch):
    monkeypatch.setattr(decoders, "is_installed", lambda name: name in ("torchvision", "pillow"))
    assert resolved_decoder(Config()) == "torchvision" and resolved_decoder(Config(decoder="pillow")) == "pillow"
    with pytest.raises(
        ImportError, match="decoder: simplejpeg is not installed: pip install simplejpeg, or set decoder to auto"
    ):
        resolved_decoder(Config(decoder="simplejpeg"))


def test_a_missing_decoder_stops_a_run_before_it_starts(make_small_config, monkeypatch, tmp_path):
    from fastdeit.train import run

    monkeypatch.setattr(decoders, "is_installed", lambda name: name == "pillow")
    with pytest.raises(ImportError, match="decoder: nvimgcodec is not installed: pip install nvidia-nvimgcodec-cu12"):
        run.train(make_small_config(decoder="nvimgcodec"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluation_does_without_the_decoder_of_the_run(make_small_config, monkeypatch, capsys):
    monkeypatch.setattr(decoders, "is_installed", lambda name: name == "pillow")
    images, _ = load_validation(make_small_config(decoder="simplejpeg"))
    assert images.decoder is None and len(images) == 24
    said = capsys.readouterr().err
    assert (
        said
        == "decoder: simplejpeg, which the run used, is not installed; pillow decodes here, and pixels may differ\n"
    )
    for decoder in ("auto", "pillow"):
        load_validation(make_small_config(decoder=decoder))
    load_validation(make_small_config(decoder="simplejpeg", data="digits"))  # in memory
    assert capsys.readouterr().err == ""


def test_a_run_is_resumed_with_its_decoder_alone(make_small_config, tmp_path):
    state = {"config": make_small_config(decoder="simplejpeg").as_dict(), "epoch": 0}
    with pytest.raises(ValueError, match=r"another configuration: decoder \('simplejpeg' there, 'pillow' now\)$"):
        check_same_run(state, make_small_config(decoder="pillow"), tmp_path)
    check_same_run(state, make_small_config(decoder="simplejpeg"), tmp_path)
