"""The 8-bit formats by their bounds: float8 e4m3 (Micikevicius et al. 2022, "FP8 formats for deep learning") and int8."""

import torch

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # int8 without -128, so that it is symmetric
SMALLEST = 1e-12  # a row's largest magnitude counts as this at least, so that a scale and its inverse are finite
