"""The store of patches: loaded on demand, bounded, least recently used first; errors name the folder."""

import copy
import pickle
import shutil
import threading

import peft
import pytest
import torch

import hubtransfer as ht
from hubtransfer.models import ClassificationHead, PatchStore, RegressionHead, TransferModel
from hubtransfer.patches import DepthwiseConfig, ScaleBiasConfig
from tests.models.test_serving import Passes, moved, one_by_one, serving
from tests.tiny import batch, tiny_backbone, tiny_model

X = batch(labels=None, n=6).inputs["pixel_values"]
TASKS = ("ants", "bees", "cats", "dogs", "elks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a patch for each of five tasks, one of them of a kind that needs passes of its own."""
    folder = tmp_path_factory.mktemp("patches")
    for number, name in enumerate(TASKS):
        patch = peft.LoraConfig(r=2, target_modules="block") if name == "elks" else ScaleBiasConfig()
        model = tiny_model(3, name, patch=patch)
        moved(model, number).save_patch(folder / name)
    return folder


@pytest.fixture
def model():
    """Has one task of its own."""
    return moved(TransferModel(tiny_backbone()).add_task("own", ClassificationHead(2), patch=ScaleBiasConfig()))


def with_all(folder, names=TASKS):
    """The same tasks, loaded into the model itself."""
    model = TransferModel(tiny_backbone()).eval()
    for name in names:
        model.load_patch(folder / name)
    return model.eval()


def test_tasks_load_when_they_are_named(model, folder):
    store = model.serve(folder)
    assert len(store) == 0 and store.names() == list(TASKS) and "ants" not in store
    tasks = ["bees", "own", "ants", "elks", "bees", "ants"]
    out = model(X, task=tasks)
    assert store.resident == ("bees", "ants", "elks") and list(model.tasks) == ["own"]
    expected = with_all(folder)
    for row, task in enumerate(tasks):
        source = model if task == "own" else expected
        torch.testing.assert_close(out.logits[row], source(X[row : row + 1], task=task).logits[0])
    passes = Passes(model)
    model(X, task=tasks)
    assert sorted(passes.sizes) == [1, 5]  # elks alone
    torch.testing.assert_close(model(X, task="cats").logits, expected(X, task="cats").logits)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(model(X, task="dogs", labels=labels).loss, expected(X, task="dogs", labels=labels).loss)


@torch.no_grad()
def test_rows_of_real_networks_equal_their_patches(tmp_path):
    both = [ScaleBiasConfig(), DepthwiseConfig()]
    source = serving("timm/mobilenetv2_035", [both, ScaleBiasConfig(), both], 32)
    for name in source.tasks:
        source.save_patch(tmp_path / name, name)
    backbone = ht.Backbone.from_pretrained("timm/mobilenetv2_035", pretrained=False, image_size=32)
    backbone.load_state_dict(source.backbone.state_dict())
    model = TransferModel(backbone).add_task("plain", ClassificationHead(3)).eval()
    store = model.serve(tmp_path)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = model(x, task=["t1", "t0", "t2", "plain"]).logits
    expected = one_by_one(source, x[:3], ["t1", "t0", "t2"])
    torch.testing.assert_close(out[:3], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[3], model(x[3:], task="plain").logits[0], rtol=1e-4, atol=1e-5)
    # statistics are folded in: a scale-and-bias row is half of what lies on disk
    patch, head = source.patches["t1"], source.heads["t1"]
    trained = 4 * (patch.num_parameters() + sum(p.numel() for p in head.parameters()))
    store.forget()
    store.get("t1")
    assert store.nbytes == trained


def test_memory_is_that_of_the_patches(model, folder):
    """Two hundred tasks: nothing of the trunk is copied, and no task costs more than its own numbers."""
    names = {f"t{k}": folder / TASKS[k % 4] for k in range(200)}
    store = model.serve(names, capacity=None)
    store.hold(names)
    alone = tiny_model(3, "t", patch=ScaleBiasConfig())
    numbers = alone.patches["t"].num_parameters() + sum(p.numel() for p in alone.heads["t"].parameters())
    assert len(store) == 200 and store.nbytes == 200 * 4 * numbers
    members = store.hold(names)
    kept = {m.row.untyped_storage().data_ptr(): m.row.untyped_storage().nbytes() for m in members}
    assert sum(kept.values()) == 200 * 4 * alone.patches["t"].num_parameters()  # storages are no larger than the rows
    assert all(member.patch is None for member in members) and len({id(member.layout) for member in members}) == 1
    assert len(list(model.modules())) == len(list(moved(tiny_model(2, "own", patch=ScaleBiasConfig())).modules()))


@torch.no_grad()
def test_a_thousand_patches_stay_and_the_next_takes_the_place_of_the_oldest(model, folder):
    """A thousand is the default; all of them are the trunk once and their own numbers, and each still answers."""
    names = {f"t{k}": folder / TASKS[k % 4] for k in range(1001)}
    store, first = model.serve(names), list(names)[:1000]
    trunk = sum(p.numel() for p in model.backbone.parameters())
    store.hold(first)
    alone = tiny_model(3, "t", patch=ScaleBiasConfig())
    numbers = alone.patches["t"].num_parameters() + sum(p.numel() for p in alone.heads["t"].parameters())
    assert store.resident == tuple(first) and store.nbytes == 1000 * 4 * numbers
    assert sum(p.numel() for p in model.backbone.parameters()) == trunk
    tasks, expected = ["t0", "t999", "t501", "t998", "t0", "t3"], with_all(folder, TASKS[:4])
    passes = Passes(model)
    model(X, task=tasks)
    passes.sizes.clear()
    logits = model(X, task=tasks).logits
    assert passes.sizes == [6]
    for row, task in enumerate(tasks):
        source = TASKS[int(task[1:]) % 4]
        torch.testing.assert_close(logits[row], expected(X[row : row + 1], task=source).logits[0])
    store.get("t1000")
    assert len(store) == 1000 and "t1" not in store and "t0" in store and "t1000" in store
    assert store.nbytes == 1000 * 4 * numbers


def test_the_least_recently_used_makes_room(model, folder):
    store = model.serve(folder, capacity=2)
    store.hold(["ants", "bees"])
    store.get("ants")
    store.get("cats")
    assert store.resident == ("ants", "cats") and "bees" not in store
    store.hold(["cats", "dogs"])
    assert store.resident == ("cats", "dogs")  # a task of the running batch is not evicted for another of it
    with pytest.raises(ValueError, match="3 tasks, but at most capacity=2"):
        model(X, task=["ants", "bees", "cats"] * 2)
    assert store.resident == ("cats", "dogs")


def test_a_bound_in_bytes(model, folder):
    size = model.serve(folder).get("ants") and model.store.nbytes
    store = model.serve(folder, capacity=None, max_bytes=2 * size)
    for name in ("ants", "bees", "cats"):
        store.get(name)
    assert store.resident == ("bees", "cats") and store.nbytes == 2 * size
    with pytest.raises(ValueError, match=f"ants, bees, cats take {3 * size:,} bytes, more than max_bytes={2 * size:,}"):
        store.hold(["ants", "bees", "cats"])
    assert store.resident == ("bees", "cats")


def test_what_a_batch_was_given_outlives_its_eviction(model, folder):
    store = model.serve(folder, capacity=1)
    (ants,) = store.hold(["ants"])
    row = ants.row.clone()
    store.get("bees")
    assert "ants" not in store and torch.equal(ants.row, row)


def test_forgotten_patches_are_read_anew(model, folder, tmp_path):
    shutil.copytree(folder / "ants", tmp_path / "ants")
    store = model.serve(tmp_path)
    before = model(X, task="ants").logits
    moved(tiny_model(3, "ants", patch=ScaleBiasConfig()), 9).save_patch(tmp_path / "ants")
    assert torch.equal(model(X, task="ants").logits, before)
    store.forget("ants")
    torch.testing.assert_close(model(X, task="ants").logits, with_all(tmp_path, ["ants"])(X).logits)


def test_several_threads(model, folder):
    """Loads, evictions and passes at once give what one thread gives."""
    model.serve(folder, capacity=2)
    expected = with_all(folder)
    wanted = {name: expected(X, task=name).logits.detach() for name in TASKS}
    failures = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(15):
            one, two = (TASKS[k] for k in torch.randperm(5, generator=generator)[:2].tolist())
            with torch.no_grad():
                out = model(X, task=[one, two] * 3).logits
            for row in range(6):
                if not torch.allclose(out[row], wanted[(one, two)[row % 2]][row], atol=1e-5):
                    failures.append((one, two))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(model.store) == 2


def test_a_missing_patch_is_named_with_the_nearest(model, folder):
    store = model.serve(folder)
    with pytest.raises(FileNotFoundError, match="no patch of task 'bee': .*bee.* does not exist; did you mean 'bees'"):
        model(X, task=["ants", "bee"] * 3)
    assert len(store) == 0
    with pytest.raises(FileNotFoundError, match="did you mean 'own'"):
        model(X, task="owm")
    with pytest.raises(FileNotFoundError, match="task 'zz': its mapping does not exist"):
        model.serve({"ants": folder / "ants"}).get("zz")
    with pytest.raises(FileNotFoundError, match="'gone' from .*nowhere.* is neither a folder nor"):
        model.serve({"gone": folder / "nowhere"}).get("gone")


@pytest.mark.parametrize("name", ["../ants", "a/b", "..", "", "a\\b", "c:d"])
def test_names_that_leave_the_folder_are_refused(model, folder, name):
    model.serve(folder / "ants")
    with pytest.raises(ValueError, match="a plain name without slashes"):
        model(X, task=name)


@pytest.mark.parametrize("file", ["patch.safetensors", "head.safetensors", "patch.json"])
def test_a_damaged_patch_is_refused_and_the_rest_stays(model, folder, tmp_path, file):
    shutil.copytree(folder, tmp_path / "p")
    path = tmp_path / "p" / "bees" / file
    path.write_bytes(path.read_bytes()[:-3])
    store = model.serve(tmp_path / "p")
    store.get("ants")
    with pytest.raises(ValueError, match="task 'bees' from .*bees.*damaged"):
        model(X, task=["ants", "bees"] * 3)
    assert store.resident == ("ants",)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="task 'bees' from .*missing"):
        store.get("bees")


def test_a_patch_of_another_trunk_is_refused(folder):
    other = TransferModel(tiny_backbone(seed=5)).eval()
    other.serve(folder)
    with pytest.raises(ValueError, match="task 'ants' from .*ants.*other weights"):
        other(X, task="ants")
    mlp = TransferModel(tiny_backbone("mlp")).eval()
    mlp.serve(folder)
    with pytest.raises(ValueError, match="task 'ants' from .*other weights"):
        mlp(X, task="ants")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"max_bytes": -1}, "max_bytes must be at least 1"),
    ],
)
def test_bounds_are_checked(model, folder, options, message):
    with pytest.raises(ValueError, match=message):
        model.serve(folder, **options)
    with pytest.raises(FileNotFoundError, match="no folder with a folder for each task.*{task}"):
        model.serve(folder / "nowhere")


def test_a_store_evaluates_only(model, folder):
    model.serve(folder)
    with pytest.raises(ValueError, match="'ants' comes from the store, which only evaluates"):
        model.train()(X, task="ants")
    model.eval().merge("own")
    with pytest.raises(ValueError, match="cannot run task 'ants' while task 'own' is merged"):
        model(X, task="ants")
    model.revert()
    model(X, task="ants")
    model.store = None
    with pytest.raises(ValueError, match="unknown task 'ants'"):
        model(X, task="ants")


def test_copies_and_pickles_start_empty(model, folder):
    model.serve(folder, capacity=3).get("ants")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.store, PatchStore) and other.store.model is other
        assert (other.store.capacity, len(other.store)) == (3, 0)
        torch.testing.assert_close(other(X, task="ants").logits, model(X, task="ants").logits)


def test_headless_and_patchless_tasks(tmp_path):
    source = tiny_model(3, "head")
    moved(source).save_patch(tmp_path / "head", "head")
    source.add_task("bare", patch=ScaleBiasConfig())
    moved(source).save_patch(tmp_path / "bare", "bare")
    source.add_task("size", RegressionHead(), patch=ScaleBiasConfig())
    moved(source).save_patch(tmp_path / "size", "size")
    model = TransferModel(tiny_backbone()).eval()
    model.serve(tmp_path)
    tasks = ["bare", "head", "size"] * 2
    out = model(X, task=tasks).logits
    expected = with_all(tmp_path, ["bare", "head", "size"])
    for row, task in enumerate(tasks):
        torch.testing.assert_close(out[row], expected(X[row : row + 1], task=task).logits[0])


def test_predictions_through_the_store(model, folder):
    model.serve(folder)
    answers = model.predict({"pixel_values": X}, task=[*TASKS, "own"], batch_size=4)
    assert [len(answer.scores) for answer in answers] == [3, 3, 3, 3, 3, 2]
