"""Layers of text encoders: which are paired, and that padding never counts."""

import pytest
import torch
import torch.nn.functional as F

import hubtransfer as ht
from hubtransfer.data import Batch
from hubtransfer.methods.feature_pairs import FeaturePairs
from hubtransfer.models import ClassificationHead, Teacher, TransferModel


def encoder(layers, width=16):
    sizes = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    backbone = ht.Backbone.from_pretrained("bert", pretrained=False, num_hidden_layers=layers, **sizes)
    return TransferModel(backbone).add_task("task", ClassificationHead(2)).eval()


def words(padding=0):
    """Two sentences of 5 and 3 words, and `padding` further places."""
    ids = torch.tensor([[2, 7, 8, 9, 3], [2, 11, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return Batch({"input_ids": F.pad(ids, (0, padding)), "attention_mask": F.pad(mask, (0, padding))})


def maps(student, pairs, batch):
    output = student(**batch.inputs, layers=pairs.layers)
    return pairs.teacher_maps(batch), pairs.own_maps(output.features.maps, batch)


def test_each_layer_has_one_of_the_teachers_and_the_last_the_last():
    student, teacher = encoder(3), Teacher(encoder(6))
    pairs = FeaturePairs(student.backbone, [teacher], "one_to_one", texts="tokens")
    layers = [pair.theirs.name for pair in pairs.pairs]
    assert layers == ["encoder.layer.0", "encoder.layer.2", "encoder.layer.5"]  # floor(i * 6 / 3), and the last
    assert [pair.own.name for pair in pairs.pairs] == [f"encoder.layer.{k}" for k in range(3)]
    assert len(FeaturePairs(student.backbone, [teacher], "single", texts="tokens")) == 1


def test_words_are_examples_and_padding_is_none():
    student, teacher = encoder(2), Teacher(encoder(4, width=24))
    pairs = FeaturePairs(student.backbone, [teacher], "one_to_one", texts="tokens")
    short, long = words(), words(padding=4)
    for here, there in zip(maps(student, pairs, short), maps(student, pairs, long)):
        for one, two in zip(here, there):
            assert one.shape[0] == 8
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    ((_, theirs), (_, own)) = maps(student, pairs, short)
    assert (theirs.shape, own.shape) == ((8, 24, 1, 1), (8, 16, 1, 1))
    # in the order of the sentences: word k of the first is row k
    whole = student(**short.inputs, layers=("encoder.layer.1",)).features.maps["encoder.layer.1"]
    assert torch.equal(own[:, :, 0, 0], torch.cat([whole[0], whole[1, :3]]))


def test_texts_are_refused_where_a_loss_compares_places():
    with pytest.raises(ValueError, match="the student .text. has no feature maps of images"):
        FeaturePairs(encoder(1).backbone, [Teacher(encoder(2))], "single")
