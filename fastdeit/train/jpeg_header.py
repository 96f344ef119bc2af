"""The header of a JPEG file: its size, and whether it is of the common kind that every decoder decodes alike."""

import struct
from typing import NamedTuple

_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: Huffman-coded, 8 bits unless the frame says otherwise
# Lossless, arithmetic, hierarchical.
_OTHER_FRAMES = frozenset((0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_SAMPLINGS = (0x11, 0x12, 0x21, 0x22)  # luma beside chroma of 0x11
_WITHOUT_CONTENT = frozenset((0x01, *range(0xD0, 0xD8)))
_START_OF_SCAN, _ADOBE = 0xDA, 0xEE
_END = b"\xff\xd9"


class JpegHeader(NamedTuple):
    width: int
    height: int
    components: int  # 1 for grey, 3 for colour


def common_jpeg(data: bytes) -> JpegHeader | None:
    """The header of a complete JPEG of 8-bit grey or YCbCr; None for everything else.

    A file that was cut off lacks the marker at its end. One with something behind that marker is None, too.
    """
    if not (data.startswith(b"\xff\xd8\xff") and data.endswith(_END)):
        return None
    at = 2
    found = None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or marker in _WITHOUT_CONTENT:  # fill bytes
            at += 1 if marker == 0xFF else 2
            continue
        if marker == _START_OF_SCAN:
            return found
        start, at = at + 4, at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker in _FRAMES:
            found = _frame(data[start:at])
            if found is None:
                return None
        elif marker in _OTHER_FRAMES or (marker == _ADOBE and _is_untransformed(data[start:at])):
            return None
    return None


def _is_untransformed(adobe: bytes) -> bool:
    """Whether Adobe's segment says that the file has RGB or CMYK as it is."""
    return adobe.startswith(b"Adobe") and adobe[11:12] == b"\x00"


def _frame(content: bytes) -> JpegHeader | None:
    if len(content) < 6:
        return None
    bits, height, width, components = struct.unpack_from(">BHHB", content)
    ids, samplings = content[6 : 6 + 3 * components : 3], content[7 : 6 + 3 * components : 3]
    if bits != 8 or not (height and width) or components not in (1, 3) or len(samplings) != components:
        return None
    if components == 3 and (ids == b"RGB" or samplings[0] not in _SAMPLINGS or samplings[1:] != b"\x11\x11"):
        return None
    return JpegHeader(width, height, components)
