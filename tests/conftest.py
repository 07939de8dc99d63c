"""Every test runs on one thread, offline and with a cache directory of its own."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A directory of tiny checkpoints, by name; not to be changed: see `copy`."""
    import tiny

    root = tmp_path_factory.mktemp("checkpoints")
    tiny.make_checkpoint(root / "mixtral", "mixtral")
    tiny.make_checkpoint(root / "mixtral-shards", "mixtral", shards=2)
    tiny.make_checkpoint(root / "granitemoe", "granitemoe")
    return root


@pytest.fixture
def copy(checkpoints, tmp_path):
    """A copy of one of `checkpoints` to spoil."""
    return lambda name: Path(shutil.copytree(checkpoints / name, tmp_path / name))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_user_directories(tmp_path_factory, monkeypatch):
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The files of a repository: a checkpoint in shards, a tokenizer, and much that nobody needs."""
    import tiny

    path = tmp_path_factory.mktemp("published")
    tiny.make_checkpoint(path, "mixtral", vocab_size=tiny.CHAT_VOCABULARY, shards=5)
    tiny.add_tokenizer(path)
    for name in ("README.md", "pytorch_model.bin", "figures/plot.png", "original/m.pth", "consolidated.safetensors"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"not needed")
    return path


@pytest.fixture
def server(published, tmp_path, monkeypatch):
    """A fake hub that has `published`, asked by this process and by those that it starts; the hub's cache is empty."""
    import fake_hub
    from huggingface_hub import constants

    with fake_hub.serving() as serving:
        serving.models[fake_hub.NAME] = published
        monkeypatch.delenv("HF_HUB_OFFLINE")
        environment = {"HF_ENDPOINT": serving.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_TOKEN_PATH": "/nowhere"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        url = serving.url + "/{repo_id}/resolve/{revision}/{filename}"
        read_at_import = {"HF_HUB_OFFLINE": False, "ENDPOINT": serving.url, "HUGGINGFACE_CO_URL_TEMPLATE": url}
        for name, value in (read_at_import | {"HF_HUB_CACHE": environment["HF_HUB_CACHE"]}).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("time.sleep", lambda _: None)  # between the library's attempts
        yield serving


@pytest.fixture
def here(monkeypatch):
    """What would run in a process of its own runs in this one."""

    from pocketmoe.offload import hub_source, loading, survey

    def run(function, arguments, on_progress=None, on_notice=None, *_what, **_named):
        module, _, name = function.partition(":")
        call = getattr(importlib.import_module(module), name)
        return json.loads(json.dumps(call(**arguments, on_progress=on_progress, on_notice=on_notice), default=str))

    for module in (loading, hub_source, survey):
        monkeypatch.setattr(module, "run_apart", run)
