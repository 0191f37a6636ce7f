# SPDX-License-Identifier: Apache-2.0
"""A model that is live in memory gives the bytes of the checkpoint that it came from.

Every family that transformers can load: the tensors that a live model presents are those of the
folder, by name, shape, dtype and bytes, with the folder at hand and without; and the folder that
is written is the streamed run's, also where the model was offloaded to disk or sharded.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fourfold
from families import FAMILIES, mostly_slow, quiet, read_back, write_checkpoint
from families.configs import tiny_config
from fourfold.config import Runtime
from fourfold.errors import SourceError, UsageError
from fourfold.models.inventory_builder import take_inventory
from fourfold.sources.live.source import LiveSource
from fourfold.sources.live.values import KEPT, _ranks_of
from fourfold.sources.safetensors import SafetensorsFolder
from fourfold.storage.source import Source
from ranks import leave_together, run_on_ranks

RECIPE = "w4a16_nvfp4_experts_only_mse"
DOCS = Path(__file__).parent.parent / "docs"
QUANTIZED = ("qwen3_moe", "qwen3_5_moe_vl", "mixtral", "gpt_oss")
LOADABLE = [name for name, family in FAMILIES.items() if not family.load_error]


def load(name: str, folder: Path, **options: Any) -> Any:
    with quiet():
        model_class = getattr(transformers, FAMILIES[name].model_class)
        return model_class.from_pretrained(folder, dtype=torch.bfloat16, **options)


def bytes_of(source: Source, key: str) -> bytes:
    info = source.tensors[key]
    slab = source.slab(key, 0, info.shape[0] if info.shape else 1)
    assert slab.dtype == info.torch_dtype
    assert tuple(slab.shape) == info.shape
    return slab.reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(live: Source, disk: Source, but: frozenset[str] = frozenset()) -> list[str]:
    """What differs between two sources, the keys `but` left out."""
    wanted = disk.tensors.keys() - but
    found = [f"{key}: in one only" for key in sorted(live.tensors.keys() ^ wanted)]
    for key in sorted(live.tensors.keys() & wanted):
        mine, theirs = live.tensors[key], disk.tensors[key]
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            found.append(f"{key}: {mine.dtype} {mine.shape}, {theirs.dtype} {theirs.shape}")
        elif bytes_of(live, key) != bytes_of(disk, key):
            found.append(f"{key}: other values")
    return found


def test_every_family_is_tried_or_named() -> None:
    assert sorted(FAMILIES.keys() - set(LOADABLE)) == ["longcat_flash_zero"]


@pytest.mark.parametrize("name", mostly_slow(LOADABLE))
def test_tensors_are_those_of_the_folder(name: str, written) -> None:
    folder, truth = written(name)
    disk = SafetensorsFolder(folder)
    model, _ = read_back(FAMILIES[name], folder)
    live = LiveSource(model)
    assert live.folder == folder
    assert live.tensors == disk.tensors
    assert differences(live, disk) == []
    assert bool(live.notes) == bool(truth.extra)

    model.name_or_path = ""
    alone = LiveSource(model)
    assert differences(alone, disk, truth.extra) == []
    assert "not on this disk" in alone.notes[0]
    alone.close()

    del model._weight_conversions  # as if it had been made here, not loaded
    scratch = LiveSource(model)
    assert differences(scratch, disk, truth.extra) == []
    scratch.close()

    negate(model)
    check_parts(live, disk, truth.extra)
    live.close()
    disk.close()


def check_parts(live: Source, disk: Source, extra: frozenset[str]) -> None:
    """Any rows and any bytes; of the live values, which are those of the folder negated."""
    for key in representatives(disk):
        value = disk.slab(key, 0, disk.tensors[key].shape[0])
        value = value if key in extra else -value
        for start, stop in ((0, 1), (len(value) // 2, len(value))):
            assert torch.equal(live.slab(key, start, stop), value[start:stop]), key
        whole = value.contiguous().view(torch.uint8).flatten().numpy()
        for start, stop in ((0, len(whole)), (3, len(whole) - 5)):
            piece = whole[start:stop].copy() * 0
            live.read_bytes(key, start, piece)
            assert piece.tobytes() == whole[start:stop].tobytes(), key


def negate(model: nn.Module) -> None:
    own = {value.data_ptr(): value for value in model.state_dict().values()}
    for value in own.values():
        if value.is_floating_point():
            value.neg_()


def representatives(disk: Source) -> list[str]:
    """One key of each kind: a name without its numbers."""
    kinds = {
        re.sub(r"\d+", "#", key): key
        for key, info in disk.tensors.items()
        if info.shape and info.dtype in {"BF16", "F32"}
    }
    return list(kinds.values())


def test_the_inventory_is_that_of_the_folder(written) -> None:
    for name in QUANTIZED:
        folder, _ = written(name)
        model, _ = read_back(FAMILIES[name], folder)
        model.name_or_path = ""
        live, disk = LiveSource(model), SafetensorsFolder(folder)
        mine, theirs = take_inventory(live), take_inventory(disk)
        assert {x for x in theirs.linears if x.role != "mtp"} == set(mine.linears)
        assert mine.biases == theirs.biases
        live.close()


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_same_files(out: Path, streamed: Path) -> None:
    mine, theirs = files_of(out), files_of(streamed)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []


@pytest.fixture(scope="session")
def streamed(written, tmp_path_factory: pytest.TempPathFactory):
    """The folder that a run from the checkpoint's folder writes."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"{name}-streamed") / "out"
            fourfold.quantize(written(name)[0], made[name], RECIPE)
        return made[name]

    return run


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_bytes_are_those_of_the_streamed_run(
    name: str, written, streamed, tmp_path: Path
) -> None:
    folder, truth = written(name)
    model = load(name, folder)
    live = LiveSource(model)
    result = fourfold.quantize(live, tmp_path / "out", RECIPE)
    live.close()
    assert result.clean, str(result.report)
    assert_same_files(tmp_path / "out", streamed(name))

    model.name_or_path = ""
    alone = LiveSource(model)
    fourfold.quantize(alone, tmp_path / "alone", RECIPE)
    alone.close()
    mine, theirs = files_of(tmp_path / "alone"), files_of(streamed(name))
    shards = sorted(file for file in theirs if file.endswith(".safetensors"))
    assert shards == sorted(file for file in mine if file.endswith(".safetensors"))
    # The shell's shard holds the MTP layers, which a model without its folder does not have.
    for shard in shards[1:] if truth.extra else shards:
        assert mine[shard] == theirs[shard], shard


@pytest.mark.parametrize("name", QUANTIZED)
def test_offloaded_to_disk_by_transformers(name: str, written, streamed, tmp_path: Path) -> None:
    folder, _ = written(name)
    with quiet():
        model = load(name, folder, device_map={"": "disk"}, offload_folder=tmp_path / "off")
    assert all(value.is_meta for value in model.parameters())
    live = LiveSource(model)
    fourfold.quantize(live, tmp_path / "out", RECIPE, runtime=Runtime(threads=3))
    assert len(live._values._recent) <= KEPT
    live.close()
    assert_same_files(tmp_path / "out", streamed(name))


def test_dispatched_by_accelerate(written, tmp_path: Path) -> None:
    """Layers on disk, on the CPU but offloaded, and in memory; buffers too."""
    folder, _ = written("deepseek_v3")
    device_map: dict[str, Any] = {
        "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
        "model.norm": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.layers.2": "disk",
    }  # fmt: skip
    model = accelerate.dispatch_model(
        load("deepseek_v3", folder),
        device_map,
        main_device="cpu",
        offload_dir=tmp_path,
        offload_buffers=True,
        force_hooks=True,
    )
    assert sum(value.is_meta for value in model.state_dict().values()) > 10
    compare_with_folder(model, folder)
    compare_with_folder(accelerate.cpu_offload(load("deepseek_v3", folder), "cpu"), folder)


def compare_with_folder(model: Any, folder: Path) -> None:
    live, disk = LiveSource(model), SafetensorsFolder(folder)
    assert differences(live, disk) == []
    live.hold(disk.tensors)
    assert live._values._held
    assert differences(live, disk) == []
    live.close()
    assert not live._values._held
    disk.close()


@pytest.mark.parametrize("name", ["qwen3_5_moe_vl"])
def test_sharded_over_two_ranks(name: str, written, streamed, tmp_path: Path) -> None:
    assert on_ranks(2, sharded, tmp_path, name, written(name)[0]) == ["[]", "[]"]
    assert_same_files(tmp_path / "out", streamed(name))


def on_ranks(size: int, check: Any, tmp_path: Path, *arguments: Any) -> list[str]:
    """What `check` returns on each of several ranks: what it found different."""
    run_on_ranks(size, run_rank, size, check, tmp_path, *arguments)
    return [(tmp_path / f"rank{rank}").read_text() for rank in range(size)]


def run_rank(rank: int, size: int, check: Any, tmp_path: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    (tmp_path / f"rank{rank}").write_text(str(check(rank, tmp_path, *arguments)))
    leave_together(size, tmp_path)


def sharded(rank: int, tmp_path: Path, name: str, folder: Path) -> list[str]:
    model = shard(load(name, folder))
    with torch.no_grad():
        model(torch.arange(8)[None])  # a calibration's forward gathers and frees the layers
    live, disk = LiveSource(model), SafetensorsFolder(folder)
    found = [] if live.is_sharded and live.rank == rank else ["not sharded"]
    try:
        live.slab("model.language_model.layers.0.mlp.experts.down_proj", 0, 1)
        found.append("read without being held")
    except SourceError as error:
        if "2 ranks" not in str(error):
            found.append(str(error))
    for unit in units(disk):
        live.hold(unit)
        found += [key for key in unit if bytes_of(live, key) != bytes_of(disk, key)]
        live.release()
    copied: list[torch.Tensor] = []
    with mock.patch.object(torch.Tensor, "cpu", lambda tensor: copied.append(tensor) or tensor):
        live.hold(units(disk)[0], keep=rank == 0)
    if bool(live._values._held) != (rank == 0) or bool(copied) != (rank == 0):
        found.append("held or copied by a rank that does not read")
    live.release()
    fourfold.quantize(live, tmp_path / "out", RECIPE)
    live.close()
    return found


def shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.slow
def test_sharded_over_some_of_the_ranks(written, tmp_path: Path) -> None:
    """Ranks 1 and 2 of three share it, in one dimension and in two; rank 0 has no part."""
    found = on_ranks(3, sharded_on_a_part, tmp_path, written("qwen3_moe")[0])
    assert found == ["rank 0: has no part of the model, which is sharded over ranks [1, 2]", "", ""]


def sharded_on_a_part(rank: int, _: Path, folder: Path) -> str:
    square = DeviceMesh("cpu", [[1], [2]], mesh_dim_names=("replicate", "shard"))
    meshes = [DeviceMesh("cpu", [1, 2]), square]
    if rank == 0:
        with pytest.raises(UsageError) as error:
            _ranks_of(meshes)
        return str(error.value).partition(". ")[0]
    for mesh in meshes:
        model = fully_shard(load("qwen3_moe", folder), mesh=mesh)
        live, disk = LiveSource(model), SafetensorsFolder(folder)
        assert live.rank == rank - 1
        assert live.gather(rank) == [1, 2]
        with torch.no_grad():
            model(torch.arange(8)[None])
        assert not isinstance(model.lm_head.weight, DTensor)  # FSDP2 leaves its root gathered
        assert live.is_sharded
        live.hold(disk.tensors)
        assert differences(live, disk) == []
        live.close()
    return ""


@pytest.mark.slow
def test_ranks_of_several_meshes(tmp_path: Path) -> None:
    """Experts on other ranks than the rest: the ranks of all, whatever this one sees."""
    assert on_ranks(3, several_meshes, tmp_path) == [
        "[(0, 3, True), (0, 3, True)]",
        "[(1, 3, True), (1, 3, True), (0, 2, False)]",
        "[(2, 3, True), (1, 2, False)]",
    ]


def several_meshes(rank: int, _: Path) -> list[tuple[int, int, bool]]:
    whole, first, last = (DeviceMesh("cpu", ranks) for ranks in ([0, 1, 2], [0, 1], [1, 2]))
    seen = {
        0: [[first, whole], [whole]],
        1: [[first, whole, last], [first, last], [last]],
        2: [[last, whole], [last]],
    }
    ranks = [_ranks_of(meshes) for meshes in seen[rank]]
    return [(each.rank, each.size, each.group is None) for each in ranks]


def units(source: Source) -> list[list[str]]:
    found: dict[int | None, list[str]] = {}
    for key, raw in take_inventory(source).tensors.items():
        found.setdefault(raw.layer, []).append(key)
    return list(found.values())


def test_dtypes_of_the_checkpoint_where_nothing_is_lost(written) -> None:
    folder, _ = written("qwen3_moe")
    model = load("qwen3_moe", folder).float()
    live, disk = LiveSource(model), SafetensorsFolder(folder)
    assert differences(live, disk) == []
    with torch.no_grad():
        model.model.norm.weight += 1e-6
    with pytest.raises(SourceError, match=r"^model\.norm\.weight: torch\.float32 in memory, BF16"):
        live.slab("model.norm.weight", 0, 1)
    model.name_or_path = ""
    alone = LiveSource(model)
    assert {info.dtype for info in alone.tensors.values()} == {"F32"}
    alone.close()


def test_values_that_are_nowhere(written) -> None:
    folder, _ = written("qwen3_moe")
    live = LiveSource(load("qwen3_moe", folder).to("meta"))
    with pytest.raises(SourceError, match=r"^model\.norm\.weight: is on the meta device"):
        live.slab("model.norm.weight", 0, 1)


def test_a_changed_model_leaves_its_folder(written, tmp_path: Path) -> None:
    """More tokens than the checkpoint had: names and config.json come from the model."""
    folder, _ = written("qwen3_moe")
    model = load("qwen3_moe", folder)
    with quiet():
        model.resize_token_embeddings(160, mean_resizing=False)
    live = LiveSource(model)
    assert "builds another Qwen3MoeForCausalLM" in live.notes[0]
    assert live.tensors["lm_head.weight"].shape == (160, 64)
    assert live.config["vocab_size"] == 160
    assert live.config["num_experts"] == live.config["num_local_experts"] == 4
    assert live.config["rope_theta"] == live.config["rope_parameters"]["rope_theta"]
    fourfold.quantize(live, tmp_path / "out", RECIPE)
    own = live.folder
    live.close()
    assert not own.exists()
    assert "num_experts" in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(SourceError, match=r"is not the live model's checkpoint"):
        LiveSource(model, checkpoint=folder)


YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}  # fmt: skip


def test_configured_otherwise_than_its_folder(written, tmp_path: Path) -> None:
    """The tensors fit, but the weights mean something else: config.json is not taken silently."""
    folder, _ = written("qwen3_moe")
    model = load("qwen3_moe", folder)
    model.config.num_experts_per_tok = 1
    model.config.rope_parameters = dict(YARN)
    with pytest.raises(SourceError) as error:
        LiveSource(model)
    assert str(error.value) == (
        f"{folder / 'config.json'}: is not the live model's configuration: "
        "num_experts_per_tok is 2 there, 1 in the model; "
        "rope_parameters.factor is null there, 4.0 in the model; "
        "rope_parameters.original_max_position_embeddings is null there, 64 in the model; "
        'rope_parameters.rope_type is "default" there, "yarn" in the model. '
        'Make both the same, or set model.name_or_path = "" before: names and config.json are '
        "then made from the model alone."
    )
    with pytest.raises(SourceError, match=r"num_experts_per_tok is 2 there, 1 in"):
        LiveSource(model, checkpoint=folder)
    alone = LiveSource(model, checkpoint="")
    assert differences(alone, SafetensorsFolder(folder)) == []
    alone.close()

    model.name_or_path = ""  # the remedy that the message names
    fourfold.quantize(model, tmp_path / "out", RECIPE)
    written_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written_config["num_experts_per_tok"] == 1
    assert written_config["rope_parameters"] == YARN
    assert written_config["rope_scaling"] == {k: v for k, v in YARN.items() if k != "rope_theta"}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters == YARN


def test_a_nested_configuration_otherwise(written) -> None:
    model = load("qwen3_5_moe_vl", written("qwen3_5_moe_vl")[0])
    model.config.text_config.num_experts_per_tok = 1
    with pytest.raises(SourceError, match=r": text_config\.num_experts_per_tok is 2 there, 1 in"):
        LiveSource(model)


def test_what_configurations_may_differ_in(written) -> None:
    """How it was loaded does not matter; what is for training and generation is a note."""
    folder, _ = written("qwen3_moe")
    model = load("qwen3_moe", folder, attn_implementation="eager").float()
    model.config.dtype, model.config.architectures = torch.float32, None
    live = LiveSource(model)
    assert (live.folder, live.notes) == (folder, ())
    model.config.use_cache = False
    model.config.pad_token_id = 3
    live = LiveSource(model)
    assert live.folder == folder
    (note,) = live.notes
    assert note.startswith(f"config.json is that of {folder}: ")
    assert "use_cache is true there, false in the model" in note
    assert "pad_token_id is 0 there, 3 in the model" in note


def test_equal_runs_are_equal_files(written, tmp_path: Path) -> None:
    """No name of a temporary folder in them: the model is called as its folder, or its class."""
    folder, _ = written("qwen3_moe")
    model = load("qwen3_moe", folder)
    for out in ("tokenizer", "tokenizer-again"):
        fourfold.quantize(model, tmp_path / out, RECIPE, tokenizer=Tokenizer())
    assert_same_files(tmp_path / "tokenizer", tmp_path / "tokenizer-again")
    assert named_in(tmp_path / "tokenizer") == folder.name
    model.name_or_path = ""
    for out in ("alone", "alone-again"):
        fourfold.quantize(model, tmp_path / out, RECIPE)
    assert_same_files(tmp_path / "alone", tmp_path / "alone-again")
    assert named_in(tmp_path / "alone") == "Qwen3MoeForCausalLM"


def named_in(out: Path) -> str:
    return json.loads((out / "quant_summary.json").read_text())["model"]


def test_the_folders_that_it_comes_from(written, tmp_path: Path, monkeypatch) -> None:
    """All that no output may lie in, also where the files beside the weights are copies."""
    shutil.copytree(written("qwen3_moe")[0], tmp_path / "model")
    model = load("qwen3_moe", tmp_path / "model")
    with closing(LiveSource(model)) as live:
        assert live.origin_folders == (tmp_path / "model",)
    with closing(LiveSource(model, tokenizer=Tokenizer())) as live:
        assert live.folder.name == "model"
        assert live.origin_folders == (live.folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    with closing(LiveSource(model, tokenizer=Tokenizer(), checkpoint=".")) as live:
        assert live.folder.name == "model"
    (tmp_path / "model" / "model.safetensors").unlink()  # the live model may still map it
    with closing(LiveSource(model)) as live:
        assert live.origin_folders == (live.folder, tmp_path / "model")
    model.name_or_path = ""
    with closing(LiveSource(model)) as live:
        assert live.origin_folders == (live.folder,)


def test_another_checkpoint_in_the_folder(written, tmp_path: Path) -> None:
    """What lies there now has other experts: its headers are not taken."""
    folder, _ = written("qwen3_moe")
    shutil.copytree(folder, tmp_path / "model")
    model = load("qwen3_moe", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # the live model may still map it
    shutil.copy(written("mixtral")[0] / "model.safetensors", tmp_path / "model")
    live = LiveSource(model)
    assert re.search(
        r"in \S+model, model\.layers\.0\.\S+ has no tensor \(\d+ such\)", live.notes[0]
    )
    assert differences(live, SafetensorsFolder(folder)) == []
    live.close()


def test_loaded_from_mxfp4(tmp_path: Path) -> None:
    """The folder holds blocks and scales, the model BF16: its names are upstream's BF16 ones."""
    config = partial(tiny_config, "gpt_oss", {"intermediate_size": 64})
    truth = write_checkpoint(replace(FAMILIES["gpt_oss"], build_config=config), tmp_path)
    packed: dict[str, torch.Tensor] = {}
    for key, value in truth.raw.items():
        if key.endswith(("gate_up_proj", "down_proj")):
            experts, ins, outs = value.shape
            codes = torch.arange(experts * outs * ins // 2) % 251
            packed[f"{key}_blocks"] = codes.byte().reshape(experts, outs, ins // 32, 16)
            packed[f"{key}_scales"] = torch.full((experts, outs, ins // 32), 120).byte()
        else:
            packed[key] = value
    save_file(packed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    live = LiveSource(
        load("gpt_oss", tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True))
    )
    shapes = {key: tuple(value.shape) for key, value in truth.raw.items()}
    assert {key: info.shape for key, info in live.tensors.items()} == shapes
    assert "quantization_config" not in live.config
    assert bytes_of(live, "model.layers.0.mlp.experts.gate_up_proj")
    live.close()


def test_side_files(written, tmp_path: Path) -> None:
    folder, _ = written("qwen3_moe")
    shutil.copytree(folder, tmp_path / "model")
    for name in ("tokenizer.json", "LICENSE"):
        (tmp_path / "model" / name).write_text("theirs")
    model = load("qwen3_moe", tmp_path / "model")
    live = LiveSource(model)
    assert sorted(map(str, live.side_files().copied)) == ["LICENSE", "tokenizer.json"]
    live.close()
    live = LiveSource(model, tokenizer=Tokenizer())
    assert sorted(map(str, live.side_files().copied)) == ["LICENSE", "tokenizer.json"]
    assert (live.folder / "tokenizer.json").read_text() == "mine"
    assert json.loads((live.folder / "config.json").read_text()) == live.config
    live.close()
    model.name_or_path = ""
    live = LiveSource(model, checkpoint=tmp_path / "model")
    assert live.folder == tmp_path / "model"
    live.close()


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("mine")


def test_a_snapshot_in_the_hub_cache(written, tmp_path: Path, monkeypatch) -> None:
    folder, _ = written("qwen3_moe")
    commit = "a" * 40
    snapshot = tmp_path / "models--someone--model" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = load("qwen3_moe", folder)
    model.name_or_path, model.config._commit_hash = "someone/model", commit
    live = LiveSource(model)
    assert (live.folder, live.notes) == (snapshot, ())
    live.close()


def test_what_is_no_model_of_transformers(written) -> None:
    with pytest.raises(UsageError, match=r"^Linear: is no model of transformers"):
        LiveSource(nn.Linear(2, 2))
    model = load("qwen3_moe", written("qwen3_moe")[0])
    model.is_quantized = True
    with pytest.raises(SourceError, match=r"^Qwen3MoeForCausalLM: is quantized in memory"):
        LiveSource(model)
    model.is_quantized = False
    model.lm_head.lora_A = nn.Parameter(torch.zeros(2, 64))
    with pytest.raises(SourceError, match=r"^lm_head\.lora_A: \[2, 64\] in the live model, miss"):
        LiveSource(model)


def test_the_page_counts_the_families() -> None:
    page = (DOCS / "live-models.md").read_text()
    assert page.count(f"{len(LOADABLE)} of {len(LOADABLE)}") == 3
