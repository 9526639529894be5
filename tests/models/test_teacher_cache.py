"""What a teacher answered is kept by example number where inputs stay the same, maps too, on disk too; if not, why."""

import re

import pytest
import torch
from torch import nn

from hubtransfer.backbones import Backbone
from hubtransfer.data import Augment, Batch, Loader, MixUp, SingleTask, Source
from hubtransfer.methods.distillation.fitnet import FitNet
from hubtransfer.methods.distillation.jacobian import Jacobian
from hubtransfer.methods.distillation.kd import KD
from hubtransfer.models import ClassificationHead, OutputCache, Teacher, TransferModel
from hubtransfer.training import Checkpoints, Trainer
from tests.methods.steps import run, settings
from tests.tiny import SHAPE, batch, tiny_data, tiny_model

DATA = tiny_data(24)
LAYERS = ("act1", "act2")


def seen(model):
    """Counts the examples that a model's trunk sees."""
    counts = []
    model.backbone.trunk.register_forward_pre_hook(lambda m, args: counts.append(len(args[0])))
    return counts


def some(index, origin="train", size=24):
    return batch(DATA["labels"][index], pixel_values=DATA["pixel_values"][index], index=index, origin=origin, size=size)


def epochs(count, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield from torch.randperm(24, generator=generator).split(size)


def state_of(method):
    return {name: value for name, value in method.state_dict().items() if "cache" not in name}


# -------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("limit", [2 << 30, 1000])
def test_maps_are_kept_in_memory_then_on_disk(limit, tmp_path):
    teacher = Teacher(tiny_model(seed=4), cache=OutputCache(limit=limit, folder=tmp_path))
    plain, counts = Teacher(tiny_model(seed=4), cache=False), seen(teacher.model)
    for index in epochs(3):
        found, expected = teacher(some(index), layers=LAYERS), plain(some(index), layers=LAYERS)
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.features.pooled, expected.features.pooled)
        assert list(found.features.maps) == list(LAYERS)
        for layer in LAYERS:
            torch.testing.assert_close(found.features.maps[layer], expected.features.maps[layer])
    assert sum(counts) == 24
    assert (teacher.cache.bytes() > 0) == (limit > 1000)


def test_answers_with_and_without_maps_do_not_mix():
    teacher = Teacher(tiny_model(seed=4))
    for layers in ((), ("act2",), LAYERS, ("act2", "act1")):
        for _ in range(2):
            found = teacher(some([3, 1]), layers=layers)
            assert set(found.features.maps) == set(layers)
            assert found.logits.shape == (2, 3)
            assert found.features.pooled.shape == (2, 16)


def test_beyond_the_limit_and_without_a_folder_maps_are_computed_and_logits_kept(caplog):
    teacher = Teacher(tiny_model(seed=4), cache=OutputCache(limit=24 * 19 * 4))  # room for 3 logits and 16 features
    counts = seen(teacher.model)
    for index in epochs(2):
        teacher(some(index))
    for index in epochs(2):
        teacher(some(index), layers=LAYERS)
    assert sum(counts) == 24 + 2 * 24
    assert [r for r in caplog.records if "OutputCache(folder=...)" in r.getMessage()] == caplog.records
    assert len(caplog.records) == 1


def test_maps_of_texts_are_computed_as_their_length_is_the_batchs():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    backbone = Backbone.from_pretrained("bert", pretrained=False, num_hidden_layers=1, **sizes)
    teacher = Teacher(TransferModel(backbone).add_task("task", ClassificationHead(2)))
    for length in (5, 3):
        ids = torch.randint(1, 50, (2, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        texts = Batch(inputs, index=torch.arange(2), origin="texts", size=2)
        found = teacher(texts, layers=("encoder.layer.0",)).features.maps["encoder.layer.0"]
        assert found.shape == (2, length, 16)


def test_outputs_of_unequal_shapes_are_given_up(caplog):
    cache = OutputCache()
    for width in (3, 4, 3):
        given = some([0, 1])
        (found,) = cache.outputs(given, lambda inputs, width=width: (torch.zeros(len(inputs["pixel_values"]), width),))
        assert found.shape == (2, width) or width == 4
    assert cache.lookup("train", torch.tensor([0])) is not None  # known rows of the first shape are served
    cache.store("train", torch.tensor([2]), (torch.zeros(1, 9),), size=24)
    assert cache.lookup("train", torch.tensor([0])) is None
    assert "unequal shapes" in caplog.text


def test_a_teachers_jacobians_are_kept():
    student, teacher = tiny_model(), Teacher(tiny_model(seed=4))
    method, counts = Jacobian(student, teacher, pairs="all_to_all", attention=0.0), seen(teacher.model)
    first, backwards = method.teacher_jacobians(some([0, 1, 2])), method.teacher_jacobians(some([2, 1, 0]))
    assert sum(counts) == 3
    for one, two in zip(first, backwards):
        assert torch.equal(one.flip(0), two)
    assert [str(pair.theirs.name) for pair in method.pairs.pairs] == ["act1", "act1", "act2", "act2"]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_a_model_put_into_training_mode_teaches_in_evaluation_mode():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model = TransferModel(Backbone.from_module(network, sample=torch.zeros(1, *SHAPE)))
    teacher = Teacher(model.add_task("t", ClassificationHead(2)), cache=False)
    expected, before = teacher(batch()).logits, network[1].running_mean.clone()
    model.train()
    assert torch.equal(teacher(batch()).logits, expected)
    assert torch.equal(network[1].running_mean, before)
    assert not network[2].training


# ----------------------------------------------------------------------------------------------------- why not


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, k):
        return {"pixel_values": DATA["pixel_values"][k], "labels": int(DATA["labels"][k])}


def stream():
    return iter([Rows()[k] for k in range(24)])


@pytest.mark.parametrize(
    ("data", "augment", "reason"),
    [
        (DATA, Augment(), r"augmented anew in each epoch \(Augment; Augment can store variants\)"),
        (DATA, [Augment(variants=2), MixUp(num_classes=3)], r"augmented anew in each epoch \(MixUp;"),
        (DATA, lambda batch, generator: batch, r"augmented anew in each epoch \(function;"),
        (Rows(), None, "code computes its rows anew"),
        (Rows(), Augment(variants=2), "code computes its rows anew"),
        (stream, None, "come from a stream and have no numbers"),
    ],
)
def test_inputs_that_may_change_are_refused_with_the_reason(data, augment, reason, caplog):
    teacher = Teacher(tiny_model(seed=4))
    counts = seen(teacher.model)
    loader = Loader(Source.of(data, augment=augment), batch_size=6)
    for epoch in range(2):
        for each in loader.batches(epoch):
            assert each.origin is None
            teacher(each)
    assert sum(counts) == 48
    (record,) = caplog.records  # once
    assert re.search(f"computed at each step instead of being cached: .*{reason}", record.getMessage())


def test_a_batch_of_no_data_set_is_refused_with_the_reason(caplog):
    Teacher(tiny_model(seed=4))(batch())
    assert "does not name the unchanging data set" in caplog.text


def test_a_stream_has_no_stored_augmentation():
    with pytest.raises(ValueError, match="needs numbered examples, and a stream has none"):
        next(Loader(Source.of(stream, augment=Augment(variants=2)), batch_size=6).batches(0))


@pytest.mark.parametrize("bad", [0, -1])
def test_variants_are_checked(bad):
    with pytest.raises(ValueError, match="variants must be at least 1"):
        Augment(variants=bad)


# --------------------------------------------------------------------------------------- stored augmentation


def images(loader, epoch):
    """Example number -> image and label of an epoch."""
    found = {}
    for each in loader.batches(epoch):
        found |= {int(k): x for k, x in zip(each.index, each.inputs["pixel_values"])}
    return found


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_variants_take_turns_and_come_back_the_same():
    source = Source.of(DATA, augment=Augment(variants=3))
    loader = Loader(source, batch_size=5, seed=1)
    by_epoch = [images(loader, epoch) for epoch in range(6)]
    assert all(same(by_epoch[k], by_epoch[k + 3]) for k in range(3))
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert sum(not torch.equal(by_epoch[one][k], by_epoch[two][k]) for k in range(24)) > 12
    assert not same(by_epoch[0], images(Loader(source, batch_size=5, seed=2), 0))  # another seed, other variants
    halves = [images(Loader(source, batch_size=3, seed=1, rank=rank, world=2), 4) for rank in range(2)]
    assert same(by_epoch[4], halves[0] | halves[1])  # whichever process has an example


def test_each_variant_is_another_unchanging_data_set():
    def origins(augment, seed=1):
        loader = Loader(Source.of(DATA, augment=augment), batch_size=24, seed=seed)
        return [next(loader.batches(epoch)).origin for epoch in range(4)]

    first = origins(Augment(variants=2))
    assert first[0] == first[2] != first[1] == first[3]
    others = *origins(None), *origins(Augment(variants=2), seed=2), *origins(Augment(flip=0.1, variants=2))
    assert len({*first, *others}) == 2 + 1 + 2 + 2


def scenario(augment=None):
    return SingleTask(train=DATA, augment=augment)


@pytest.mark.parametrize("make", [KD, FitNet])
def test_a_stored_augmentation_is_asked_once_a_variant_and_teaches_as_if_nothing_was_kept(make):
    def trained(cache):
        torch.manual_seed(0)
        teacher = Teacher(tiny_model(seed=4), cache=cache)
        options = {"stages": "one"} if make is FitNet else {}
        method, counts = make(tiny_model(), teacher, **options), seen(teacher.model)
        run(method, scenario(Augment(variants=2)), steps=None, epochs=6)
        return method, sum(counts)

    (kept, few), (anew, many) = trained(True), trained(False)
    assert (few, many) == (2 * 24, 6 * 24)
    assert all(torch.equal(a, b) for a, b in zip(state_of(kept).values(), state_of(anew).values()))


@pytest.mark.parametrize("augment", [None, Augment(variants=2)])
def test_resumed_in_any_epoch_it_ends_with_the_same_bits(augment, tmp_path):
    def make():
        torch.manual_seed(0)
        return FitNet(tiny_model(), Teacher(tiny_model(seed=4)), stages="one")

    def train(method, folder, **changes):
        arguments = settings(output_dir=str(folder), steps=12, batch_size=7, keep=99, **changes)
        return Trainer(method, scenario(augment), arguments)

    whole = make()
    train(whole, tmp_path / "whole", save=1).train()
    folders = Checkpoints(tmp_path / "whole" / "checkpoints").all()
    assert len(folders) >= 10
    for folder in folders[::3]:
        again = make()
        train(again, tmp_path / "again").train(resume=str(folder))
        for (name, one), two in zip(state_of(whole).items(), state_of(again).values()):
            assert torch.equal(one, two), (folder.name, name)
