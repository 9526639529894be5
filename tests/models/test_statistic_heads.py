"""Heads of statistics: by hand, saved and loaded, widened, measured like any head of classes, and what is refused."""

import pytest
import torch

import hubtransfer as ht
from hubtransfer.config import from_dict, to_dict
from hubtransfer.models import HeadConfig
from hubtransfer.models.statistic_heads import UNSEEN, ClassMeans, RandomRidge
from tests.tiny import batch, tiny_backbone


def counted(module, features, labels, **more):
    held_out = torch.arange(len(labels)) % 5 == 4
    module.add(torch.as_tensor(features), torch.as_tensor(labels), held_out, **more)
    module.fit()
    return module


def random(n=30, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator), torch.randint(3, (n,), generator=generator)


def test_nearest_means_by_hand():
    # class 0: mean of (1, 0) and (3, 0) is (2, 0); class 1: (0, 1); class 2 has no example
    euclidean = counted(ClassMeans(2, 3, 1, cosine=False), [[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]], [0, 1, 0])
    # (1, 1): 2 - 4 / 2 = 0 and 1 - 1 / 2
    assert euclidean(torch.tensor([[1.0, 1.0]])).tolist() == [[0.0, 0.5, pytest.approx(UNSEEN)]]
    cosine = counted(ClassMeans(2, 3, 1, cosine=True), [[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]], [0, 1, 0])
    # (3, 4) has the cosines 3/5 and 4/5
    assert cosine(torch.tensor([[3.0, 4.0]]))[0, :2].tolist() == pytest.approx([0.6, 0.8])


def test_the_nearest_of_several_means_counts():
    module = ClassMeans(1, 2, 2, cosine=False)
    for group, features in enumerate(([[-2.0], [0.5]], [[2.0]])):
        counted(module, features, list(range(len(features))), group=group)
    # class 0 has means -2 and 2, class 1 has 0.5: at 3 these are 3 * 2 - 2, and 3 * 0.5 - 1/8
    assert module(torch.tensor([[3.0]]))[0].tolist() == pytest.approx([4.0, 1.375])


def test_distances_are_to_ones_own_mean():
    module = ClassMeans(1, 2, 1, cosine=False)
    # means 1 (of 0 and 2) and 5: squared distances 1, 1 and 0
    held_out = torch.zeros(3, dtype=torch.bool)
    features = torch.tensor([[0.0], [2.0], [5.0]])
    assert module.add(features, torch.tensor([0, 0, 1]), held_out).item() == pytest.approx(2 / 3)


def test_ridge_is_that_of_all_examples_with_the_penalty_of_the_held_out_ones():
    features, labels = random(60)
    module = counted(RandomRidge(4, 3, 8, seed=3).double(), features.double(), labels)
    hidden = (features.double() @ module.projection).relu()
    targets = torch.nn.functional.one_hot(labels, 3).double()
    eye, held_out = torch.eye(8, dtype=torch.float64), torch.arange(60) % 5 == 4
    h, y = hidden[~held_out], targets[~held_out]
    errors = []
    for power in range(-8, 9):
        weights = torch.linalg.solve(h.T @ h + 10.0**power * eye, h.T @ y)
        errors.append((targets[held_out] - hidden[held_out] @ weights).square().sum().item())
    penalty = 10.0 ** (errors.index(min(errors)) - 8)
    assert module.penalty.item() == pytest.approx(penalty)
    expected = torch.linalg.solve(hidden.T @ hidden + penalty * eye, hidden.T @ targets)
    torch.testing.assert_close(module(features.double()), hidden @ expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", [ht.NearestMeanHead(2), ht.RidgeHead(2, projection=8)])
def test_widened_later_it_is_as_if_it_had_always_been_wide(head, tmp_path):
    features, labels = random(40, 16)
    early, late = labels < 2, labels == 2
    model = ht.TransferModel(tiny_backbone()).add_task("few", head)
    counted(model.heads["few"], features[early], labels[early])
    unchanged = model.heads["few"](features)
    model.save_pretrained(tmp_path)
    again = ht.TransferModel.from_pretrained(tmp_path, backbone=tiny_backbone(seed=5))
    assert again.tasks["few"].head == head
    assert torch.equal(again.heads["few"](features), unchanged)
    again.extend_head("few", 3)
    assert torch.equal(again.heads["few"](features)[:, :2], unchanged)
    assert (again.heads["few"](features)[:, 2] == UNSEEN).all()
    counted(again.heads["few"], features[late], labels[late])
    whole = ht.TransferModel(tiny_backbone()).add_task("few", type(head)(**{**vars(head), "num_classes": 3}))
    for chosen in (late, early):
        counted(whole.heads["few"], features[chosen], labels[chosen])
    torch.testing.assert_close(again.heads["few"](features), whole.heads["few"](features), rtol=1e-4, atol=1e-5)


def test_they_are_classification_heads_to_whoever_measures_or_predicts():
    head = ht.NearestMeanHead(2, labels=("cat", "dog"), metric="euclidean")
    assert (head.kind, head.predicts, ht.ClassificationHead(2).predicts) == (
        "nearest_mean",
        "classification",
        "classification",
    )
    model = ht.TransferModel(tiny_backbone()).add_task("pets", head)
    images = batch(labels=None, n=2).inputs["pixel_values"]
    with torch.no_grad():
        counted(model.heads["pets"], model.features(images).pooled, [1, 0])
    assert [p.name for p in model.predict({"pixel_values": images})] == ["dog", "cat"]


def test_the_config_survives_plain_data():
    for head in (ht.NearestMeanHead(3, metric="euclidean", prototypes=2), ht.RidgeHead(3, projection=7, seed=1)):
        assert from_dict(HeadConfig, to_dict(head)) == head


def test_a_backbone_in_half_precision_gets_whole_sums():
    model = ht.TransferModel(tiny_backbone(dtype=torch.bfloat16)).add_task("few", ht.NearestMeanHead(2))
    assert model.heads["few"].sums.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ht.NearestMeanHead(3, metric="cosin"), "did you mean 'cosine'"),
        (lambda: ht.NearestMeanHead(3, prototypes=0), "prototypes must be at least 1"),
        (lambda: ht.RidgeHead(3, projection=0), "projection must be at least 1"),
        (lambda: ht.RidgeHead(3, dropout=0.1), "RidgeHead is filled by counting.*no dropout"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
