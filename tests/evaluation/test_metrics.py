import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from hubtransfer.evaluation import evaluate_outputs, evaluates, first_metric, mean_interval
from hubtransfer.evaluation.metrics import average_precision, calibration_error, reliability, top_k_accuracy

NAN = math.nan


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 7, (200,), generator=generator)
    logits = torch.randn(200, 7, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 7)
    return logits, labels


def test_classification_by_hand():
    # predictions 0, 1, 1, 2 for labels 0, 1, 2, 2: 3 of 4 right
    logits = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0], [0, 0, 2.0]])
    labels = torch.tensor([0, 1, 2, 2])
    found = evaluate_outputs("classification", logits, labels, names=["a", "b", "c"])
    assert next(iter(found.metrics)) == "accuracy"
    assert found.metrics["accuracy"] == 0.75
    # F1: a 1, b 2*1/(2*1+1) = 2/3, c 2*1/(2*1+1) = 2/3; mean 7/9
    assert found.metrics["macro_f1"] == pytest.approx(7 / 9, abs=1e-15)
    # all confidences are e^2 / (e^2 + 2); one of four examples is wrong
    sure = math.exp(2) / (math.exp(2) + 2)
    assert found.metrics["ece"] == pytest.approx(abs(0.75 - sure), abs=1e-12)
    assert found.metrics["nll"] == pytest.approx((-3 * math.log(sure) - math.log(1 / (math.exp(2) + 2))) / 4)
    assert found.tables["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert found.tables["per_class"][2] == {
        "name": "c", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2,
    }  # fmt: skip


def test_classification_against_scikit_learn(outputs):
    logits, labels = outputs
    found = evaluate_outputs("classification", logits, labels)
    truth, predicted = labels.numpy(), logits.argmax(1).numpy()
    probabilities = logits.double().softmax(1).numpy()
    assert found.metrics["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted), abs=1e-14)
    assert found.metrics["top5_accuracy"] == pytest.approx(sk.top_k_accuracy_score(truth, probabilities, k=5))
    assert found.metrics["macro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro"), abs=1e-14)
    assert found.metrics["nll"] == pytest.approx(sk.log_loss(truth, probabilities), abs=1e-12)
    assert found.tables["confusion"] == sk.confusion_matrix(truth, predicted).tolist()
    precision, recall, f1, support = sk.precision_recall_fscore_support(truth, predicted)
    for row, *expected in zip(found.tables["per_class"], precision, recall, f1, support):
        assert [row["precision"], row["recall"], row["f1"], row["support"]] == pytest.approx(expected)


def test_calibration_error_example_by_example(outputs):
    logits, labels = outputs
    sums = {}
    for row, label in zip(logits.double().softmax(1).tolist(), labels.tolist()):
        sure = max(row)
        place = math.ceil(sure * 15) - 1  # ((m - 1) / 15, m / 15]
        sums.setdefault(place, []).append((row.index(sure) == label) - sure)
    expected = sum(abs(sum(gaps)) for gaps in sums.values()) / len(labels)
    assert evaluate_outputs("classification", logits, labels).metrics["ece"] == pytest.approx(expected, abs=1e-12)


def test_an_edge_belongs_to_the_bin_below_it():
    # 5 bins: 0.6 is the upper edge of the third, (0.4, 0.6]
    bins = reliability(torch.tensor([[0.6, 0.4], [1.0, 0.0]], dtype=torch.float64), torch.tensor([0, 1]), bins=5)
    assert bins["count"] == [0, 0, 1, 0, 1]
    # right with 0.6 and wrong with 1.0: (|1 - 0.6| + |0 - 1|) / 2
    assert calibration_error(bins) == pytest.approx(0.7)


def test_classes_that_never_occur_do_not_count():
    logits = torch.eye(2).repeat(3, 1)
    wide = torch.cat([logits, torch.full((6, 2), -9.0)], 1)
    assert evaluate_outputs("classification", wide, torch.tensor([0, 1] * 3)).metrics["macro_f1"] == 1.0


def test_top_k_needs_that_many_classes():
    with pytest.raises(ValueError, match="k must be 1 to 3"):
        top_k_accuracy(torch.zeros(2, 3), torch.zeros(2).long(), 5)


@pytest.mark.parametrize("ties", [False, True])
def test_multilabel_against_scikit_learn(ties):
    generator = torch.Generator().manual_seed(5)
    truth = torch.rand(120, 4, generator=generator) < 0.3
    logits = torch.randn(120, 4, generator=generator) + truth.float()
    if ties:
        logits = logits.round()
    found = evaluate_outputs("multi_label", logits, truth.float())
    wanted, predicted = truth.numpy(), (logits > 0).numpy()
    assert found.metrics["micro_f1"] == pytest.approx(sk.f1_score(wanted, predicted, average="micro"))
    assert found.metrics["macro_f1"] == pytest.approx(sk.f1_score(wanted, predicted, average="macro"))
    assert found.metrics["exact_match"] == pytest.approx(sk.accuracy_score(wanted, predicted))
    each = sk.average_precision_score(wanted, logits.numpy(), average=None)
    assert average_precision(logits, truth).numpy() == pytest.approx(each, abs=1e-12)
    assert found.metrics["mean_average_precision"] == pytest.approx(each.mean())


def test_average_precision_by_hand():
    # ranked hit, miss, hit: (1/2) * 1 + (1/2) * 2/3
    found = average_precision(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([[True], [False], [True]]))
    assert found.item() == pytest.approx(1 / 2 + 1 / 3)


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_against_scikit_learn(outputs):
    generator = torch.Generator().manual_seed(7)
    wanted = torch.randn(50, outputs, generator=generator)
    predicted = wanted + 0.3 * torch.randn(50, outputs, generator=generator)
    found = evaluate_outputs("regression", predicted, wanted.squeeze(1) if outputs == 1 else wanted)
    a, b = wanted.double().numpy(), predicted.double().numpy()
    assert found.metrics["r2"] == pytest.approx(sk.r2_score(a, b))
    assert found.metrics["mae"] == pytest.approx(sk.mean_absolute_error(a, b))
    assert found.metrics["rmse"] == pytest.approx(sk.root_mean_squared_error(a, b))


def test_regression_of_a_constant_is_finite():
    constant = torch.full((4, 1), 2.0)
    assert evaluate_outputs("regression", constant, constant).metrics == {"r2": 1.0, "mae": 0.0, "rmse": 0.0}
    assert evaluate_outputs("regression", constant + 1, constant).metrics == {"r2": 0.0, "mae": 1.0, "rmse": 1.0}


def test_dense_by_hand():
    # labels 0 0 1 -100, predictions 0 1 1 0: IoU of 0 is 1/2, of 1 is 1/2; two of three pixels are right
    labels = torch.tensor([[[0, 0], [1, -100]]])
    predicted = torch.tensor([[[0, 1], [1, 0]]])
    logits = torch.nn.functional.one_hot(predicted, 3).permute(0, 3, 1, 2).float()
    for outputs in (logits, predicted):
        found = evaluate_outputs("dense", outputs, labels, names=["a", "b", "c"])
        assert found.metrics == {"mean_iou": 0.5, "pixel_accuracy": pytest.approx(2 / 3)}
        assert [row["iou"] for row in found.tables["per_class"]] == [0.5, 0.5, 0.0]


def test_dense_against_scikit_learn():
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(0, 4, (3, 8, 8), generator=generator)
    logits = torch.randn(3, 4, 8, 8, generator=generator)
    found = evaluate_outputs("dense", logits, labels)
    a, b = labels.flatten().numpy(), logits.argmax(1).flatten().numpy()
    assert found.metrics["mean_iou"] == pytest.approx(sk.jaccard_score(a, b, average="macro"))
    assert found.metrics["pixel_accuracy"] == pytest.approx(sk.accuracy_score(a, b))


@pytest.mark.parametrize(
    ("kind", "missing"), [("classification", -100), ("classification", -1), ("regression", NAN), ("multi_label", NAN)]
)
def test_examples_without_a_label_count_nowhere(kind, missing):
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(40, 3, generator=generator)
    labels = {
        "classification": torch.randint(0, 3, (40,), generator=generator),
        "regression": torch.randn(40, 3, generator=generator),
        "multi_label": (torch.rand(40, 3, generator=generator) < 0.4).float(),
    }[kind]
    kept = evaluate_outputs(kind, logits[:25], labels[:25])
    masked = labels.clone()
    masked[25:] = missing
    found = evaluate_outputs(kind, logits, masked)
    assert found.metrics == pytest.approx(kept.metrics)
    for one, two in zip(found.tables["per_class"], kept.tables["per_class"]):
        assert one == pytest.approx(two)


def test_the_first_metric_alone_leaves_out_the_same_examples():
    # rows 0 and 3 are right and row 1 is wrong; rows 2 and 4 have no label
    logits = torch.eye(3)[[0, 1, 2, 2, 0]]
    found = first_metric("classification", logits, torch.tensor([0, 2, -1, 2, -100]))
    assert found.metrics == {"accuracy": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="no example has a label"):
        first_metric("classification", logits, torch.full((5,), -100))


def test_values_missing_one_by_one():
    # output 0: errors 1 and 3 of two known values, output 1: 2 of one, output 2 has none and counts nowhere
    labels = torch.tensor([[0.0, 1.0, NAN], [4.0, NAN, NAN]])
    outputs = torch.tensor([[1.0, 3.0, 9.0], [1.0, 7.0, 9.0]])
    found = evaluate_outputs("regression", outputs, labels)
    assert found.metrics["mae"] == pytest.approx((2 + 2) / 2)
    assert found.metrics["rmse"] == pytest.approx((5**0.5 + 2) / 2)
    assert [row["support"] for row in found.tables["per_class"]] == [2, 1, 0]
    # label 0: hit, hit; label 1: one miss of one known; label 2 unknown everywhere. One of two examples matches.
    found = evaluate_outputs("multi_label", torch.ones(2, 3), torch.tensor([[1.0, 0.0, -1.0], [1.0, NAN, NAN]]))
    assert found.metrics["exact_match"] == 0.5
    assert found.metrics["micro_f1"] == pytest.approx(2 * 2 / (3 + 2))
    assert found.metrics["mean_average_precision"] == 1.0  # of label 0 alone: the others are never true


@pytest.mark.parametrize(
    ("kind", "logits", "labels", "message"),
    [
        ("classification", torch.zeros(2, 3), torch.tensor([-1, -100]), "no example has a label"),
        ("regression", torch.zeros(2, 1), torch.full((2,), NAN), "no example has a label"),
        ("multi_label", torch.zeros(2, 3), torch.full((2, 3), -1.0), "no example has a label"),
        ("clasification", torch.zeros(2, 3), torch.zeros(2), "did you mean 'classification'"),
        ("classification", torch.zeros(2, 3), torch.tensor([0, 3]), "labels run from 0 to 3, but there are 3"),
        ("classification", torch.zeros(2, 3), torch.zeros(3), "2 outputs and 3 labels"),
        ("classification", torch.zeros(0, 3), torch.zeros(0), "0 outputs"),
        ("classification", torch.zeros(2, 3, 1), torch.zeros(2), "(examples, classes)"),
        ("multi_label", torch.zeros(2, 3), torch.zeros(2, 4), "differ in shape"),
        ("regression", torch.zeros(2, 3), torch.zeros(2, 1), "do not fit"),
        ("dense", torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), -100), "no pixel has a label"),
        ("dense", torch.zeros(1, 3, 2, 2), torch.full((1, 2, 3), 0), "do not fit"),
    ],
)
def test_errors_name_what_is_wrong(kind, logits, labels, message):
    with pytest.raises(ValueError) as error:
        evaluate_outputs(kind, logits, labels)
    assert message in str(error.value)


def test_a_kind_is_registered_once():
    with pytest.raises(ValueError, match="exists already"):
        evaluates("dense")(lambda *_: None)


def test_interval_by_hand():
    # values 1, 2, 3: s = 1, t_{0.975, 2} = 4.302653 (table), half = 4.302653 / sqrt(3)
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation, found.n) == (2.0, 1.0, 3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.text() == "2.00 ± 2.48 (n=3)"
    assert mean_interval([0.5]).text(100, 1) == "50.0 (n=1)"
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_interval_covers_as_promised():
    draws = np.random.default_rng(0).normal(size=(2000, 4))
    inside = [found.low <= 0 <= found.high for found in (mean_interval(list(row)) for row in draws)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)  # 3 sigma of 2,000 trials
