"""One image file, decoded: of any mode that photographs and scans come in, of any size that is allowed."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastdeit.commands import cli
from fastdeit.train import image_files
from fastdeit.train.image_files import UnreadableImageError, open_image, read_image


def test_whatever_the_decoder_raises_names_the_image(tmp_path, monkeypatch):
    """PIL raises SyntaxError for a broken PNG, and others for other formats."""

    def broken(path):
        raise SyntaxError("broken PNG file")

    monkeypatch.setattr(image_files.Image, "open", broken)
    with pytest.raises(UnreadableImageError, match=r"a\.png: cannot be read as an image: SyntaxError: broken PNG file"):
        read_image(tmp_path / "a.png", "L")


def png(rows, bits, kind, palette=b"") -> io.BytesIO:
    """A PNG file of raw rows; kind is PNG's color type."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    width = len(rows[0]) * 8 // bits // samples
    header = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    parts = [chunk(b"IHDR", header), *([chunk(b"PLTE", palette)] if palette else []), chunk(b"IDAT", data)]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))


def sixteen(*values) -> bytes:
    return np.array(values, ">u2").tobytes()


RAMP = (0, 128, 129, 257, 32768, 65406, 65407, 65535)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_sixteen_bits_of_grey_are_scaled_to_the_nearest_of_eight(mode):
    image = open_image(png([sixteen(*RAMP)], 16, 0), mode)
    assert image.mode == mode
    expected = [round(value / 257) for value in RAMP]
    assert expected == [0, 0, 1, 1, 128, 254, 255, 255]
    assert np.asarray(image.convert("L"))[0].tolist() == expected


def test_every_sixteen_bit_value_is_rounded_right():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = np.asarray(image_files.eight_bits(Image.fromarray(values)))
    assert np.array_equal(found, np.rint(values / 257).astype(np.uint8))


@pytest.mark.parametrize("format", ["TIFF", "PNG", "JPEG2000"])
def test_sixteen_bits_of_grey_in_other_formats(format):
    file = io.BytesIO()
    Image.fromarray(np.array([RAMP] * 8, np.uint16)).save(file, format)
    assert np.asarray(open_image(file, "L"))[0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]


def test_a_grey_map_of_more_than_eight_bits_is_scaled():
    file = io.BytesIO(b"P5 3 1 1023\n" + np.array([0, 512, 1023], ">u2").tobytes())
    assert np.asarray(open_image(file, "L"))[0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    "file, mode, expected",
    [
        (png([sixteen(65535, 0, 32768)], 16, 2), "RGB", [[255, 0, 128]]),  # one pixel of 16-bit RGB
        (png([sixteen(32768, 0, 65535, 65535)], 16, 4), "L", [128, 255]),  # grey with alpha: the grey, alpha is dropped
        (png([bytes([128, 0, 255, 255])], 8, 4), "RGB", [[128] * 3, [255] * 3]),
        (png([bytes([1, 2, 3, 0])], 8, 6), "RGB", [[1, 2, 3]]),
        (png([bytes([0b10100000])], 1, 0), "L", [255, 0, 255, 0, 0, 0, 0, 0]),
        (png([bytes([0b00011011])], 2, 0), "L", [0, 85, 170, 255]),
        (png([bytes([0x0F, 0x18])], 4, 0), "L", [0, 255, 17, 136]),
        (png([bytes([0b00011011])], 2, 3, bytes(range(12))), "RGB", [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),
        (png([bytes([1, 0])], 8, 3, bytes([10, 10, 10, 200, 200, 200])), "L", [200, 10]),
    ],
    ids=["rgb16", "la16", "la8", "rgba8", "1", "2", "4", "palette2", "palette8"],
)
def test_neighbours_of_sixteen_bits_stay_right(file, mode, expected):
    assert np.asarray(open_image(file, mode))[0].tolist() == expected


def four_inks(first, transform) -> io.BytesIO:
    """A JPEG file whose four components are first, as CMYK or, with transform 2, as YCCK."""
    file = io.BytesIO()
    Image.merge("CMYK", [Image.new("L", (16, 16), value) for value in first]).save(file, "JPEG", quality=100)
    data = bytearray(file.getvalue())
    data[data.index(b"Adobe") + 11] = transform
    return io.BytesIO(bytes(data))


def test_cmyk_and_ycck_become_the_colours_that_they_print():
    assert np.asarray(open_image(four_inks((0, 255, 255, 0), 0), "RGB"))[8, 8].tolist() == [255, 0, 0]
    # Both writer and Adobe's convention invert inks: the file has luma 255 - 80 without chroma, hence three inks of 175, no black
    found = np.asarray(open_image(four_inks((80, 127, 127, 0), 2), "RGB"))[8, 8].astype(int)
    assert abs(found - 80).max() <= 2


@pytest.mark.parametrize("image", [Image.new("F", (2, 2), 0.5), Image.new("I", (2, 2), 70000)], ids=lambda i: i.mode)
def test_an_image_without_a_white_is_refused(image, tmp_path):
    image.save(tmp_path / "a.tiff")
    with pytest.raises(
        UnreadableImageError, match=rf"a\.tiff: .*mode {image.mode} \(TIFF\) does not say which value is"
    ):
        read_image(tmp_path / "a.tiff", "L")


def test_two_hundred_megapixels_are_read_or_refused_by_the_limit(tmp_path, small_checkpoint, capsys):
    """Pillow's own limit, which holds for the process, refuses them; it is as it was afterwards."""
    before = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "large.png"
    Image.new("1", (20_000, 10_000), 1).save(path)
    assert open_image(path, "L").size == (20_000, 10_000)
    with pytest.raises(
        UnreadableImageError, match=r"20000x10000 are 200\.0 megapixels, max_image_megapixels is 199\.5"
    ):
        read_image(path, "L", 199.5)
    call = ["predict", str(path), "--checkpoint", str(small_checkpoint), "--max-image-megapixels"]
    assert cli.main([*call, "150"]) == 2
    assert "large.png" in (err := capsys.readouterr().err) and "max_image_megapixels is 150" in err
    assert (
        cli.main([*call, "nan"]) == 2
        and "max_image_megapixels: expected a value more than 0" in capsys.readouterr().err
    )
    assert before == Image.MAX_IMAGE_PIXELS == 89_478_485


def test_a_damaged_image_leaves_pillows_limit_as_it_was(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableImageError):
        read_image(tmp_path / "a.png", "L")
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
