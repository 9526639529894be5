"""Every distillation method between unlike networks: CNN and ViT in any direction, a text encoder and a smaller one.

The cases come from the registry. Losses that compare places of an image are not available for texts and say so.
"""

import copy
import functools
import logging
from dataclasses import fields
from typing import get_origin, get_type_hints

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.backbones import Backbone
from hubtransfer.data import Batch, SingleTask
from hubtransfer.models import (
    ClassificationHead,
    DenseHead,
    MultiLabelHead,
    RegressionHead,
    Teacher,
    TransferModel,
)
from tests.contract.methods import NAMES, cls_of
from tests.methods.steps import changed, run, snapshot
from tests.tiny import batch, tiny_data, tiny_model

DISTILLATION = [name for name in NAMES if ".distillation." in cls_of(name).__module__]
NEEDS_IMAGES = {
    "jacobian": "a derivative in the input, and token numbers have none",
    "sobolev": "a derivative in the input, and token numbers have none",
    "l2t_w": "weights of a map's channels, a mean over places",
    "l2t_ww": "weights of a map's channels, a mean over places",
}
"""Methods that are not available for texts, and what they compare or need."""

TEXTS = [name for name in DISTILLATION if name not in NEEDS_IMAGES]
PAIRED = [name for name in DISTILLATION if "pairs" in [field.name for field in fields(cls_of(name).config_class)]]
CNN, VIT = "timm/test_resnet", "timm/test_vit"
SIDE = 32


@functools.cache
def made(name: str, seed: int, **options: int) -> TransferModel:
    torch.manual_seed(seed)
    backbone = Backbone.from_pretrained(name, pretrained=False, **options)
    return TransferModel(backbone).add_task("task", ClassificationHead(3))


def network(name: str, seed: int) -> TransferModel:
    return copy.deepcopy(made(name, seed, image_size=SIDE))


def encoder(layers: int, width: int, seed: int) -> TransferModel:
    sizes = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    return copy.deepcopy(made("bert", seed, num_hidden_layers=layers, **sizes))


def encoders() -> tuple[TransferModel, Teacher]:
    return encoder(2, 16, 0), Teacher(encoder(4, 24, 1))


def images(n: int = 6) -> SingleTask:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(n, 3, SIDE, SIDE, generator=generator)
    return SingleTask(train={"pixel_values": pixels, "labels": torch.arange(n) % 3})


def texts() -> SingleTask:
    words = [[2, 7, 8, 9, 3], [2, 11, 3], [2, 4, 5, 3], [2, 12, 13, 14, 15, 3], [2, 9, 3], [2, 7, 3]]
    return SingleTask(train={"input_ids": words, "labels": torch.arange(6) % 3})


@pytest.mark.parametrize(("teacher", "student"), [(CNN, CNN), (VIT, CNN), (CNN, VIT)])
@pytest.mark.parametrize("name", DISTILLATION)
def test_a_step_between_networks_of_images(name, teacher, student):
    method = cls_of(name)(network(student, 0), Teacher(network(teacher, 1)))
    before = snapshot(method.model)
    run(method, images(), steps=1, batch_size=6)
    assert any(key.startswith("backbone.trunk") for key in changed(before, method.model))


@pytest.mark.parametrize("name", TEXTS)
def test_a_step_from_a_text_encoder_to_a_smaller_one(name):
    method = cls_of(name)(*encoders())
    before = snapshot(method.model)
    run(method, texts(), steps=1, batch_size=6)
    assert any(key.startswith("backbone.trunk") for key in changed(before, method.model))


@pytest.mark.parametrize("name", NEEDS_IMAGES)
def test_losses_that_are_not_available_for_texts_say_so(name):
    with pytest.raises(ValueError, match=r"not available for texts|text.s token ids"):
        cls_of(name)(*encoders())


@pytest.mark.parametrize("name", TEXTS)
def test_padding_does_not_count(name):
    """Every loss of every stage is the same for two texts as for the same texts with four further padded places."""
    method = cls_of(name)(*encoders()).double().eval()
    ids = torch.tensor([[2, 7, 8, 9, 3], [2, 11, 3, 0, 0], [2, 4, 5, 3, 0]])
    mask = (ids != 0).long()

    def losses(padding: int) -> list[dict[str, torch.Tensor]]:
        one = copy.deepcopy(method)
        inputs = {"input_ids": F.pad(ids, (0, padding)), "attention_mask": F.pad(mask, (0, padding))}
        batch = Batch(inputs, labels=torch.tensor([0, 1, 2]), index=torch.arange(3), size=3)
        torch.manual_seed(0)
        return [update.loss(batch.replace()) for stage in one.stages(texts()) for update in stage.updates]

    for short, long in zip(losses(0), losses(4), strict=True):
        assert short.keys() == long.keys()
        for key in short:
            torch.testing.assert_close(short[key], long[key], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", DISTILLATION)
def test_a_list_of_one_teacher_is_that_teacher_and_several_are_all_used_or_refused(name):
    def losses(*seeds, listed=True):
        torch.manual_seed(0)
        teachers = [Teacher(tiny_model(seed=seed)) for seed in seeds]
        method = cls_of(name)(tiny_model(), teachers if listed else teachers[0])
        stages = list(method.stages(SingleTask(train=tiny_data())))
        torch.manual_seed(0)
        found = [stage.updates[0].loss(batch(index=[0, 1, 2], size=24)) for stage in stages]
        return torch.stack([sum(terms.values()) for terms in found]).detach()

    assert torch.equal(losses(8), losses(8, listed=False))
    if get_origin(get_type_hints(cls_of(name).__init__)["teacher"]) is None:
        with pytest.raises(ValueError, match=r"takes one teacher, got 2; .*\(model, a\) \+ "):
            losses(8, 9)
    else:
        assert not torch.equal(losses(8, 9), losses(8))


HEADS = {
    "regression": RegressionHead(3),
    "one number": RegressionHead(1),
    "multi_label": MultiLabelHead(3),
    "dense": DenseHead(3),
    "no head": None,
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["kd", "sobolev", "lwf_transfer"])
def test_answers_that_are_no_classes_are_not_softened(name, head):
    student, teacher = (tiny_model(seed=seed).add_task("other", HEADS[head]) for seed in (0, 9))
    with pytest.raises(ValueError, match=r"'other' predicts .*need a head of classes; compare pooled features"):
        cls_of(name)(student, Teacher(teacher))


def named_pairs(name: str, teacher: Backbone, student: Backbone) -> tuple[tuple[str, str], ...]:
    """Pairs that no rule chooses: the teacher's first layers with the student's last ones."""
    chosen = list(zip([layer.name for layer in teacher.layers], [layer.name for layer in student.layers][-2:]))
    return tuple(chosen[:2] if name == "fsp" else chosen[:1])


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_are_logged_once_and_may_be_named(name, caplog):
    student, teacher = network(CNN, 0), network(VIT, 1)
    pairs = named_pairs(name, teacher.backbone, student.backbone)
    with caplog.at_level(logging.INFO, logger="hubtransfer"):
        method = cls_of(name)(student, Teacher(teacher), pairs=pairs)
    said = ", ".join(f"{theirs} -> {own}" for theirs, own in pairs)
    assert str(method.pairs) == said
    assert [said in record.getMessage() for record in caplog.records if "compares" in record.getMessage()] == [True]
    run(method, images(), steps=1, batch_size=6)


@pytest.mark.parametrize("name", PAIRED)
def test_chosen_pairs_are_logged(name, caplog):
    options = {"pairs": "single"} if name == "sp" else {}
    with caplog.at_level(logging.INFO, logger="hubtransfer"):
        method = cls_of(name)(network(CNN, 0), Teacher(network(CNN, 1)), **options)
    assert [r.getMessage() for r in caplog.records if str(method.pairs) in r.getMessage()]


@pytest.mark.parametrize("name", PAIRED)
def test_layers_that_do_not_exist_are_named_beside_those_that_do(name):
    student, teacher = network(CNN, 0), network(CNN, 1)
    known = student.backbone.layers[-1].name
    with pytest.raises(ValueError, match=rf"'nowhere'.*{known}"):
        cls_of(name)(student, Teacher(teacher), pairs=(("nowhere", known), (known, known)))


@pytest.mark.parametrize("name", PAIRED)
def test_without_a_layer_to_pair_the_layers_there_are_are_listed(name):
    options = {"pairs": "single"} if name == "sp" else {}
    student, teacher = network(CNN, 0), network(CNN, 1)
    known = teacher.backbone.layers[0].name
    student.backbone.layers.clear()
    with pytest.raises(ValueError, match=rf"the student .*Layers of the student: none; teacher 0: {known}"):
        cls_of(name)(student, Teacher(teacher), **options)


@pytest.mark.parametrize("name", DISTILLATION)
def test_a_teacher_that_shares_parameters_and_a_model_that_is_no_teacher_are_refused(name):
    student = network(CNN, 0)
    with pytest.raises(ValueError, match=r"share the parameter .*copy\.deepcopy"):
        cls_of(name)(student, Teacher(student))
    with pytest.raises(TypeError, match=r"as Teacher\(model\)"):
        cls_of(name)(student, network(CNN, 1))


OFFICIAL = {
    "kd": {"temperature": 4.0, "alpha": 0.9},
    "fitnet": {"beta": 100.0},
    "attention_transfer": {"beta": 1000.0, "form": "code"},
    "sp": {"weight": 3000.0},
    "vid": {"beta": 1.0, "variance": 5.0},
    "rkd": {"distance": 25.0, "angle": 50.0},
    "pkt": {"weight": 30000.0},
    "ft": {"beta": 500.0, "rate": 0.5},
    "ab": {"margin": 1.0, "beta": 3e-3},
    "fsp": {"beta": 50.0},
    "nst": {"beta": 100.0},  # half of it is the weight
    "crd": {"weight": 0.8, "negatives": 16384, "temperature": 0.07, "momentum": 0.5, "dim": 128},
    "dark_rank": {"alpha": 3.0, "beta": 3.0},
}
"""The standard benchmark's settings (of FT the paper's, whose loss the benchmark does not compute)."""


@pytest.mark.parametrize("name", OFFICIAL)
def test_defaults_are_the_official_ones(name):
    config = cls_of(name).config_class()
    assert {key: getattr(config, key) for key in OFFICIAL[name]} == OFFICIAL[name]
