# SPDX-License-Identifier: Apache-2.0
"""A model on the hub is planned from its headers, and what is wrong with it is said in one line."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch

import fourfold
from fourfold.config import OutputConfig, Runtime
from fourfold.errors import SourceError, UsageError
from fourfold.run.estimate import estimate
from fourfold.sources.hub import HubSource
from fourfold.sources.safetensors import SafetensorsFolder, open_source
from jobs import W4A16

from .helpers import HEADER, NAME, message_of, sizes_of
from .stand_in import Hub


def test_a_plan_fetches_no_weight(hub: Hub, sharded: Path) -> None:
    commit = hub.add(NAME, sharded)
    plan, expected = fourfold.plan(NAME), fourfold.plan(sharded)
    assert plan.rows == expected.rows
    assert [shard.tensors for shard in plan.shards] == [shard.tensors for shard in expected.shards]
    assert plan.side_files == expected.side_files
    assert plan.base_model == NAME
    assert any(commit in note for note in plan.notes)
    assert any("kept in the hub's cache" in note for note in plan.notes)
    assert all(hub.sent[name] <= HEADER for name in sizes_of(sharded))
    estimated = estimate(plan)
    assert estimated.bytes_per_second is None
    assert "fetching the shards comes on top" in str(estimated)
    assert not estimate(expected).fetches


def test_its_tensors_are_those_of_the_folder(hub: Hub, sharded: Path) -> None:
    hub.add(NAME, sharded)
    folder = open_source(sharded)
    with closing(open_source(NAME)) as source:
        assert isinstance(source, HubSource)
        assert source.config == folder.config
        for key, info in folder.tensors.items():
            ours = source.tensors[key]
            assert (ours.shape, ours.dtype, ours.start) == (info.shape, info.dtype, info.start)
            assert torch.equal(source.read(key), folder.read(key))
    assert all(hub.gets[name] == 2 for name in sizes_of(sharded))  # the header, then all of it


def test_one_file_without_an_index(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(sharded / "config.json", model)
    tensors = {k: v for x in sharded.glob("*.safetensors") for k, v in load_file(x).items()}
    save_file(tensors, model / "weights.safetensors")
    hub.add(NAME, model)
    assert fourfold.plan(NAME).rows == fourfold.plan(model).rows


def test_other_weights_and_folders_of_others_are_not_fetched(
    hub: Hub, sharded: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(sharded, model)
    (model / "original").mkdir()
    (model / "original" / "params.json").write_text("{}")
    (model / "fp8").mkdir()
    shutil.copy(sharded / "config.json", model / "fp8")
    (model / "fp8" / "model.safetensors").write_bytes(b"other")
    (model / "pytorch_model.bin").write_bytes(b"pickled")
    (model / "video.mp4").write_bytes(b"\0" * (2 << 20))
    (model / ".gitattributes").write_text("*.safetensors filter=lfs")
    hub.add(NAME, model)
    plan = fourfold.plan(NAME)
    assert {str(path) for path in plan.side_files.copied} == {"README.md", "tokenizer.json"} | {
        path.name for path in sharded.glob("generation_config.json")
    }
    for name in ("original/params.json", "fp8/config.json", "pytorch_model.bin", "video.mp4"):
        assert not hub.gets[name]


def test_a_revision_may_be_named(hub: Hub, sharded: Path, forty: Path) -> None:
    first = hub.add(NAME, sharded)
    hub.add(NAME, forty)
    assert fourfold.plan(f"{NAME}@{first}").rows == fourfold.plan(sharded).rows
    assert fourfold.plan(f"{NAME}@main").rows == fourfold.plan(forty).rows


def test_tied_tensors_are_compared_without_fetching_their_shards(
    hub: Hub, tmp_path: Path, sharded: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(sharded, model)
    config = (model / "config.json").read_text()
    assert '"tie_word_embeddings": false' in config
    (model / "config.json").write_text(
        config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    tensors = {k: v for x in model.glob("*.safetensors") for k, v in load_file(x).items()}
    for path in [*model.glob("*.safetensors*")]:
        path.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["more"] = torch.zeros(1 << 20)  # so that a header is little of the file
    save_file(tensors, model / "model.safetensors")
    hub.add(NAME, model)
    fourfold.plan(NAME)
    assert hub.ranges  # of the two tensors
    assert hub.sent["model.safetensors"] < 1 << 20


# ------------------------------------------------------------------------------------ errors


def test_a_gated_model(hub: Hub, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, sharded)
    hub.models[NAME].is_gated = True
    message = message_of(lambda: fourfold.plan(NAME), SourceError)
    assert "has to grant access" in message
    assert f"{hub.url}/{NAME}" in message
    assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert fourfold.plan(NAME).linears


def test_no_such_model(hub: Hub) -> None:
    message = message_of(lambda: fourfold.plan("somebody/else"), SourceError)
    assert message.startswith("somebody/else: no such folder, and no such model on the hub")


def test_no_such_revision(hub: Hub, sharded: Path) -> None:
    hub.add(NAME, sharded)
    message = message_of(lambda: fourfold.plan(f"{NAME}@v9"), SourceError)
    assert "no revision v9" in message


def test_a_missing_shard(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(sharded, model)
    (model / "model-00003-of-00005.safetensors").unlink()
    hub.add(NAME, model)
    message = message_of(lambda: fourfold.plan(NAME), SourceError)
    assert "names model-00003-of-00005.safetensors, which is missing on the hub" in message


def test_an_index_that_leaves_the_folder(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(sharded, model)
    index = model / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00003", "../model-00003", 1))
    hub.add(NAME, model)
    assert "Do not use this checkpoint" in message_of(lambda: fourfold.plan(NAME), SourceError)


def test_no_config(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.gguf").write_bytes(b"GGUF")
    hub.add(NAME, tmp_path / "model")
    assert "no config.json on the hub. It holds GGUF" in message_of(lambda: fourfold.plan(NAME))


def test_no_safetensors(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(sharded / "config.json", tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"pickled")
    hub.add(NAME, tmp_path / "model")
    assert "only pickled weights" in message_of(lambda: fourfold.plan(NAME), SourceError)


def test_a_broken_header(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(sharded, model)
    shard = model / "model-00003-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    hub.add(NAME, model)
    assert "model-00003-of-00005.safetensors" in message_of(lambda: fourfold.plan(NAME))


def test_a_hub_that_does_not_answer(
    hub: Hub, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cache holds whole is used, as transformers does; nothing else can be."""
    from huggingface_hub import constants

    hub.add(NAME, sharded)
    with closing(open_source(NAME)) as source:
        for key in source.tensors:
            source.read(key)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with closing(open_source(NAME)) as source:
        assert type(source) is SafetensorsFolder
    message = message_of(lambda: open_source("somebody/else"), SourceError)
    assert message.startswith("somebody/else: no such folder, and the hub does not give it")


def test_options_that_have_no_effect(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    kept = Runtime(keep_source=True)
    message = message_of(
        lambda: fourfold.quantize(sharded, tmp_path / "out", runtime=kept), UsageError
    )
    assert "only for a model on the hub" in message
    hub.add(NAME, sharded)
    runtime, output = Runtime(keep_source=False), OutputConfig(preview=True)
    message = message_of(
        lambda: fourfold.quantize(NAME, tmp_path / "out", W4A16, runtime=runtime, output=output)
    )
    assert "`preview`" in message
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("quantize: [experts]\nfolds: {smooth: auto}\n")
    message = message_of(
        lambda: fourfold.quantize(NAME, tmp_path / "out", recipe, runtime=runtime), UsageError
    )
    assert "reads the source twice" in message
    assert not (tmp_path / "out").exists()
