"""The operations of an augmentation plan, by the number that a row of the plan has for each."""

from enum import IntEnum

ROW = 8  # values of a plan's row: the operation, then what each operation says below


class Operation(IntEnum):
    """What a row of a plan does to one image. Unless it says otherwise, an operation takes one argument, `row[2]`.

    From AUTOCONTRAST to BRIGHTNESS an operation maps levels to levels by a table for each channel.
    """

    NONE = 0  # no argument
    AUTOCONTRAST = 1  # no argument
    EQUALIZE = 2  # no argument
    INVERT = 3  # no argument
    POSTERIZE = 4  # bits to keep: 8 or more keep all, 0 or less none
    SOLARIZE = 5  # levels from here on are inverted
    SOLARIZE_ADD = 6  # what is added to levels below 128
    CONTRAST = 7  # factor
    BRIGHTNESS = 8  # factor
    COLOR = 9  # factor
    SHARPNESS = 10  # factor
    AFFINE = 11  # row[1]: 1 for bicubic, 0 for bilinear; row[2:8]: Pillow's matrix, from output to input
