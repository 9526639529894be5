"""Plateaus: a whole curve by hand, with a plateau, a peak and another plateau."""

import torch

from hubtransfer.functional.plateau import Plateau, plateau

NOTHING = Plateau(False, True, 0.0, 0.0)


def test_a_curve_by_hand():
    # windows of two: means 1.5, 0.6, 0.15, 0.1, 0.3, 0.55, 0.3, 0.1
    losses = [2.0, 1.0, 0.2, 0.1, 0.1, 0.5, 0.6, 0.0, 0.2]
    said, found = NOTHING, []
    for end in range(2, len(losses) + 1):
        said = plateau(torch.tensor(losses[end - 2 : end]), said, mean_below=0.2, variance_below=0.05)
        found.append((said.found, said.armed))
    # settles at 0.15 with deviation 0.05, is not found again at 0.1, is armed by 0.3 > 0.2, settles again at 0.1
    assert found == [
        (False, True),
        (False, True),
        (True, False),
        (False, False),
        (False, True),
        (False, True),
        (False, True),
        (True, False),
    ]


def test_what_still_moves_is_no_plateau():
    window = torch.tensor([0.0, 0.3])  # mean 0.15, variance 0.0225
    assert not plateau(window, NOTHING, 0.2, 0.02).found
    assert plateau(window, NOTHING, 0.2, 0.03) == Plateau(
        True, False, float(window.mean()), float(window.var(correction=0))
    )
