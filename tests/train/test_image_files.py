"""One image file, decoded."""

import pytest

from fastdeit.train import image_files


def test_whatever_the_decoder_raises_names_the_image(tmp_path, monkeypatch):
    """PIL raises SyntaxError for a broken PNG, and others for other formats."""

    def broken(path):
        raise SyntaxError("broken PNG file")

    monkeypatch.setattr(image_files.Image, "open", broken)
    with pytest.raises(ValueError, match=r"a\.png: cannot be read as an image: SyntaxError: broken PNG file"):
        image_files.read_image(tmp_path / "a.png", "L")
