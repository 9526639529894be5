"""Markers of missing labels, whatever type the labels are kept in."""

import pytest
import torch

from hubtransfer.functional.missing import known_classes, known_pixels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_class_numbers_above_127_are_known_in_bytes_too(dtype):
    """156 and 255 have the bits of -100 and -1; no byte marks a missing class, and 255 alone marks a pixel."""
    labels = torch.tensor([0, 156, 255], dtype=dtype)
    assert known_classes(labels).tolist() == [True, True, True]
    assert known_pixels(labels[None, None]).tolist() == [[[True, True, False]]]


def test_signed_bytes_can_hold_the_markers():
    labels = torch.tensor([3, -1, -100], dtype=torch.int8)
    assert known_classes(labels).tolist() == [True, False, False]
    assert known_pixels(labels[None, None]).tolist() == [[[True, False, False]]]
