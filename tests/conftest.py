"""One thread, no network, a Hugging Face home of the tests' own; the `hub` fixture is a whole Hub in this process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# huggingface_hub, transformers and torch read these once, when they are first imported
_HOME = tempfile.mkdtemp(prefix="hubtransfer-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(
    HF_HOME=_HOME,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_OIDC_RESOURCE"):
    os.environ.pop(name, None)

import torch  # noqa: E402

from tests.hub_server import HubServer  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running Hub that the real client talks to, logged in as alice; waits between retries take no time."""
    from types import SimpleNamespace

    from huggingface_hub import close_session, constants
    from huggingface_hub.utils import _http

    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HUBTRANSFER_OFFLINE", raising=False)
    # ModelCard.validate has no endpoint argument; it reads the constant at call time
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # read once, perhaps while a test had switched it on
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    try:
        yield server
    finally:
        close_session()
        server.close()
