"""Pictures of what a student took from its teacher: where both look, and how their logits go together.

Each function takes tensors and writes one PNG file:

.. code-block:: python

    own = student(pixel_values=x, layers=("layer4",))
    theirs = teacher(Batch({"pixel_values": x}), layers=("layer4",))
    attention_maps(x, theirs.features.maps, own.features.maps, "attention.png")
    logit_correlations(theirs.logits, {"KD": own.logits}, "correlations.png", names=student.labels)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hubtransfer.evaluation.plots import GREY, NAMES_AT_MOST, Path, figure_at
from hubtransfer.functional.attention import attention


def attention_maps(
    images: Tensor,
    teacher: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    path: Path,
    power: float = 2.0,
    titles: tuple[str, str] = ("teacher", "student"),
) -> None:
    """Where a teacher and a student look: for each image a row, for each pair of layers both maps beside one another.

    Drawn is sum_c |A_c|^p, each map scaled to its own largest value, over the image in grey.

    Args:
        images: (n, 1 or 3, height, width) on any scale; each is stretched to black and white.
        teacher: Layer -> maps (n, channels, height, width), shallow to deep. For tokens see
            :func:`~hubtransfer.functional.maps.as_grid`.
        student: The same of the student, as many layers; pair k is both k-th layers.
        path: PNG file to write.
        power: p.
        titles: What the two are called.

    Raises:
        ValueError: the numbers of layers or images differ, or there are none.
    """
    if not teacher or len(teacher) != len(student):
        raise ValueError(f"the teacher has maps of {len(teacher)} layers, the student of {len(student)}: give pairs")
    counts = {len(images), *(len(maps) for maps in (*teacher.values(), *student.values()))}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"images and maps are of different numbers of examples: {sorted(counts)}")
    size = (images.shape[-2], images.shape[-1])
    shown: list[tuple[str, Tensor | None]] = [("image", None)]
    for (one, theirs), (two, own) in zip(teacher.items(), student.items()):
        for who, layer, maps in ((titles[0], one, theirs), (titles[1], two, own)):
            found = attention(maps.detach().float().cpu(), power)
            found = F.interpolate(found[:, None], size, mode="bilinear", align_corners=False)[:, 0]
            shown.append((f"{who}\n{layer}", found / found.amax((1, 2), keepdim=True).clamp_min(1e-12)))
    grey = images.detach().float().cpu().mean(1)
    low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
    grey = (grey - low) / (high - low).clamp_min(1e-12)
    with figure_at(path, 1.5 * len(shown), 1.5 * len(images) * size[0] / size[1] + 0.6) as figure:
        axes = figure.subplots(len(images), len(shown), squeeze=False)
        for row in range(len(images)):
            for axis, (title, heat) in zip(axes[row], shown):
                axis.imshow(grey[row].numpy(), cmap="gray", vmin=0, vmax=1)
                if heat is not None:
                    axis.imshow(heat[row].numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.65)
                axis.set_axis_off()
                if row == 0:
                    axis.set_title(title, loc="center", fontsize=9)


def logit_correlations(
    teacher: Tensor,
    students: Mapping[str, Tensor],
    path: Path,
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    r"""How far a student's logits go together otherwise than the teacher's: as in the figures of the CRD paper.

    .. math:: D = \mathrm{corr}(v) - \mathrm{corr}(z)

    with correlations between classes over examples; a student that took over which classes are alike has D near zero.

    Args:
        teacher: Logits v, (examples, classes).
        students: Name -> logits z of the same examples, (examples, classes): a panel for each, one scale for all.
        path: PNG file to write.
        names: Of the classes.

    Returns:
        The mean of \|D\| off the diagonal, for each student.

    Raises:
        ValueError: shapes differ, or there are fewer than two examples.
    """
    wanted = tuple(teacher.shape)
    if len(wanted) != 2 or wanted[0] < 2:
        raise ValueError(f"correlations need logits (examples, classes) of two examples or more, got {wanted}")
    if not students:
        raise ValueError("no students to compare with the teacher")
    for name, logits in students.items():
        if tuple(logits.shape) != wanted:
            raise ValueError(f"logits of {name!r} are {tuple(logits.shape)}, the teacher's {wanted}")
    if names is not None and len(names) != wanted[1]:
        raise ValueError(f"{len(names)} names for {wanted[1]} classes")
    target = correlations(teacher)
    differences = {name: target - correlations(logits) for name, logits in students.items()}
    pairs = max(1, wanted[1] * (wanted[1] - 1))
    means = {name: float(found.abs().sum() / pairs) for name, found in differences.items()}
    largest = max(float(found.abs().max()) for found in differences.values()) or 1.0
    labels = names if names is not None and len(names) <= NAMES_AT_MOST else None
    side = min(5.0, max(2.8, 0.26 * wanted[1])) if labels else 3.4
    room = 0.08 * max(map(len, labels or ("class",)))  # for the names beside and below the first panel
    with figure_at(path, side * len(students) + 1.2 + room, side + 0.8 + room) as figure:
        axes = figure.subplots(1, len(students), squeeze=False)[0]
        for number, (axis, (name, found)) in enumerate(zip(axes, differences.items())):
            image = axis.imshow(found.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
            axis.grid(False)
            title = name.replace(" + ", "\n+ ")
            axis.set_title(f"{title}\nmean |D| = {means[name]:.3f}", loc="center", fontsize=9)
            if labels is not None:
                axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
                axis.set_yticks(range(len(labels)), labels if number == 0 else [""] * len(labels), fontsize=8)
            else:
                axis.set(xlabel="class")
                if number == 0:
                    axis.set_ylabel("class")
            for edge in axis.spines.values():
                edge.set_edgecolor(GREY)
                edge.set_visible(True)
        figure.colorbar(image, ax=list(axes), label="D: teacher's minus student's correlation", shrink=0.8)
    return means


def correlations(logits: Tensor) -> Tensor:
    """Returns the correlations of logits (examples, classes) between classes, (classes, classes), in float64.

    A logit that never changes goes with none, not even itself.

    >>> correlations(torch.tensor([[1.0, 2.0, 5.0], [2.0, 0.0, 5.0], [3.0, -2.0, 5.0]])).round(decimals=6).tolist()
    [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    centred = logits.detach().double().cpu()
    centred = centred - centred.mean(0)
    length = centred.norm(dim=0)
    moving = length > 1e-12
    unit = centred[:, moving] / length[moving]
    found = torch.zeros(len(length), len(length), dtype=torch.float64)
    found[moving.nonzero(), moving.nonzero()[:, 0]] = (unit.T @ unit).clamp(-1, 1)
    return found
