"""A run with a teacher leaves pictures in the run's folder, in the model's card and in the report; others do not."""

import json

import pytest
import torch

from hubtransfer.data import SingleTask
from hubtransfer.evaluation.report import read_run, to_markdown
from hubtransfer.methods.distillation.feature_matching import FeatureMatching
from hubtransfer.methods.distillation.kd import KD
from hubtransfer.methods.distillation.l2t_ww import L2TWW
from hubtransfer.methods.finetuning.fine_tune import FineTune
from hubtransfer.models import Teacher
from hubtransfer.training import Trainer
from hubtransfer.training.views import _of_several_classes
from tests.methods.steps import settings
from tests.tiny import batch, tiny_data, tiny_model

PICTURES = {"attention_maps.png", "logit_correlations.png"}


def data(evaluation=True):
    return SingleTask(train=tiny_data(24), evaluation=tiny_data(24, seed=1) if evaluation else None)


def kd(classes=3, **options):
    torch.manual_seed(0)
    return KD(tiny_model(classes), Teacher(tiny_model(classes, seed=4)), **options)


def trained(method, folder, scenario=None, **changes):
    changes = {"plots": True, "save": "stage", "steps": 2} | changes
    Trainer(method, scenario or data(), settings(output_dir=str(folder), **changes)).train()
    return {file.name for file in folder.glob("*.png")} & PICTURES


def test_the_pictures_are_in_the_runs_folder_the_card_and_the_report(tmp_path):
    image = pytest.importorskip("PIL.Image")
    assert trained(kd(), tmp_path) == PICTURES
    card, report = (tmp_path / "model" / "README.md").read_text(), to_markdown(read_run(tmp_path))
    for name in PICTURES:
        for folder in (tmp_path, tmp_path / "model"):
            picture = image.open(folder / name).convert("RGB")
            assert min(picture.size) > 200
            assert len(picture.getcolors(maxcolors=1 << 24)) > 50  # something is drawn
        assert f"]({name})" in card
        assert f"]({name})" in report
    assert set(json.loads((tmp_path / "results.json").read_text())["plots"]) >= PICTURES


def test_sums_and_methods_that_are_no_sums_have_them(tmp_path):
    one = kd()
    both = one + FeatureMatching(one.model, one.teacher, pairs="all_to_all")
    assert trained(both, tmp_path / "sum") == PICTURES
    source = Teacher(tiny_model(5, seed=4))
    assert trained(L2TWW(tiny_model(), [source]), tmp_path / "other classes") == {"attention_maps.png"}


def test_without_teacher_layers_or_data_there_are_none(tmp_path):
    assert trained(FineTune(tiny_model()), tmp_path / "no teacher") == set()
    assert trained(kd(), tmp_path / "no data", data(evaluation=False)) == set()
    assert trained(kd(), tmp_path / "no plots", plots=False) == set()
    bare = kd()
    bare.teacher.model.backbone.layers.clear()
    assert trained(bare, tmp_path / "no layers") == {"logit_correlations.png"}


def test_drawing_changes_nothing(tmp_path):
    states = []
    for plots in (True, False):
        method = kd()
        trained(method, tmp_path / str(plots), plots=plots)
        states.append(method.state_dict())
        assert len(method.teacher.cache._tables) == 1  # the training set's: evaluation images are not kept
        assert method.model.training
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_images_of_unlike_classes_are_shown():
    chosen = _of_several_classes(batch([1, 1, 1, 0, 0, 2, 2], index=range(7)))
    assert chosen.index.tolist() == [0, 3, 5, 1]
