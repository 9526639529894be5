"""Teachers answer and never change; what they said is kept by example number, exactly."""

import copy

import pytest
import torch
from torch import nn

from hubtransfer.backbones import Backbone
from hubtransfer.backbones.processor import ImageProcessor
from hubtransfer.models import ClassificationHead, OutputCache, RegressionHead, Teacher, TransferModel
from hubtransfer.patches import ScaleBiasConfig
from tests.tiny import SHAPE, batch, tiny_backbone, tiny_data, tiny_model, tiny_network

DATA = tiny_data(24)


class Counting(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *inputs):
        self.calls += 1
        return self.module(*inputs)


def counted(**options):
    """A teacher, and the module that counts how often its trunk runs."""
    model = tiny_model(seed=4)
    counting = model.backbone.trunk.stem = Counting(model.backbone.trunk.stem)
    return Teacher(model, **options), counting


def some(index, origin="train", size=24):
    return batch(DATA["labels"][index], pixel_values=DATA["pixel_values"][index], index=index, origin=origin, size=size)


# --------------------------------------------------------------------------------------------------- frozen


def test_it_answers_like_the_model_without_gradients():
    model = tiny_model(seed=4)
    given = batch(pixel_values=DATA["pixel_values"][:3].clone().requires_grad_())
    expected = model.eval()(**given.inputs)
    out = Teacher(model)(given)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.features.pooled, expected.features.pooled)
    assert not out.logits.requires_grad and not any(p.requires_grad for p in model.parameters())


def test_it_is_no_part_of_what_holds_it():
    class Method(nn.Module):
        def __init__(self, model, teacher):
            super().__init__()
            self.model, self.teacher = model, teacher

    teacher = Teacher(tiny_model(seed=1, patch=ScaleBiasConfig()))
    method = Method(tiny_model(), teacher)
    assert {name for name in method.state_dict() if not name.startswith("model.")} == {"teacher.cache._extra_state"}
    assert not [name for name, _ in method.named_parameters() if name.startswith("teacher")]
    method.requires_grad_(True).train()
    assert not any(m.training for m in (teacher, *teacher.model.modules()))
    assert not any(p.requires_grad for p in teacher.model.parameters())
    method.to(torch.float64)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float64}


def test_batchnorm_of_a_teacher_rests():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = TransferModel(Backbone.from_module(network, sample=torch.zeros(1, *SHAPE)))
    teacher = Teacher(model.add_task("t", ClassificationHead(2)).train())
    before = network[1].running_mean.clone()
    teacher.train()(batch())
    assert torch.equal(network[1].running_mean, before)


def test_a_task_of_its_own():
    model = tiny_model(3, "a").add_task("b", ClassificationHead(5), patch=ScaleBiasConfig())
    given = batch()
    assert torch.equal(Teacher(model, "a")(given).logits, model(**given.inputs, task="a").logits)
    assert Teacher(model)(batch()).logits.shape == (3, 5)
    with pytest.raises(ValueError, match="unknown task 'c'"):
        Teacher(model, "c")
    with pytest.raises(TypeError, match="TransferModel, got Linear"):
        Teacher(nn.Linear(2, 2))


def test_deep_copies_are_whole():
    teacher, _ = counted()
    teacher(some([0, 1, 2]))
    clone = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in teacher.model.parameters():
            p.zero_()
    teacher.cache.clear()
    assert torch.equal(clone(some([3, 4])).logits, counted()[0](some([3, 4])).logits)
    assert not torch.equal(clone(some([3, 4])).logits, teacher(some([3, 4])).logits)


# ---------------------------------------------------------------------------------------------------- cache


def test_after_one_epoch_it_runs_no_more_and_answers_the_same():
    teacher, counting = counted()
    plain, _ = counted(cache=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for index in torch.randperm(24, generator=generator).split(6):
            out = teacher(some(index))
            expected = plain(some(index))
            torch.testing.assert_close(out.logits, expected.logits)
            torch.testing.assert_close(out.features.pooled, expected.features.pooled)
        assert counting.calls == 4
    first = teacher(some([5, 0, 5]))
    assert torch.equal(first.logits[0], first.logits[2]) and counting.calls == 4


def test_unchanging_rows_are_read_by_number_not_by_position():
    teacher, _ = counted()
    forward = teacher(some([0, 1, 2, 3]))
    backward = teacher(some([3, 2, 1, 0]))
    assert torch.equal(backward.logits, forward.logits.flip(0))
    assert torch.equal(backward.features.pooled, forward.features.pooled.flip(0))


def test_what_may_change_is_never_kept():
    teacher, counting = counted()
    for _ in range(3):
        teacher(some([0, 1], origin=None))
        teacher(batch(pixel_values=DATA["pixel_values"][:2], origin="train"))  # no index
    assert counting.calls == 6
    switched_off, counting = counted(cache=False)
    for _ in range(3):
        switched_off(some([0, 1]))
    assert counting.calls == 3 and switched_off.cache is None


def test_what_is_kept_does_not_depend_on_the_batches_it_came_in():
    """A run that is resumed in the middle sees other batches first, and must come to the same bits.

    Row sums in two sizes of batch stand for what matrix products do: one answer for 6 rows, another for fewer.
    """

    def by_size(inputs):
        rows = inputs["pixel_values"].flatten(1).sum(1, keepdim=True)
        return (rows + (0.001 if len(rows) == 6 else 0.002),)

    def run(cache, order):
        for index in order:
            given = some(index, size=20)
            torch.testing.assert_close(cache.outputs(given, by_size)[0], by_size(given.inputs)[0], atol=0.01, rtol=0)
        return cache.lookup("train", torch.arange(20))[0]

    epoch = torch.arange(20).split(6)  # 6, 6, 6 and 2
    whole = OutputCache()
    expected = run(whole, epoch)
    resumed = OutputCache()
    resumed.load_state_dict(whole.state_dict())
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0)).split(6)
    assert torch.equal(run(resumed, reversed(shuffled)), expected)  # starts with the small batch
    assert torch.equal(run(OutputCache(), shuffled), expected)


def test_data_sets_do_not_mix():
    teacher, counting = counted()
    a = teacher(some([0, 1], origin="a"))
    other = batch(pixel_values=DATA["pixel_values"][10:12], index=[0, 1], origin="b", size=24)
    assert not torch.equal(teacher(other).logits, a.logits) and counting.calls == 2
    assert torch.equal(teacher(some([0, 1], origin="a")).logits, a.logits) and counting.calls == 2


def test_maps_are_computed_at_each_step_and_once_a_batch():
    teacher, counting = counted(layers=["act1"])
    given = some([0, 1])
    assert list(teacher(given).features.maps) == ["act1"] and teacher(given) is teacher(given)
    assert counting.calls == 1
    assert list(teacher(some([0, 1]), layers=["act2"]).features.maps) == ["act2"] and counting.calls == 2


def test_cache_by_itself():
    cache = OutputCache()
    rows = torch.arange(12.0).reshape(6, 2)
    assert cache.lookup("a", torch.tensor([0])) is None
    cache.store("a", torch.tensor([4, 1]), (rows[[4, 1]], rows[[4, 1], 0]), size=6)
    assert cache.lookup("a", torch.tensor([4, 2])) is None  # one of them is missing
    first, second = cache.lookup("a", torch.tensor([1, 4, 1]))
    assert torch.equal(first, rows[[1, 4, 1]]) and torch.equal(second, rows[[1, 4, 1], 0])
    assert cache.lookup("b", torch.tensor([1])) is None and cache.lookup(None, torch.tensor([1])) is None
    assert cache.bytes() == 6 * (2 + 1) * 4


def test_cache_grows_where_no_size_is_announced():
    cache = OutputCache()
    rows = torch.randn(100, 3)
    for index in torch.arange(100).split(7):
        cache.store("a", index, (rows[index],))
    (found,) = cache.lookup("a", torch.arange(100))
    assert torch.equal(found, rows) and cache.lookup("a", torch.tensor([500])) is None


def test_too_large_a_data_set_is_computed_each_time(caplog):
    cache = OutputCache(limit=1000)
    for _ in range(2):
        cache.store("large", torch.tensor([0]), (torch.zeros(1, 100),), size=10)
    assert cache.lookup("large", torch.tensor([0])) is None and cache.bytes() == 0
    assert len(caplog.records) == 1 and "10 examples" in caplog.text
    cache.store("small", torch.tensor([0]), (torch.zeros(1, 2),), size=10)
    assert cache.lookup("small", torch.tensor([0])) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_beyond_the_limit_rows_are_kept_on_disk(tmp_path, dtype):
    cache = OutputCache(limit=1000, folder=tmp_path / "cache")
    rows = torch.randn(100, 40, 2).to(dtype), torch.arange(100)
    order = torch.randperm(100)
    for index in order.split(7):
        cache.store("large", index, [tensor[index] for tensor in rows], size=100)
    assert cache.lookup("large", torch.tensor([3, 100])) is None
    for index in (torch.arange(100), order[:9]):
        for found, tensor in zip(cache.lookup("large", index), rows):
            assert torch.equal(found, tensor[index])
    assert cache.bytes() == 0
    assert not list((tmp_path / "cache").iterdir())  # nothing is left behind, whatever happens to the process
    cache.store("grows", torch.tensor([0]), (rows[0][:1],))
    cache.store("grows", torch.tensor([50]), (rows[0][50:51],))
    assert torch.equal(cache.lookup("grows", torch.tensor([50, 0]))[0], rows[0][[50, 0]])


def test_a_teacher_that_answers_from_disk_answers_the_same(tmp_path):
    model = tiny_model()
    whole, small = Teacher(model), Teacher(model, cache=OutputCache(limit=10, folder=tmp_path))
    for _ in range(2):
        images = batch([0, 1, 2], index=[4, 2, 7], origin="train", size=9)
        assert torch.equal(whole(images).logits, small(images).logits)
    assert small.cache.lookup("train", torch.tensor([2, 4, 7])) is not None


# -------------------------------------------------------------------------------------------------- student


def test_same_classes():
    teacher = Teacher(tiny_model(3, seed=1))
    assert teacher.same_classes_as(tiny_model(3)) is teacher
    with pytest.raises(ValueError, match="'task' predicts 3 outputs.*'other' 4 outputs"):
        teacher.same_classes_as(tiny_model(3).add_task("other", ClassificationHead(4)))
    with pytest.raises(ValueError, match="regression"):
        teacher.same_classes_as(tiny_model(3).add_task("other", RegressionHead(3)))
    named = [
        TransferModel(tiny_backbone(seed=k)).add_task("pets", ClassificationHead(2, labels=labels))
        for k, labels in enumerate([("cat", "dog"), ("dog", "cat")])
    ]
    with pytest.raises(ValueError, match="class 0 is 'cat' for the teacher and 'dog'"):
        Teacher(named[0]).same_classes_as(named[1])


def test_a_student_may_not_share_the_teachers_parameters():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"share.*copy\.deepcopy"):
        Teacher(model).check_student(model)
    shared = TransferModel(model.backbone).add_task("x", ClassificationHead(2))
    with pytest.raises(ValueError, match=r"backbone\.trunk\.stem\.weight"):
        Teacher(model).check_student(shared)
    assert Teacher(copy.deepcopy(model)).check_student(model)


def image_model(mean, std, size=8, seed=0):
    processor = ImageProcessor(size=size, mean=(mean,) * 3, std=(std,) * 3)
    sample = torch.zeros(1, 3, size, size)
    backbone = Backbone.from_module(tiny_network(seed=seed), sample=sample, processor=processor)
    return TransferModel(backbone).add_task("t", ClassificationHead(3))


def test_a_teacher_sees_images_as_it_was_trained_to():
    """Pixels p: the student gets (p - 0.5) / 0.5, the teacher needs (p - 0.2) / 0.1."""
    pixels = torch.rand(3, *SHAPE)
    student, model = image_model(0.5, 0.5), image_model(0.2, 0.1, seed=1)
    teacher = Teacher(model).same_classes_as(student)
    out = teacher(batch(pixel_values=(pixels - 0.5) / 0.5))
    torch.testing.assert_close(out.logits, model((pixels - 0.2) / 0.1).logits, atol=1e-5, rtol=1e-5)
    larger = Teacher(image_model(0.5, 0.5, size=16, seed=1)).check_student(student)
    assert larger.inputs({"pixel_values": torch.zeros(2, *SHAPE)})["pixel_values"].shape == (2, 3, 16, 16)
    same = torch.rand(2, *SHAPE)
    assert (
        Teacher(image_model(0.5, 0.5, seed=1)).check_student(student).inputs({"pixel_values": same})["pixel_values"]
        is same
    )


def test_students_that_see_images_otherwise_need_a_teacher_each():
    """Pixels p: one student gets (p - 0.5) / 0.5 as the teacher does, the other (p - 0.2) / 0.1."""
    model, one, other = image_model(0.5, 0.5, seed=1), image_model(0.5, 0.5, seed=2), image_model(0.2, 0.1, seed=3)
    pixels = torch.rand(3, *SHAPE)
    teacher = Teacher(model).check_student(one)
    expected = model((pixels - 0.5) / 0.5).logits
    with pytest.raises(ValueError, match=r"\(0\.5, 0\.5, 0\.5\).*\(0\.2, .*second Teacher\(model\)"):
        teacher.check_student(other)
    assert torch.equal(teacher(batch(pixel_values=(pixels - 0.5) / 0.5)).logits, expected)
    second = Teacher(model).check_student(other)
    torch.testing.assert_close(second(batch(pixel_values=(pixels - 0.2) / 0.1)).logits, expected, atol=1e-5, rtol=1e-5)
    assert teacher.check_student(image_model(0.5, 0.5, seed=4)) is teacher
    assert teacher.check_student(tiny_model(seed=5)) is teacher  # says nothing of its images


def bert(vocabulary):
    backbone = Backbone.from_pretrained(
        "bert",
        pretrained=False,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(vocabulary),
    )
    from hubtransfer.backbones.processor import TextProcessor

    class Words:
        def get_vocab(self):
            return {word: k for k, word in enumerate(vocabulary)}

        def __len__(self):
            return len(vocabulary)

    backbone.processor = TextProcessor(tokenizer=Words())
    return TransferModel(backbone).add_task("t", ClassificationHead(2))


def test_other_tokenizers_and_other_kinds_of_inputs_are_refused():
    with pytest.raises(ValueError, match=r"other tokenizers \(3 and 3 tokens\)"):
        Teacher(bert(["a", "b", "c"])).check_student(bert(["a", "c", "b"]))
    Teacher(bert(["a", "b", "c"])).check_student(bert(["a", "b", "c"]))
    with pytest.raises(ValueError, match="teacher takes text inputs, the student image inputs"):
        Teacher(bert(["a", "b"])).check_student(image_model(0.5, 0.5))
