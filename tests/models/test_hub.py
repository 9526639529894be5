"""Pushing and fetching folders with the real client against the Hub of `hub_server.py`."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from hubtransfer.models import card, hub as hub_module, hub_errors
from hubtransfer.models.hub import fetch, push, push_or_local, reachable, unreachable_because
from tests.hub_server import HubServer

WEIGHTS = bytes(range(256)) * 1024  # 256 KiB, large enough to be cut in the middle


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "FIRST_WAIT", 0.001)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    (folder / "plots").mkdir(parents=True)
    (folder / "config.json").write_text('{"format": 1}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "plots" / "curve.png").write_bytes(b"png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def forget_cache() -> None:
    """As if on another machine."""
    constants.HF_HUB_CACHE += "-other"


def test_what_is_pushed_comes_back(hub: HubServer, saved: Path) -> None:
    url = push(saved, "alice/birds", commit_message="first")
    assert url == f"{hub.url}/alice/birds/commit/{hub.repos['models', 'alice/birds'].branches['main']}"
    assert hub.repos["models", "alice/birds"].commits[-1].title == "first"
    assert hub.files("alice/birds") == contents(saved)
    assert contents(fetch("alice/birds")) == contents(saved)


def test_a_name_without_owner_goes_to_the_logged_in_user(hub: HubServer, saved: Path) -> None:
    push(saved, "birds")
    assert hub.files("alice/birds") == contents(saved)


def test_a_second_push_is_a_second_commit_and_an_unchanged_one_is_none(hub: HubServer, saved: Path) -> None:
    first = push(saved, "alice/birds")
    assert push(saved, "alice/birds") == first
    (saved / "config.json").write_text('{"format": 2}')
    assert push(saved, "alice/birds") != first
    assert hub.requests("PUT", "/lfs/") == [200, 200]  # the weights and the plot, sent once
    assert (fetch("alice/birds") / "config.json").read_text() == '{"format": 2}'


def test_only_files_of_a_saved_model_travel(hub: HubServer, saved: Path) -> None:
    before = contents(saved)
    for name in (".env", "model.pkl", "pytorch_model.bin", "modeling.py", "deep/er/config.json", "plots/x/y.png"):
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_bytes(b"secret")
    push(saved, "alice/birds")
    assert hub.files("alice/birds") == before
    hub.put("alice/birds", {"evil.py": b"", "pytorch_model.bin": b"pickle", "a/config.json": b"{}"})
    assert contents(fetch("alice/birds")) == before
    forget_cache()
    assert set(contents(fetch("alice/birds", allow_patterns=["*.json", "evil.py"]))) == {"config.json"}


def test_private_repository(hub: HubServer, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(saved, "alice/secret", private=True)
    assert hub.repos["models", "alice/secret"].private
    forget_cache()
    assert contents(fetch("alice/secret", token="hf_alice_read")) == contents(saved)
    forget_cache()
    with pytest.raises(FileNotFoundError, match="your token may not see it"):
        fetch("alice/secret", token="hf_bob")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match=r"it is private: log in with `hf auth login`, or set HF_TOKEN"):
        fetch("alice/secret")


def test_private_push_to_a_public_repository_sends_nothing(hub: HubServer, saved: Path) -> None:
    hub.put("alice/open", {"config.json": b"{}"})
    with pytest.raises(ValueError, match="exists and is public"):
        push(saved, "alice/open", private=True)
    assert hub.files("alice/open") == {"config.json": b"{}"} and not hub.requests("PUT", "/lfs/")


def test_revisions(hub: HubServer, saved: Path) -> None:
    push(saved, "alice/birds")
    HfApi(endpoint=hub.url).create_tag("alice/birds", tag="v1")
    (saved / "config.json").write_text('{"format": "branch"}')
    url = push(saved, "alice/birds", revision="try/2")  # makes the branch; its name holds a slash
    push(saved, "alice/birds", revision="try/2")  # and finds it the second time

    def config(revision: str | None) -> str:
        return (fetch("alice/birds", revision=revision) / "config.json").read_text()

    assert config(None) == config("main") == config("v1") == '{"format": 1}'
    assert config("try/2") == config(url.split("/")[-1]) == '{"format": "branch"}'
    with pytest.raises(FileNotFoundError, match="no branch, tag or commit 'v2'; it has main, try/2, v1"):
        fetch("alice/birds", revision="v2")


# ---- lost connections


def test_an_interrupted_upload_is_tried_again(hub: HubServer, saved: Path) -> None:
    hub.drop("PUT", "/lfs/", after=1000)
    push(saved, "alice/birds")
    assert 0 in hub.requests("PUT", "/lfs/")
    assert contents(fetch("alice/birds")) == contents(saved)


@pytest.mark.parametrize("path", ["/api/repos/create", "/api/models/alice/birds/commit/main"])
def test_requests_the_client_gives_up_on_are_tried_again(
    hub: HubServer, saved: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    hub.drop("POST", path)
    hub.fail("POST", path, status=503)
    with caplog.at_level(logging.WARNING, "hubtransfer"):
        push(saved, "alice/birds")
    assert hub.requests("POST", path) == [0, 503, 200]
    assert [n for n in (1, 2, 3, 4) if f"attempt {n} follows" in caplog.text] == [2, 3]
    assert hub.files("alice/birds") == contents(saved)


def test_a_lost_answer_makes_no_second_commit(hub: HubServer, saved: Path) -> None:
    hub.drop("POST", "/commit/", answer_lost=True)
    url = push(saved, "alice/birds")
    assert len(hub.repos["models", "alice/birds"].commits) == 2  # the initial one and ours
    assert url.endswith(hub.repos["models", "alice/birds"].commits[-1].oid)


def test_for_ever_interrupted_leaves_the_files_whole_and_says_how_to_go_on(hub: HubServer, saved: Path) -> None:
    before = contents(saved)
    hub.drop("PUT", "/lfs/", after=1000, times=10_000)
    with pytest.raises(ConnectionError, match=r"failed 4 times.*are whole.*Push again with the same call") as caught:
        push(saved, "alice/birds")
    assert str(saved) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert contents(saved) == before
    assert hub.files("alice/birds") == {}  # nothing half-way is to be seen
    hub.faults.clear()
    push(saved, "alice/birds")
    assert hub.files("alice/birds") == before


def test_waits_double(hub: HubServer, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(hub_module, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(hub_module.time, "sleep", waits.append)
    hub.fail("POST", "/api/repos/create", status=500, times=100)
    with pytest.raises(ConnectionError, match="500"):
        push(saved, "alice/birds")
    assert waits == [1.0, 2.0, 4.0]


def test_an_interrupted_download_goes_on(hub: HubServer, saved: Path) -> None:
    push(saved, "alice/birds")
    hub.drop("GET", "/lfs/", after=100_000)
    assert contents(fetch("alice/birds")) == contents(saved)
    forget_cache()
    hub.drop("GET", "/lfs/", after=1000, times=10_000)
    with pytest.raises(ConnectionError, match=r"download of 'alice/birds'.*failed 4 times.*call again"):
        fetch("alice/birds")
    hub.faults.clear()
    assert contents(fetch("alice/birds")) == contents(saved)


def test_no_hub_means_the_cache_and_else_an_error(
    hub: HubServer, saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (saved / "plots" / "curve.png").unlink()
    push(saved, "alice/birds")
    hub.put("alice/birds", {"notes/plot.png": b"never asked for"})
    fetch("alice/birds")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    assert contents(fetch("alice/birds")) == contents(saved)
    assert "comes from the local cache" in caplog.text
    with pytest.raises(ConnectionError, match="'alice/fish' is not in the local cache"):
        fetch("alice/fish")


def test_damaged_download_is_fetched_again_and_then_refused(hub: HubServer, saved: Path) -> None:
    push(saved, "alice/birds")
    hub.damage("alice/birds", "model.safetensors")
    with pytest.raises(OSError, match=r"model\.safetensors of 'alice/birds' arrived twice with a content other"):
        fetch("alice/birds")
    hub.lfs[hashlib.sha256(WEIGHTS).hexdigest()] = WEIGHTS  # mended: the bad copy in the cache is not what we get
    assert contents(fetch("alice/birds")) == contents(saved)


# ---- refusals


@pytest.mark.parametrize(
    "name", ["../config.json", "plots/../../config.json", "/etc/config.json", "C:/config.json", "..\\config.json"]
)
def test_a_repository_with_a_file_outside_itself_is_refused(hub: HubServer, name: str) -> None:
    hub.put("bob/evil", {"config.json": b"{}", name: b"{}"})
    with pytest.raises(ValueError, match="outside its own folder") as caught:
        fetch("bob/evil")
    assert repr(name) in str(caught.value)
    assert not hub.requests("GET", "/resolve/") and not Path(constants.HF_HUB_CACHE).exists()


def test_unknown_repository_names_the_nearest(hub: HubServer, saved: Path) -> None:
    push(saved, "alice/birds")
    with pytest.raises(FileNotFoundError, match=r"no model repository 'alice/brids'.*did you mean 'alice/birds'\?"):
        fetch("alice/brids")
    with pytest.raises(FileNotFoundError, match="Check the spelling"):
        fetch("nobody/nothing")


@pytest.mark.parametrize("name", ["a/b/c", "../birds", "", "me/bird s"])
def test_what_is_no_repository_name(hub: HubServer, saved: Path, name: str) -> None:
    for call in (lambda: fetch(name), lambda: push(saved, name), lambda: push_or_local(saved, name, saved.parent)):
        with pytest.raises(ValueError, match="neither a folder nor the name of a Hub repository"):
            call()


def test_no_token(hub: HubServer, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=r"needs a token and there is none: log in with `hf auth login`"):
        push(saved, "alice/birds")
    assert hub.log == []
    push(saved, "alice/birds", token="hf_alice")
    assert contents(fetch("alice/birds")) == contents(saved)  # public: no token needed to fetch


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_wrong", "does not know this token"), ("hf_bob", "role 'write'"), ("hf_alice_read", "role 'write'")],
)
def test_a_token_that_may_not_write_sends_nothing(hub: HubServer, saved: Path, token: str, message: str) -> None:
    hub.put("alice/birds", {"config.json": b"{}"})
    with pytest.raises(PermissionError, match=message):
        push(saved, "alice/birds", token=token)
    assert not hub.requests("PUT", "/lfs/") and not hub.requests("POST", "/commit/")


def test_folders_that_hold_no_model(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        push(tmp_path / "nowhere", "alice/birds")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"has none of the files.*notes\.txt"):
        push(tmp_path, "alice/birds")
    hub.put("bob/plain", {"pytorch_model.bin": b"x"})
    with pytest.raises(FileNotFoundError, match=r"Backbone.from_pretrained\('bob/plain'\)"):
        fetch("bob/plain")


# ---- cards


def test_a_card_written_by_hand_stays_on_the_hub(hub: HubServer, saved: Path) -> None:
    made = f"---\nlicense: mit\n---\n{card.MARKER.format(name='saved')}\n# saved\n"
    (saved / "README.md").write_text(made)
    push(saved, "alice/birds")
    assert b"for alice/birds." in hub.files("alice/birds")["README.md"]
    (saved / "README.md").write_text(made + "more")
    push(saved, "alice/birds")
    assert hub.files("alice/birds")["README.md"].endswith(b"more")  # made here: replaced
    hub.put("alice/birds", {"README.md": b"# by hand"})
    (saved / "config.json").write_text("{}")
    push(saved, "alice/birds")
    assert hub.files("alice/birds")["README.md"] == b"# by hand"
    assert hub.files("alice/birds")["config.json"] == b"{}"


def test_a_card_the_hub_refuses_stops_the_push(hub: HubServer, saved: Path) -> None:
    (saved / "README.md").write_text("---\ntags: [1, 2]\n---\n")
    with pytest.raises(ValueError, match="tags must be a list of texts"):
        push(saved, "alice/birds")
    assert not hub.requests("PUT", "/lfs/")


# ---- without a Hub


def test_push_or_local(
    hub: HubServer, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    local = tmp_path / "local"
    assert push_or_local(saved, "alice/birds", local).startswith(hub.url) and not local.exists()
    hub.fail("POST", "/commit/", times=100)
    (saved / "config.json").write_text("{}")
    assert push_or_local(saved, "alice/birds", local) == str(local / "alice/birds")
    assert contents(local / "alice/birds") == contents(saved) and "failed 4 times" in caplog.text
    (local / "alice/birds/README.md").write_text("# mine")
    (saved / "plots" / "curve.png").unlink()
    monkeypatch.delenv("HF_TOKEN")
    push_or_local(saved, "alice/birds", local)
    assert contents(local / "alice/birds") == contents(saved) | {"README.md": b"# mine"}
    assert "there is no token" in caplog.text and [p.name for p in (local / "alice").iterdir()] == ["birds"]


def test_reachable(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reachable()
    hub.fail("HEAD", "/", status=502)
    assert unreachable_because() == f"{hub.url} answers with status 502"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert unreachable_because() == "HF_HUB_OFFLINE is set"
    monkeypatch.setenv("HUBTRANSFER_OFFLINE", "1")
    assert unreachable_because() == "HUBTRANSFER_OFFLINE is set"
    monkeypatch.undo()


def test_offline_mode_is_said_at_once(hub: HubServer, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        push(saved, "alice/birds")
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        fetch("alice/birds")
    assert hub.log == []


def test_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HUBTRANSFER_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")  # the discard port
    assert hub_errors.endpoint() == "http://127.0.0.1:9"
    assert "does not answer" in (unreachable_because(0.5) or "")
