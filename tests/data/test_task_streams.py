"""Streams of tasks are views of one data set, fixed by one seed."""

import datasets
import numpy as np
import pytest
import torch

from hubtransfer.data import (
    Loader,
    SingleTask,
    Table,
    TaskStream,
    blurred_stream,
    domain_tasks,
    noised_tasks,
    permuted_tasks,
    rotated_tasks,
    split_tasks,
)
from hubtransfer.data.seeds import row_bytes
from hubtransfer.data.table_views import Noised
from hubtransfer.data.task_streams import angle_of, noise_of, rotation


def images(count=12, shape=(4, 6), classes=3):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(count) % classes}


def pixels(source):
    return source.table.gather(torch.arange(len(source.table)))["pixel_values"]


def test_permuted_tasks_move_the_pixels_of_every_image_alike_and_the_first_task_is_permuted_too():
    data = images()
    stream = permuted_tasks(data, images(6), tasks=3, seed=4)
    assert stream.kind == "domain"
    assert [task.name for task in stream] == ["permuted-1", "permuted-2", "permuted-3"]
    flat, orders = data["pixel_values"].flatten(1), []
    for task in stream:
        moved = pixels(task.train_source).flatten(1)
        origin = task.train_source.table.origin
        orders.append(origin)
        assert sorted(origin.tolist()) == list(range(24))
        assert torch.equal(moved, flat[:, origin])
        ((source, _),) = task.evaluations().values()
        assert torch.equal(source.table.origin, origin), "evaluated as it was trained"
        assert torch.equal(task.train_source.table.labels("labels"), data["labels"])
    assert len({tuple(order.tolist()) for order in orders} | {tuple(range(24))}) == 4


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (3, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_moved_images_lie_in_memory_one_after_another(shape, dtype):
    data = {**images(), "pixel_values": images(shape=shape)["pixel_values"].to(dtype)}
    if dtype.is_floating_point and shape == (4, 6, 3):
        data["pixel_values"] = data["pixel_values"].permute(0, 3, 1, 2)  # channels first, as all real numbers are
    moved = pixels(permuted_tasks(data, tasks=1)[0].train_source)
    assert moved.is_contiguous() and moved.shape == data["pixel_values"].shape


def test_one_seed_fixes_the_tasks_whatever_is_drawn_elsewhere():
    def order(seed):
        return permuted_tasks(images(), tasks=2, seed=seed)[1].train_source.table.origin

    one = order(1)
    torch.manual_seed(9)
    np.random.seed(9)
    assert torch.equal(one, order(1))
    assert not torch.equal(one, order(2))
    longer = permuted_tasks(images(), tasks=5, seed=1)[1].train_source.table.origin
    assert torch.equal(one, longer), "more tasks leave the first ones as they were"
    assert angle_of(3, 180.0, 1) == angle_of(3, 180.0, 1) != angle_of(3, 180.0, 2)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_tasks_copy_nothing(shape):
    data = images(40, shape)
    stream = permuted_tasks(data, tasks=20)
    tables = [task.train_source.table for task in stream]
    assert {table.base.values["pixel_values"].data_ptr() for table in tables} == {data["pixel_values"].data_ptr()}
    assert len({table.fingerprint() for table in tables}) == 20
    reader = Loader(stream[0].train_source, batch_size=8)._readers[""]
    assert reader.bytes == 0


def test_channels_of_a_pixel_stay_together():
    colour = images(3, (4, 6, 3))
    first = colour["pixel_values"].permute(0, 3, 1, 2).float()
    one = permuted_tasks(colour, tasks=1)[0].train_source
    two = permuted_tasks({**colour, "pixel_values": first}, tasks=1)[0].train_source
    assert torch.equal(pixels(one).permute(0, 3, 1, 2).float(), pixels(two))
    before = {tuple(pixel) for pixel in colour["pixel_values"][0].reshape(-1, 3).tolist()}
    assert {tuple(pixel) for pixel in pixels(one)[0].reshape(-1, 3).tolist()} == before


@pytest.mark.parametrize("make", [permuted_tasks, rotated_tasks, noised_tasks])
def test_every_task_may_have_a_head_of_its_own(make):
    stream = make(images(), tasks=2, kind="task")
    assert [task.task for task in stream] == [task.name for task in stream]
    assert torch.equal(pixels(stream[1].train_source), pixels(make(images(), tasks=2)[1].train_source))
    with pytest.raises(ValueError, match="the same classes all along.*not 'class'"):
        make(images(), tasks=2, kind="class")


@pytest.mark.parametrize("degrees", [0, 13.7, 90, 121.3, 180])
def test_rotation_is_that_of_pil(degrees):
    from PIL import Image

    data = images(4, (9, 9))
    origin = rotation(9, 9, degrees)
    padded = torch.cat([data["pixel_values"].flatten(1), torch.zeros(4, 1, dtype=torch.uint8)], dim=1)
    ours = padded[:, origin].reshape(4, 9, 9)  # -1 is the column of zeros
    for image, turned in zip(data["pixel_values"], ours):
        expected = np.asarray(Image.fromarray(image.numpy()).rotate(degrees))
        assert np.array_equal(turned.numpy(), expected)


def test_rotated_tasks_turn_by_uniform_angles():
    stream = rotated_tasks(images(4, (9, 9)), tasks=2, seed=3)
    for number, task in enumerate(stream):
        assert torch.equal(task.train_source.table.origin, rotation(9, 9, angle_of(number, 180.0, 3)))
    angles = np.array([angle_of(number, 180.0, seed) for number in range(20) for seed in range(50)])
    assert 0 <= angles.min() < 2
    assert 178 < angles.max() < 180
    assert abs(angles.mean() - 90) < 5 * 52 / np.sqrt(1000)  # a uniform angle's standard deviation is 52 degrees
    assert (pixels(stream[0].train_source) == 0).any(), "outside is black"


def test_bytes_of_rows_are_those_of_the_published_generator():
    """First outputs of splitmix64 for two seeds, as published with its C code and in its test vectors."""
    outputs = {0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4], 1234567: [6457827717110365317, 3203168211198807973]}
    for seed, words in outputs.items():
        expected = [list(word.to_bytes(8, "little")) for word in words]
        assert row_bytes(seed, torch.tensor([0]), 16).tolist() == [expected[0] + expected[1]]
        assert row_bytes(seed, torch.tensor([1, 0]), 5).tolist() == [expected[1][:5], expected[0][:5]]
    many = row_bytes(3, torch.arange(500), 784).double()
    assert abs(many.mean() - 127.5) < 5 * 73.9 / np.sqrt(500 * 784)  # standard deviation of a byte: 73.9
    assert np.corrcoef(many[:-1].flatten(), many[1:].flatten())[0, 1] < 5 / np.sqrt(500 * 784)


def test_noised_tasks_put_noise_of_each_image_behind_it():
    data, stream = images(40, (9, 9)), noised_tasks(images(40, (9, 9)), images(40, (9, 9)), tasks=3, seed=2)
    assert [task.name for task in stream] == ["noised-1", "noised-2", "noised-3"]
    noises = []
    for number, task in enumerate(stream):
        share = noise_of(number, 1.0, 2)
        black = torch.zeros(40, 9, 9, dtype=torch.uint8)
        table = task.train_source.table
        noise = Noised(Table.of({"pixel_values": black}), "pixel_values", share, table.seed).gather(torch.arange(40))
        noises.append(noise["pixel_values"])
        assert torch.equal(pixels(task.train_source), torch.maximum(data["pixel_values"], noises[-1]))
        assert noises[-1].min() == 0 and abs(float(noises[-1].max()) - 255 * share) < 2
        assert abs(float(noises[-1].double().mean()) - 127.5 * share) < 0.5 + 5 * 74 * share / np.sqrt(40 * 81)
        assert not torch.equal(noises[-1][0], noises[-1][1]), "each image has its own"
        ((source, _),) = task.evaluations().values()
        assert source.table.level == table.level
        assert not torch.equal(pixels(source), pixels(task.train_source)), "test images have noise of their own"
        assert torch.equal(task.train_source.table.labels("labels"), data["labels"])
    assert not torch.equal(noises[0] > 128 * noise_of(0, 1.0, 2), noises[1] > 128 * noise_of(1, 1.0, 2))
    shares = np.array([noise_of(number, 0.5, seed) for number in range(20) for seed in range(50)])
    assert 0 <= shares.min() < 0.01 and 0.49 < shares.max() < 0.5


def test_noise_is_the_same_whenever_a_row_is_read_and_costs_no_memory():
    stream = noised_tasks(images(40, (9, 9)), tasks=20, seed=1)
    table = stream[4].train_source.table
    whole, order = pixels(stream[4].train_source), torch.tensor([7, 3, 39, 3])
    assert torch.equal(table.gather(order)["pixel_values"], whole[order])
    again = noised_tasks(images(40, (9, 9)), tasks=5, seed=1)[4].train_source
    assert torch.equal(pixels(again), whole), "other processes see the same"
    assert again.table.fingerprint() == table.fingerprint()
    assert len({task.train_source.table.fingerprint() for task in stream}) == 20
    assert table.column("pixel_values") is None and table.column("labels").tolist() == [i % 3 for i in range(40)]
    loader = Loader(stream[4].train_source, batch_size=8)
    seen = [torch.cat([b.inputs["pixel_values"][b.index.argsort()] for b in loader.batches(epoch)]) for epoch in (0, 1)]
    assert {tuple(row) for row in seen[0].flatten(1).tolist()} == {tuple(row) for row in seen[1].flatten(1).tolist()}
    assert loader._readers[""].bytes == 0


def test_images_of_real_numbers_get_the_same_noise():
    black = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    raw, real = (Noised(Table.of({"x": x}), "x", 0.7, 5).gather(torch.arange(2))["x"] for x in (black, black.double()))
    assert real.dtype == torch.float64
    torch.testing.assert_close(real, raw.double() / 255)
    for bad, message in (({"strength": 1.5}, "between 0 and 1"), ({"base": Table.of({"x": black.int()})}, "neither")):
        with pytest.raises(ValueError, match=message):
            Noised(**{"base": Table.of({"x": black}), "column": "x", "strength": 0.5, "seed": 0, **bad})
    with pytest.raises(ValueError, match="share of white, between 0 and 1, not 2"):
        noised_tasks(images(), max_noise=2)


@pytest.mark.parametrize("kind", ["class", "task", "domain"])
def test_split_by_label(kind):
    data = images(20, classes=5)
    stream = split_tasks(data, images(10, classes=5), classes=2, kind=kind)
    assert [task.name for task in stream] == ["0-1", "2-3", "4"]
    assert stream.kind == kind
    second = stream[1].train_source
    labels = second.table.labels("labels")
    assert sorted(labels.unique().tolist()) == ([2, 3] if kind == "class" else [0, 1])
    rows = torch.isin(data["labels"], torch.tensor([2, 3]))
    assert torch.equal(pixels(second), data["pixel_values"][rows])
    assert torch.equal(labels, data["labels"][rows] - (0 if kind == "class" else 2))
    assert stream[1].task == ("2-3" if kind == "task" else None)
    evaluated = stream.evaluations()["2-3"][0].table.labels("labels")
    assert set(evaluated.tolist()) == set(labels.tolist())


def test_split_takes_named_classes_and_a_seeded_order():
    data = images(20, classes=5)
    assert [task.name for task in split_tasks(data, classes=[[4, 0], [2]])] == ["4-0", "2"]
    shuffled = [task.name for task in split_tasks(data, classes=1, shuffle=True, seed=1)]
    assert sorted(shuffled) == ["0", "1", "2", "3", "4"]
    assert shuffled == [task.name for task in split_tasks(data, classes=1, shuffle=True, seed=1)]
    assert any([t.name for t in split_tasks(data, classes=1, shuffle=True, seed=s)] != shuffled for s in range(2, 5))


@pytest.mark.parametrize("kind", ["class", "task", "domain"])
def test_evaluation_data_may_lack_the_highest_class(kind):
    data = images(12, classes=4)
    few = {"pixel_values": data["pixel_values"][:6], "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    stream = split_tasks(data, few, classes=2, kind=kind)
    evaluated = stream.evaluations()["2-3"][0].table.labels("labels")
    assert evaluated.tolist() == ([2, 2] if kind == "class" else [0, 0])


@pytest.mark.parametrize("kind", ["class", "task", "domain"])
@pytest.mark.parametrize("missing", [-1, -100])
def test_examples_without_a_label_are_in_no_task(kind, missing):
    data = images(8) | {"labels": torch.tensor([0, 1, 2, 3, missing, missing, 0, 1])}
    stream = split_tasks(data, data, classes=2, kind=kind)
    assert [(task.name, len(task.train_source.table)) for task in stream] == [("0-1", 4), ("2-3", 2)]
    assert torch.equal(pixels(stream[1].train_source), data["pixel_values"][2:4])
    assert stream[0].train_source.table.labels("labels").tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=rf"class {missing} is not among the labels, which are \[0, 1, 2, 3\]"):
        split_tasks(data, classes=[[0, 1], [2, missing]])


def test_split_by_a_domain_column():
    data = {**images(12), "place": ["sea", "land", "air"] * 4}
    stream = domain_tasks(data, data, column="place")
    assert [task.name for task in stream] == ["air", "land", "sea"]
    assert torch.equal(pixels(stream[2].train_source), data["pixel_values"][0::3])
    with pytest.raises(ValueError, match="did you mean 'place'"):
        domain_tasks(data, column="plac")
    with pytest.raises(ValueError, match="domain 'air' has no evaluation examples"):
        domain_tasks(data, {**images(2), "place": ["sea", "land"]}, column="place")


@pytest.mark.parametrize("numbers", [torch.arange(12) % 12, (torch.arange(12) % 12).tolist()])
def test_domains_that_are_whole_numbers_come_in_their_order(numbers):
    stream = domain_tasks({**images(12), "year": numbers}, column="year")
    assert [task.name for task in stream] == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"]
    texts = domain_tasks({**images(3), "place": ["10", "9", "north"]}, column="place")
    assert [task.name for task in texts] == ["10", "9", "north"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_angles_and_blurs_that_are_no_numbers_are_refused(bad):
    with pytest.raises(ValueError, match=f"max_angle must be a finite number of degrees, got {bad}"):
        rotated_tasks(images(), max_angle=bad)
    with pytest.raises(ValueError, match=f"blur must be finite and not negative, got {bad}"):
        blurred_stream(permuted_tasks(images(), tasks=2), blur=bad)


def test_a_blurred_stream_gives_every_example_once_and_blur_mixes_tasks():
    data = images(60, classes=6)
    tasks = split_tasks(data, data, classes=2)
    sharp, soft = (blurred_stream(tasks, blur=blur, seed=1) for blur in (0.0, 0.3))

    def order(stream):
        table = stream.train_source.table
        found = table.gather(torch.arange(len(table)))
        seen = {tuple(image.flatten().tolist()) for image in found["pixel_values"]}
        assert len(seen) == len(table) == 60
        return found["labels"] // 2

    assert torch.equal(order(sharp), torch.arange(3).repeat_interleave(20))
    mixed = order(soft)
    assert not torch.equal(mixed, mixed.sort().values)
    assert mixed[:15].float().mean() < mixed[-15:].float().mean()
    batch = next(iter(Loader(sharp.train_source, batch_size=7).batches(0)))
    assert torch.equal(batch.labels // 2, torch.zeros(7).long()), "a stream is read in its own order"
    assert set(sharp.evaluations()) == {"0-1", "2-3", "4-5"}


def test_what_cannot_be_split_is_named():
    data = images(12)
    with pytest.raises(ValueError, match="at least one task"):
        permuted_tasks(data, tasks=0)
    with pytest.raises(ValueError, match="images of one size"):
        permuted_tasks({"pixel_values": torch.zeros(4, 8), "labels": torch.zeros(4).long()}, tasks=2)
    with pytest.raises(ValueError, match="only images"):
        permuted_tasks({"text": ["a", "b"], "labels": [0, 1]}, tasks=2)
    with pytest.raises(ValueError, match="class 1 is in two tasks"):
        split_tasks(data, classes=[[0, 1], [1, 2]])
    with pytest.raises(ValueError, match=r"class 7 is not among the labels, which are \[0, 1, 2\]"):
        split_tasks(data, classes=[[0, 7]])
    with pytest.raises(ValueError, match="no example of the classes 2"):
        split_tasks(data, images(2), classes=[[0, 1], [2]])
    with pytest.raises(ValueError, match="no column of class numbers"):
        split_tasks({"pixel_values": data["pixel_values"], "labels": torch.rand(12)}, classes=1)
    with pytest.raises(ValueError, match="blur must be finite and not negative"):
        blurred_stream(split_tasks(data, classes=1), blur=-1)
    with pytest.raises(ValueError, match="no example knows its head"):
        blurred_stream(split_tasks(data, classes=1, kind="task"))


def test_views_are_tables_with_content_hashes():
    data = Table.of(images(12))
    one, two = (split_tasks(data, classes=[group]) for group in ([0, 1], [0, 2]))
    prints = {stream[0].train_source.table.fingerprint() for stream in (one, two)} | {data.fingerprint()}
    assert len(prints) == 3
    again = split_tasks(Table.of(images(12)), classes=[[0, 1]])
    assert again[0].train_source.table.fingerprint() == one[0].train_source.table.fingerprint()


def test_a_data_set_of_the_datasets_library_is_split_by_label_by_domain_or_listed():
    rows = {"pixel_values": [[[[k]]] for k in range(8)], "labels": [0, 1, 2, 3] * 2, "place": ["sea", "land"] * 4}
    data = datasets.Dataset.from_dict(rows).with_format("torch")
    by_label, by_place = split_tasks(data, classes=2), domain_tasks(data, column="place")
    listed = TaskStream([SingleTask(data, name="a"), SingleTask(data.select(range(3)), name="b")], kind="task")

    def numbers(item):
        return pixels(item.train_source).flatten().tolist()

    assert {item.name: numbers(item) for item in by_label} == {"0-1": [0, 1, 4, 5], "2-3": [2, 3, 6, 7]}
    assert {item.name: numbers(item) for item in by_place} == {"land": [1, 3, 5, 7], "sea": [0, 2, 4, 6]}
    assert [numbers(item) for item in listed] == [list(range(8)), [0, 1, 2]]
