"""Every test runs on one thread, offline and with a cache directory of its own."""

from __future__ import annotations

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
