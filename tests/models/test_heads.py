"""Heads: each loss by hand, missing labels, and the words for labels that cannot be."""

import math

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.backbones import Backbone
from hubtransfer.config import from_dict, to_dict
from hubtransfer.models import ClassificationHead, DenseHead, HeadConfig, MultiLabelHead, RegressionHead, TransferModel
from tests.tiny import batch, linear_model, tiny_backbone, tiny_model

NAN = math.nan


def model_loss(logits, labels, head=None):
    """The loss that `TransferModel.forward` gives for these logits and labels."""
    model = linear_model(torch.tensor(logits))
    if head is not None:
        module = model.heads["task"]
        model.remove_task("task").add_task("task", head)
        model.heads["task"] = module
    given = batch(labels=None, n=len(logits))
    return model(**given.inputs, labels=torch.tensor(labels), task="task").loss.item()


def test_classification_by_hand():
    # softmax(ln 3, 0) = (3/4, 1/4), softmax(0, 0) = (1/2, 1/2): mean of -ln 3/4 and -ln 1/2
    loss = model_loss([[math.log(3), 0.0], [0.0, 0.0]], [0, 1])
    assert loss == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, abs=1e-6)


def test_a_missing_class_counts_nowhere():
    assert model_loss([[math.log(3), 0.0], [5.0, 1.0]], [0, -100]) == pytest.approx(math.log(4 / 3), abs=1e-6)
    assert model_loss([[math.log(3), 0.0], [5.0, 1.0]], [0, -1]) == pytest.approx(math.log(4 / 3), abs=1e-6)
    assert model_loss([[1.0, 0.0]], [-100]) == 0.0


def test_soft_labels_by_hand():
    # -(0.3 ln 3/4 + 0.7 ln 1/4)
    loss = model_loss([[math.log(3), 0.0]], [[0.3, 0.7]])
    assert loss == pytest.approx(-(0.3 * math.log(0.75) + 0.7 * math.log(0.25)), abs=1e-6)


def test_label_smoothing_by_hand():
    # q = 0.9 * (1, 0) + 0.1 * (1/2, 1/2) = (0.95, 0.05)
    head = ClassificationHead(2, label_smoothing=0.1)
    loss = model_loss([[math.log(3), 0.0], [9.0, 0.0]], [0, -100], head)
    assert loss == pytest.approx(-(0.95 * math.log(0.75) + 0.05 * math.log(0.25)), abs=1e-6)


def test_multi_label_by_hand():
    # sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2; unknown: NaN and -1, whatever the logit
    head = MultiLabelHead(2)
    loss = model_loss([[math.log(3), 0.0], [7.0, -7.0]], [[1.0, 0.0], [NAN, -1.0]], head)
    assert loss == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, abs=1e-6)
    assert model_loss([[math.log(3), 0.0]], [[1, -1]], head) == pytest.approx(math.log(4 / 3), abs=1e-6)
    assert model_loss([[3.0, 0.0]], [[NAN, NAN]], head) == 0.0


def test_regression_by_hand():
    # (1 - 3)^2 = 4, (2 - 2)^2 = 0, (0 - 1)^2 = 1, one unknown: 5 / 3
    loss = model_loss([[1.0, 2.0], [0.0, 9.0]], [[3.0, 2.0], [1.0, NAN]], RegressionHead(2))
    assert loss == pytest.approx(5 / 3, abs=1e-6)
    assert model_loss([[1.0], [2.0]], [3, 2], RegressionHead()) == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        (MultiLabelHead(2), [[1.0, NAN], [-1.0, 0.0]]),
        (RegressionHead(2), [[1.0, NAN], [NAN, 0.0]]),
        (ClassificationHead(2), [1, -100]),
        (ClassificationHead(2), [1, -1]),
    ],
)
def test_missing_labels_have_no_gradient(head, labels):
    logits = torch.tensor([[0.2, -0.4], [1.0, 3.0]], requires_grad=True)
    labels = torch.tensor(labels)
    head.loss(logits, labels).backward()
    missing = labels.isnan() | (labels == -1) if labels.dim() == 2 else torch.tensor([[False, False], [True, True]])
    assert torch.equal(logits.grad == 0, missing)


@pytest.mark.parametrize(
    ("head", "shape", "markers"),
    [
        (ClassificationHead(3), (2, 3), [-100, -1]),
        (MultiLabelHead(3), (2, 3), [[NAN, -1.0, NAN], [-1.0, -1.0, NAN]]),
        (RegressionHead(3), (2, 3), [[NAN] * 3] * 2),
        (DenseHead(3), (2, 3, 1, 2), [[[255, -100]], [[-1, 255]]]),
    ],
)
def test_a_batch_without_a_label_has_a_loss_of_zero_that_can_be_descended(head, shape, markers):
    logits, labels = torch.randn(shape, requires_grad=True), torch.tensor(markers)
    head.check(labels)
    assert not head.known(labels).any()
    loss = head.loss(logits, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(shape))


def test_dense_by_hand():
    backbone = tiny_backbone()
    model = TransferModel(backbone).add_task("pixels", DenseHead(2))
    head = model.heads["pixels"]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([math.log(3), 0.0]))
    given = batch(labels=None, n=1)
    labels = torch.full((1, 8, 8), 255)
    labels[0, 0, 0], labels[0, 7, 7] = 0, 1
    out = model(**given.inputs, labels=labels)
    assert out.logits.shape == (1, 2, 8, 8)
    # class 0 has probability 3/4 at every pixel; two pixels count
    assert out.loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, abs=1e-6)
    assert model(**given.inputs, labels=torch.full((1, 8, 8), 255)).loss.item() == 0.0


def test_dense_reads_the_deepest_map_and_enlarges_it():
    model = TransferModel(tiny_backbone()).add_task("pixels", DenseHead(3))
    x = batch(labels=None, n=2).inputs["pixel_values"]
    deepest = model.backbone.layers[-1].name
    maps = model.backbone(x, [deepest]).maps[deepest]
    weight = model.heads["pixels"].weight.flatten(1)
    small = torch.einsum("bchw,kc->bkhw", maps, weight) + model.heads["pixels"].bias[:, None, None]
    expected = F.interpolate(small, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(x).logits, expected)


def test_dense_folds_tokens_without_the_prefix():
    """A ViT of 2 x 3 patches: patch k's own value must come back at row k // 3, column k % 3."""
    backbone = Backbone.from_pretrained("vit_tiny_patch16_224", pretrained=False, image_size=(32, 48))
    layer = backbone.layers[-1]
    assert layer.kind == "tokens" and layer.prefix == 1
    head = DenseHead(2).build(backbone)
    tokens = torch.zeros(1, 1 + 6, layer.channels)
    tokens[0, 1:, 0] = torch.arange(6.0)
    tokens[0, 0, 0] = 100.0
    assert torch.equal(head.grid(tokens, (32, 48))[0, 0], torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
    with pytest.raises(ValueError, match="6 patch tokens"):
        head.grid(tokens, (64, 64))
    model = TransferModel(backbone).add_task("pixels", DenseHead(2))
    assert model(torch.zeros(1, 3, 32, 48)).logits.shape == (1, 2, 32, 48)


def test_no_head_gives_the_pooled_features():
    model = TransferModel(tiny_backbone()).add_task("embed")
    out = model(**batch().inputs)
    assert torch.equal(out.logits, out.features.pooled)
    with pytest.raises(ValueError, match="'embed' has no head"):
        model(**batch().inputs, labels=torch.tensor([0, 1, 2]))


WRONG = [
    (ClassificationHead(3), [0, 7], r"task 'task'.*3 classes.*0\.\.2.*got 7 at position 1"),
    (ClassificationHead(3), [0, -2], r"task 'task'.*3 classes.*got -2 at position 1"),
    (ClassificationHead(3), [[0], [1]], r"task 'task'.*shape \(2\).*\(2, 1\)"),
    (ClassificationHead(3), [0.0, 1.0], r"task 'task'.*probabilities of 3 classes"),
    (ClassificationHead(3), [True, False], r"task 'task'.*integers, got bool"),
    (MultiLabelHead(3), [[0, 1, 2], [0, 0, 0]], r"task 'task'.*3 labels.*got 2 at position \(0, 2\)"),
    (MultiLabelHead(3), [0, 1], r"task 'task'.*shape \(2, 3\)"),
    (RegressionHead(3), [1.0, 2.0], r"task 'task'.*shape \(2, 3\)"),
]


@pytest.mark.parametrize(("head", "labels", "message"), WRONG)
def test_wrong_labels_are_named_at_the_loss(head, labels, message):
    model = TransferModel(tiny_backbone()).add_task("task", head)
    with pytest.raises(ValueError, match=message):
        model(**batch(labels=None, n=2).inputs, labels=torch.tensor(labels))


@pytest.mark.parametrize(("head", "labels", "message"), WRONG)
def test_wrong_labels_are_named_before_work_starts(head, labels, message):
    model = TransferModel(tiny_backbone()).add_task("task", head)
    with pytest.raises(ValueError, match=message.replace(r"shape \(2", r"shape \(n")):
        model.check_labels(torch.tensor(labels))


def test_checks_that_only_a_whole_data_set_gets():
    with pytest.raises(ValueError, match="finite.*inf at position 1"):
        RegressionHead().check(torch.tensor([0.0, math.inf]))
    with pytest.raises(ValueError, match="negative or NaN.*nan"):
        ClassificationHead(2).check(torch.tensor([[0.5, NAN]]))
    dense = DenseHead(2)
    dense.check(torch.tensor([[[0, 1], [255, 1]]]))
    with pytest.raises(ValueError, match=r"2 classes.*got 2 at position \(0, 1, 0\)"):
        dense.check(torch.tensor([[[0, 1], [2, 1]]]))
    with pytest.raises(ValueError, match="got 2"):
        dense.loss(torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 1], [2, 1]]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassificationHead(0), "at least one"),
        (lambda: ClassificationHead(2, dropout=1.0), "dropout.*1.0"),
        (lambda: ClassificationHead(2, label_smoothing=1.0), "label_smoothing.*1.0"),
        (lambda: ClassificationHead(2, labels=("cat",)), "1 label names.*2 outputs"),
        (lambda: DenseHead(2).build(Backbone.from_module(torch.nn.Linear(2, 2), dim=2)), "no maps"),
    ],
)
def test_wrong_heads_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_zero_init_and_dropout():
    model = TransferModel(tiny_backbone()).add_task("zero", ClassificationHead(4, zero_init=True, dropout=0.5))
    x = batch().inputs["pixel_values"]
    assert torch.equal(model(x).logits, torch.zeros(3, 4))
    with torch.no_grad():
        model.heads["zero"].weight.fill_(1.0)
    model.eval()
    pooled = model.features(x).pooled
    torch.testing.assert_close(model(x).logits, pooled.sum(1, keepdim=True).expand(-1, 4))
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)  # dropout draws anew


def test_resized_head_keeps_its_logits():
    model = tiny_model(num_classes=3)
    x = batch().inputs["pixel_values"]
    before = model(x).logits
    model.extend_head("task", 5)
    after = model(x).logits
    assert after.shape == (3, 5)
    torch.testing.assert_close(after[:, :3], before)
    assert model.tasks["task"].head == ClassificationHead(5)
    with pytest.raises(ValueError, match="5 classes already; 4"):
        model.extend_head("task", 4)


@pytest.mark.parametrize(
    "head",
    [
        ClassificationHead(2, labels=("cat", "dog"), zero_init=True, dropout=0.1, label_smoothing=0.2),
        MultiLabelHead(3, dropout=0.5),
        RegressionHead(),
        DenseHead(4, labels=("a", "b", "c", "d")),
    ],
)
def test_config_round_trip(head):
    assert from_dict(HeadConfig, to_dict(head)) == head


def test_heads_follow_the_backbones_precision():
    model = tiny_model(dtype=torch.float64)
    assert model(**batch(dtype=torch.float64).inputs).logits.dtype == torch.float64
