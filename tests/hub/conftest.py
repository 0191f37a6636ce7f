# SPDX-License-Identifier: Apache-2.0
"""The stand-in of the hub, and a cache of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from families import FAMILIES, write_checkpoint

from .models import write_forty
from .stand_in import Hub, serving


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without a model, which this process asks, with a cache of its own."""
    from huggingface_hub import constants

    with serving() as hub:
        # The environment is read when huggingface_hub is imported, which others have done already.
        for name, value in client_settings(hub, tmp_path / "home").items():
            monkeypatch.setattr(constants, name, value)
        yield hub


def client_settings(hub: Hub, home: Path) -> dict[str, object]:
    """The constants of huggingface_hub as HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET set them.

    Its chunks are small, as the shards of tests are.
    """
    return {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "DOWNLOAD_CHUNK_SIZE": 1 << 14,  # what arrives is written in pieces of this size
    }


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of five shards, with other files beside it."""
    folder = tmp_path_factory.mktemp("sharded")
    write_checkpoint(FAMILIES["qwen3_moe"], folder, shards=5)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("A card.")
    return folder


@pytest.fixture(scope="session")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of forty shards."""
    folder = tmp_path_factory.mktemp("forty")
    write_forty(folder)
    return folder
