"""Which files of a folder are images, and one of them decoded."""

import pytest

from fastdeit.train import image_files


def test_images_are_known_by_their_endings_wherever_they_are_below_the_folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    images = [tmp_path / "a.png", tmp_path / "B.JPG", tmp_path / "deep" / "er" / "c.jpeg"]
    for path in (*images, tmp_path / "labels.json", tmp_path / "deep" / "png"):
        path.touch()
    assert set(image_files.images_below(tmp_path)) == set(images)


def test_whatever_the_decoder_raises_names_the_image(tmp_path, monkeypatch):
    """PIL raises SyntaxError for a broken PNG, and others for other formats."""

    def broken(path):
        raise SyntaxError("broken PNG file")

    monkeypatch.setattr(image_files.Image, "open", broken)
    with pytest.raises(ValueError, match=r"a\.png: cannot be read as an image: broken PNG file"):
        image_files.read_image(tmp_path / "a.png", "L")
