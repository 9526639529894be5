import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from hubtransfer.data import Augment, Loader, MixUp, Source, reader as reader_module


@pytest.fixture(autouse=True)
def nothing_kept():
    reader_module._kept.clear()


def numbers(n, channels=1):
    """Images whose every pixel is the example's number."""
    return {
        "pixel_values": torch.arange(float(n)).view(n, 1, 1, 1).expand(n, channels, 4, 4).clone(),
        "labels": torch.arange(n) % 3,
    }


def flat(lists):
    return [item for one in lists for item in one]


def index(batches):
    return [batch.index.tolist() for batch in batches]


def same(first, second):
    """Whether two lists of batches are bit-equal."""
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert set(a.inputs) == set(b.inputs)
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
        assert torch.equal(a.labels, b.labels)


class Images(Dataset):
    """A map-style data set with a random transform and a count of what was read."""

    def __init__(self, n=10):
        self.n, self.read = n, []
        self.targets = list(range(n))

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.read.append(i)
        return torch.full((1, 4, 4), float(i)) + 0.1 * torch.rand(1), i


def test_an_epoch_has_every_example_once_in_an_order_of_its_own():
    loader = Loader(numbers(10), batch_size=4, seed=1)
    assert loader.steps_per_epoch == 3
    first, second = index(loader.batches(0)), index(loader.batches(1))
    assert sorted(flat(first)) == list(range(10))
    assert first != second
    assert first == index(Loader(numbers(10), batch_size=4, seed=1).batches(0))
    assert first != index(Loader(numbers(10), batch_size=4, seed=2).batches(0))
    later = index(Loader(numbers(10), batch_size=4, seed=1, stage=1).batches(0))  # of another task of a stream
    assert sorted(flat(later)) == list(range(10))
    assert later not in (first, second)
    for batch in loader.batches(0):
        assert batch.inputs["pixel_values"][:, 0, 0, 0].tolist() == batch.index.tolist()
        assert batch.labels.tolist() == [i % 3 for i in batch.index.tolist()]
        assert batch.size == 10


def test_without_shuffling_the_order_is_the_data_sets():
    loader = Loader(numbers(5), batch_size=2, shuffle=False)
    assert index(loader.batches(3)) == [[0, 1], [2, 3], [4]]
    assert index(Loader(Source.of(numbers(5), shuffle=False), batch_size=5).batches(3)) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("make", [numbers, Images])
@pytest.mark.parametrize("augment", [None, Augment()])
def test_any_start_gives_the_same_batches(make, augment):
    whole = list(Loader(Source.of(make(10), augment=augment), batch_size=3, seed=5).batches(2))
    for start in range(5):
        fresh = Loader(Source.of(make(10), augment=augment), batch_size=3, seed=5)
        same(whole[start:], fresh.batches(2, start))
    with pytest.raises(ValueError, match="batch 5 of an epoch that has 4"):
        list(fresh.batches(2, 5))


def test_nothing_before_the_start_is_read():
    data = Images(100)
    loader = Loader(data, batch_size=10)
    data.read.clear()
    batches = loader.batches(0, start=8)
    assert data.read == []
    first = next(batches)
    assert data.read == first.index.tolist()


@pytest.mark.parametrize("n", [12, 13, 15, 3])
@pytest.mark.parametrize("augment", [None, Augment(), [Augment(flip=1.0), MixUp(num_classes=3)]])
def test_two_processes_see_what_one_sees(n, augment):
    source = Source.of(numbers(n), augment=augment)
    one = list(Loader(source, batch_size=4, seed=3).batches(1))
    two = [list(Loader(source, batch_size=2, rank=rank, world=2, seed=3).batches(1)) for rank in (0, 1)]
    assert len(two[0]) == len(two[1]) == Loader(source, batch_size=2, rank=1, world=2).steps_per_epoch
    for whole, *shares in zip(one, *two):
        assert len(shares[0]) == len(shares[1])
        kept = 2 * len(shares[0])  # the last batch is cut to a multiple of two
        assert torch.equal(whole.index[:kept], torch.cat([b.index for b in shares]))
        if kept == 4 or not isinstance(augment, list):  # MixUp's pairs need an even share
            joined = torch.cat([b.inputs["pixel_values"] for b in shares])
            assert torch.equal(whole.inputs["pixel_values"][:kept], joined)
            assert torch.equal(whole.labels[:kept], torch.cat([b.labels for b in shares]))


def test_evaluation_keeps_every_example():
    for n in (1, 4, 5, 7, 8):
        seen = []
        for rank in (0, 1, 2):
            loader = Loader(numbers(n), batch_size=2, rank=rank, world=3, shuffle=False, trim=False)
            seen += flat(index(loader.batches(0)))
        assert sorted(seen) == list(range(n))


def test_more_processes_than_examples_is_an_error():
    with pytest.raises(ValueError, match="2 examples cannot be split over 3 processes"):
        Loader(numbers(2), batch_size=1, world=3)


def test_a_small_data_set_gives_one_smaller_batch():
    loader = Loader(numbers(3), batch_size=8, drop_last=True)
    assert loader.steps_per_epoch == 1
    assert [len(batch) for batch in loader.batches(0)] == [3]


def test_drop_last():
    loader = Loader(numbers(10), batch_size=4, drop_last=True)
    assert loader.steps_per_epoch == 2
    assert [len(batch) for batch in loader.batches(0)] == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1, "rank": 2, "world": 2}, "rank must be 0 to 1"),
        ({"batch_size": 1, "workers": -1}, "workers"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Loader(numbers(4), **arguments)


# ------------------------------------------------------------------------------------------------ several streams


def streams(short=3):
    return {"long": Source.of(numbers(11)), "short": Source.of(numbers(short), task="t")}


def test_the_longest_stream_makes_the_epoch_and_shorter_ones_start_over():
    steps = list(Loader(streams(short=5), batch_size=4).batches(0))
    assert [len(step["long"]) for step in steps] == [len(step["short"]) for step in steps] == [4, 4, 3]
    assert sorted(flat(index(s["long"] for s in steps))) == list(range(11))
    short = flat(index(step["short"] for step in steps))
    passes = [short[:5], short[5:10]]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes)
    assert passes[0] != passes[1]  # each pass in an order of its own
    assert {step["short"].task for step in steps} == {"t"}


def test_streams_resume_and_split_alike():
    whole = list(Loader(streams(), batch_size=4, seed=2).batches(1))
    for name in ("long", "short"):
        same([s[name] for s in whole[1:]], [s[name] for s in Loader(streams(), batch_size=4, seed=2).batches(1, 1)])
    shares = [list(Loader(streams(), batch_size=2, rank=r, world=2, seed=2).batches(1)) for r in (0, 1)]
    for one, a, b in zip(whole[:2], *shares):
        assert one["short"].index.tolist() == a["short"].index.tolist() + b["short"].index.tolist()


def test_streams_of_one_length_have_orders_of_their_own():
    both = {"a": Source.of(numbers(20)), "b": Source.of(numbers(20))}
    step = next(Loader(both, batch_size=20).batches(0))
    assert step["a"].index.tolist() != step["b"].index.tolist()


# ----------------------------------------------------------------------------------------------------- processing


class Halve:
    """A processor that counts the images it saw."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return {"pixel_values": torch.stack([torch.as_tensor(i).float() for i in images])[:, None] / 2}


def pictures(n=6, sizes=((4, 4),)):
    images = [Image.new("L", sizes[i % len(sizes)], i) for i in range(n)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": list(range(n))}, features=features)


@pytest.mark.parametrize("data", [pictures(), {"image": torch.arange(6).byte().view(6, 1, 1).expand(6, 4, 4)}])
def test_each_example_is_processed_once(data):
    data = data if not isinstance(data, dict) else {**data, "label": torch.arange(6)}
    processor = Halve()
    source = Source.of(data)
    for _ in range(2):  # a second loader of the same source, as for a later stage, finds what the first one kept
        loader = Loader(source, processor, batch_size=4)
        for epoch in range(3):
            for batch in loader.batches(epoch):
                assert batch.inputs["pixel_values"].shape[1:] == (1, 4, 4)
                assert torch.equal(batch.inputs["pixel_values"][:, 0, 0, 0] * 2, batch.index.float())
    assert processor.seen <= 6 + 1  # one more to learn the shape


def test_what_does_not_fit_is_read_again():
    processor = Halve()
    loader = Loader(pictures(), processor, batch_size=4, cache_limit=6 * (16 + 8))  # decoded pixels and labels fit
    loader_without = Loader(pictures(), Halve(), batch_size=4, cache_limit=0)
    same(loader.batches(0), Loader(pictures(), Halve(), batch_size=4).batches(0))
    same(loader.batches(1), loader_without.batches(1))
    assert loader._readers[""].raw is not None
    assert loader_without._readers[""].raw is None
    assert processor.seen > 12


def test_augmentation_leaves_what_is_kept_alone():
    processor = Halve()
    source = Source.of(pictures(), augment=Augment(flip=0, shift=0.25))
    loader = Loader(source, processor, batch_size=6)
    found = [next(loader.batches(epoch)) for epoch in range(3)]
    assert processor.seen <= 7
    assert len({tuple(sorted(b.inputs["pixel_values"].flatten().tolist())) for b in found}) > 1
    assert all(b.origin is None and b.size is None and b.index is not None for b in found)


def test_the_origin_is_the_same_for_the_same_rows_and_processor():
    processor = Halve()
    key = next(Loader(numbers(4), processor, batch_size=2).batches(0)).origin
    assert key == next(Loader(numbers(4), processor, batch_size=3).batches(5)).origin
    assert key != next(Loader(numbers(4), Halve(), batch_size=2).batches(0)).origin
    assert key != next(Loader(numbers(5), processor, batch_size=2).batches(0)).origin
    assert next(Loader(Images(), batch_size=2).batches(0)).origin is None


def test_columns_in_memory_are_not_copied():
    data = numbers(10)
    loader = Loader(data, batch_size=2)
    next(loader.batches(0))
    assert loader._readers[""].processed is None


def words(texts):
    """One token a letter, padded with 0 to the longest."""
    rows = [torch.tensor([ord(c) - 96 for c in text]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


TEXTS = ["a", "bcdefg", "hi", "jkl", "m", "no"]


@pytest.mark.parametrize("limit", [2**20, 0])
def test_texts_are_padded_to_the_longest_of_the_batch(limit):
    loader = Loader({"text": TEXTS, "label": list(range(6))}, words, batch_size=2, cache_limit=limit)
    for batch in loader.batches(0):
        chosen = [TEXTS[i] for i in batch.index.tolist()]
        expected = words(chosen)
        assert all(torch.equal(batch.inputs[name], expected[name]) for name in expected)


def test_texts_are_padded_alike_on_all_processes():
    data = {"text": TEXTS, "label": list(range(6))}
    shares = [list(Loader(data, words, batch_size=3, rank=r, world=2).batches(0)) for r in (0, 1)]
    assert [b.inputs["input_ids"].shape[1] for b in shares[0]] == [b.inputs["input_ids"].shape[1] for b in shares[1]]


def test_tokens_of_unequal_lengths_are_padded():
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4], [5, 6]], "label": [0, 1, 0]})
    batch = next(Loader(data, batch_size=3, shuffle=False).batches(0))
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]


def test_labels_by_task():
    data = {"image": torch.zeros(4, 1, 2, 2), "l": torch.arange(4), "r": torch.arange(4.0)}
    batch = next(Loader(Source.of(data, labels={"left": "l", "right": "r"}), batch_size=4).batches(0))
    assert batch.labels["left"].tolist() == batch.index.tolist()
    assert batch.labels["right"].dtype == torch.float32


def test_data_without_labels():
    batch = next(Loader(Source.of(numbers(4), labels=None), batch_size=4).batches(0))
    assert batch.labels is None
    assert set(batch.inputs) == {"pixel_values"}


# -------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("augment", [None, Augment()])
def test_workers_change_nothing(augment):
    alone = Loader(Source.of(Images(), augment=augment), batch_size=4, seed=1)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    helped = Loader(Source.of(Images(), augment=augment), batch_size=4, seed=1, workers=2)
    same(alone.batches(1, 1), helped.batches(1, 1))
    assert torch.equal(torch.rand(1), expected)  # nobody drew from the generator that training uses


def test_an_abandoned_epoch_leaves_no_workers():
    batches = Loader(Images(50), batch_size=2, workers=1).batches(0)
    next(batches)
    assert torch.multiprocessing.active_children()
    batches.close()
    del batches
    assert not torch.multiprocessing.active_children()
