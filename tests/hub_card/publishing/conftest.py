"""A Hub on 127.0.0.1 for the client in this process, and for processes that tests start."""

import os
import shutil

import huggingface_hub.constants
import pytest
from hub_server import HubServer

from vreflection_hub_card.card import write_card
from vreflection_hub_card.inference.checkpoints import EMBEDDED


@pytest.fixture(scope="session")
def hub_server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def hub_environment(hub_server, tmp_path_factory):
    """Makes the environment of a process that talks to the fixture, with an empty cache of its own."""

    def make(token: str | None = None) -> dict[str, str]:
        personal = {"HF_HUB_OFFLINE", "HF_TOKEN"}
        environment = {name: value for name, value in os.environ.items() if name not in personal}
        environment |= {"HF_ENDPOINT": hub_server.url, "HF_HUB_DISABLE_XET": "1"}
        environment["HF_HOME"] = str(tmp_path_factory.mktemp("hf_home"))
        return environment | ({} if token is None else {"HF_TOKEN": token})

    return make


@pytest.fixture
def hub(hub_server, monkeypatch, tmp_path):
    """The fixture, as the Hub of the client in this process; `ann`, of the organisation `lab`, is logged in."""
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", hub_server.add_user("ann", ("lab",)))
    yield hub_server
    hub_server.calm()
    hub_server.repos.clear()


@pytest.fixture(scope="session")
def ready(tmp_path_factory):
    """The embedded checkpoint with a card: fit to be published. Tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("ready") / "tiny"
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("__pycache__"))
    write_card(folder, "ann/tiny")
    return folder


@pytest.fixture
def checkpoint(ready, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(ready, tmp_path / "tiny")
