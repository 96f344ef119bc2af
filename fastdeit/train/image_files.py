"""Files of images: which of a folder they are, and one of them decoded."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions


def images_below(folder: Path) -> Iterator[Path]:
    """The images in a folder and in those within it, by their endings, in no particular order."""
    extensions = get_img_extensions()
    return (path for path in folder.rglob("*") if path.suffix.lower() in extensions)


def no_image(folder: Path) -> str:
    """What to say where `images_below` finds nothing."""
    return f"{folder} has no image ({', '.join(get_img_extensions())})"


def read_image(path: Path, mode: str) -> Image.Image:
    """In PIL's `mode`. Raises ValueError naming path if it is not a whole image."""
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except Exception as error:  # what PIL raises depends on the format and on where the file is damaged
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error
