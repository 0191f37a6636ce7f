# SPDX-License-Identifier: Apache-2.0
"""Plans: every tensor has a row, and everything that can fail is found before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourfold
import large
from executing import assert_same_shards, execute
from families import FAMILIES, Truth, mostly_slow, write_checkpoint
from fourfold.config import OutputConfig
from fourfold.distributed.machine import peak_resident
from fourfold.evaluation.inspection import inspect
from fourfold.planning import Action, Limits
from fourfold.sources.safetensors import SafetensorsFolder
from nvfp4_folders import tensors_of

Written = Callable[[str], tuple[Path, Truth]]
EXPERTS = "w4a16_nvfp4_experts_only_mse"


@pytest.fixture
def copy(written: Written, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of its own, to be changed."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(written(name)[0], tmp_path / name))

    return make


def recipe(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return file


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", mostly_slow(sorted(set(FAMILIES) - {"jetmoe"})))
def test_every_tensor_has_one_row(name: str, written: Written) -> None:
    folder, truth = written(name)
    plan = fourfold.plan(folder, "w4a16_nvfp4_default")
    assert sorted(row.key for row in plan.rows) == sorted(truth.raw)
    assert sum(row.linears for row in plan.rows) == len(plan.linears)
    written_names = [name for shard in plan.shards for name in shard.tensors]
    assert len(written_names) == len(set(written_names))
    assert sum(shard.nbytes for shard in plan.shards) == sum(row.nbytes_after for row in plan.rows)
    routed = {
        row.key for row in plan.rows if row.role == "experts" and len(truth.raw[row.key].shape) > 1
    }
    assert all(row.action is not Action.COPY for row in plan.rows if row.key in routed)
    assert not any(row.action is Action.QUANTIZE for row in plan.rows if row.role == "router")


def test_no_weight_is_read(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a plan must not read weights")

    monkeypatch.setattr(SafetensorsFolder, "_read", refuse)
    fourfold.plan(written("qwen3_5_moe_vl")[0], EXPERTS)


def test_routers_and_mtp_are_kept(written: Written) -> None:
    plan = fourfold.plan(written("qwen3_5_moe_vl")[0], "w4a16_nvfp4_default")
    actions = {row.key: row.action for row in plan.rows}
    assert actions["model.language_model.layers.0.mlp.gate.weight"] is Action.COPY
    assert actions["model.language_model.layers.0.mlp.shared_expert_gate.weight"] is Action.COPY
    assert {row.action for row in plan.rows if row.role == "mtp"} == {Action.COPY}
    assert {row.action for row in plan.rows if row.role == "vision"} == {Action.COPY}
    assert "mtp.layers.0.mlp.experts" in plan.ignore
    assert "mtp.fc" in plan.ignore


def test_mtp_is_quantized_where_the_recipe_says_so(written: Written, tmp_path: Path) -> None:
    for name, count in (("qwen3_5_moe_vl", 12), ("deepseek_v3_mtp", 12)):
        file = recipe(tmp_path, "quantize: [mtp]")
        result = fourfold.quantize(written(name)[0], tmp_path / name, file)
        assert result.clean, result.report
        experts = [linear for linear in result.plan.linears if linear.expert is not None]
        assert len(experts) == count
        assert not any("gate" in x.name.rpartition(".")[2].split("_")[-1:] for x in experts)
        assert not any(
            x.name.endswith((".gate", "_gate", "eh_proj", ".fc")) for x in result.plan.linears
        )


def test_a_role_that_the_model_lacks(written: Written, tmp_path: Path) -> None:
    with pytest.raises(fourfold.RecipeError, match=r"the model has no experts. It has: .*mlp"):
        fourfold.plan(written("qwen3")[0], EXPERTS)
    file = recipe(tmp_path, "quantize_if_present: [linear_attention, mtp]")
    with pytest.raises(fourfold.RecipeError, match="has none of linear_attention, mtp"):
        fourfold.plan(written("qwen3")[0], file)


def test_a_pattern_that_matches_nothing(written: Written, tmp_path: Path) -> None:
    file = recipe(tmp_path, "quantize: [experts]\nkeep: ['model.layers.1.mlp.expert.*']")
    with pytest.raises(fourfold.RecipeError) as caught:
        fourfold.plan(written("qwen3_moe")[0], file)
    assert "'model.layers.1.mlp.expert.*' matches no linear" in str(caught.value)
    assert "The nearest: model.layers.1.mlp.experts." in str(caught.value)


def test_keep_pattern_keeps_a_layer(written: Written, tmp_path: Path) -> None:
    file = recipe(tmp_path, "quantize: [experts]\nkeep: ['*.layers.1.mlp.experts.*']")
    result = fourfold.quantize(written("qwen3_moe")[0], tmp_path / "out", file)
    assert result.clean, result.report
    assert {linear.layer for linear in result.plan.linears} == {2}
    assert "model.layers.1.mlp.experts" in result.plan.ignore


@pytest.mark.parametrize(
    "pattern", ["*.layers.1.mlp.experts.0.*", "*.up_proj", "*experts.1.down_proj"]
)
def test_half_of_what_engines_fuse(pattern: str, written: Written, tmp_path: Path) -> None:
    file = recipe(tmp_path, f"quantize: [experts]\nkeep: ['{pattern}']")
    with pytest.raises(fourfold.PlanError, match="engines fuse them"):
        fourfold.plan(written("qwen3_moe")[0], file)


def test_keeping_everything(written: Written, tmp_path: Path) -> None:
    file = recipe(tmp_path, "quantize: [experts]\nkeep: ['*']")
    with pytest.raises(fourfold.RecipeError, match="nothing to quantize"):
        fourfold.plan(written("qwen3_moe")[0], file)


def test_input_dimension(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=64, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, vocab_size=64,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    with pytest.raises(fourfold.PlanError) as caught:
        fourfold.plan(tmp_path / "model", "w4a16_nvfp4_default")
    assert "model.layers.0.mlp.down_proj: input dimension 40" in str(caught.value)
    assert 'keep: ["model.layers.*.mlp.down_proj"]' in str(caught.value)


def test_quantized_already(written: Written, tmp_path: Path) -> None:
    fourfold.quantize(written("qwen3_moe")[0], tmp_path / "out", EXPERTS)
    notes = fourfold.plan(tmp_path / "out", EXPERTS).notes
    assert "weights from NVFP4 (ModelOpt)" in notes[0]
    assert "lose again" in notes[1]


def test_unknown_architecture(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3_moe")
    edit_config(folder, model_type="nonsense", architectures=["NonsenseForCausalLM"])
    with pytest.raises(fourfold.ModelError, match=r"config.json: transformers .*nonsense"):
        fourfold.plan(folder, EXPERTS)


def test_custom_code_is_not_run(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("qwen3_moe")
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    edit_config(folder, **own)
    note = "model_type is mine, which transformers lacks: it is read as Qwen3MoeForCausalLM"
    assert any(note in text for text in fourfold.plan(folder, EXPERTS).notes)
    edit_config(folder, **own, architectures=["MineForCausalLM"])
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(fourfold.ModelError, match="`trust_remote_code=True`"):
        fourfold.plan(folder, EXPERTS)
    assert not (tmp_path / "ran").exists()


def test_config_of_another_model(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3_moe")
    edit_config(folder, hidden_size=128)
    with pytest.raises(fourfold.ModelError, match=r"Does config\.json belong to this checkpoint"):
        fourfold.plan(folder, EXPERTS)


def test_missing_parameter(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3_moe")
    edit(folder, lambda tensors: tensors.pop("model.layers.2.self_attn.o_proj.weight"))
    with pytest.raises(
        fourfold.SourceError, match=r"layers\.2\.self_attn\.o_proj\.weight: the che"
    ):
        fourfold.plan(folder, EXPERTS)


@pytest.mark.parametrize("expert", [0, 1, 3])
@pytest.mark.parametrize("projections", [("up",), ("gate", "up", "down")])
def test_missing_expert(
    expert: int, projections: tuple[str, ...], copy: Callable[[str], Path]
) -> None:
    folder = copy("qwen3_moe")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for projection in projections:
            del tensors[f"model.layers.2.mlp.experts.{expert}.{projection}_proj.weight"]

    edit(folder, drop)
    with pytest.raises(fourfold.SourceError, match=r"layers\.2\.mlp.* 3 experts on disk, 4 in"):
        fourfold.plan(folder, EXPERTS)


@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("down_proj",)])
def test_missing_fused_expert(names: tuple[str, ...], copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3_5_moe")

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            key = f"model.language_model.layers.1.mlp.experts.{name}"
            key = key if key in tensors else key.replace("language_model.", "")
            tensors[key] = tensors[key][:2].clone()

    edit(folder, shorten)
    with pytest.raises(fourfold.SourceError, match=r"2 experts on disk, 4 in the architecture"):
        fourfold.plan(folder, EXPERTS)


def test_missing_buffer(copy: Callable[[str], Path]) -> None:
    folder = copy("deepseek_v3")
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit(folder, lambda tensors: tensors.pop(key))
    with pytest.raises(fourfold.SourceError, match=key):
        fourfold.plan(folder, EXPERTS)


def test_layouts_that_cannot_be_told_apart(tmp_path: Path) -> None:
    """transformers tells Qwen3-VL-MoE's transposed experts by their shape alone."""
    family = FAMILIES["qwen3_vl_moe"]

    def square() -> object:
        config = family.build_config()
        config.text_config.moe_intermediate_size = config.text_config.hidden_size // 2
        return config

    write_checkpoint(replace(family, build_config=square), tmp_path)
    with pytest.raises(fourfold.ModelError, match="this shape fits both ways"):
        fourfold.plan(tmp_path, EXPERTS)


@pytest.mark.parametrize("names", [["pipeline"], ["Trainer"], "LlamaForCausalLM", [3], []])
def test_architectures_that_name_no_model(names: object, copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3_moe")
    edit_config(folder, architectures=names)
    with suppress(fourfold.ModelError):  # or the model type alone is enough
        assert len(fourfold.plan(folder, EXPERTS).linears) == 24


@pytest.mark.parametrize("leaf", ["input_scale", "weight_scale", "k_scale"])
def test_tensors_that_engines_would_take_for_scales(leaf: str, copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3_moe")
    key = f"model.layers.0.self_attn.q_proj.{leaf}"
    edit(folder, lambda tensors: tensors.update({key: torch.ones(())}))
    with pytest.raises(fourfold.PlanError, match=rf"{key} in model.safetensors: engines would"):
        fourfold.plan(folder, EXPERTS)


def test_a_kept_weight_that_is_no_float(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3_moe")
    key = "model.layers.0.self_attn.o_proj.weight"
    edit(folder, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    with pytest.raises(fourfold.PlanError, match=f"{key} in model.safetensors: a weight of I8"):
        fourfold.plan(folder, EXPERTS)


@pytest.mark.parametrize(
    ("key", "like", "words"),
    [
        ("model.layers.1.input_layernorm.weight", torch.uint8, "U8, as a quantizer leaves it"),
        ("model.layers.2.mlp.experts.3.up_proj.pre_quant_scale", None, "lies beside a weight"),
        ("model.layers.0.self_attn.q_proj.input_quantizer._amax", None, "as a quantizer leaves"),
    ],
)
def test_tensors_that_no_engine_reads_beside_packed_weights(
    key: str, like: torch.dtype | None, words: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("qwen3_moe")
    edit(folder, lambda tensors: tensors.update({key: torch.ones(64, dtype=like)}))
    with pytest.raises(fourfold.PlanError, match=rf"{key} in model.safetensors: .*{words}"):
        fourfold.plan(folder, EXPERTS)


def test_a_stack_of_experts_without_a_place_is_ignored(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("qwen3_5_moe")
    key = "model.language_model.layers.-1.mlp.experts.down_proj"
    edit(folder, lambda tensors: tensors.update({key: torch.ones(4, 64, 48)}))
    result = fourfold.quantize(folder, tmp_path / "out", EXPERTS)
    assert result.clean, str(result.report)
    assert any(key.startswith(entry) for entry in result.plan.ignore)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**9}, {"num_local_experts": 10**9}, {"head_dim": 2**30}]
)
def test_absurd_configurations_end_at_once(
    changes: dict[str, int], copy: Callable[[str], Path]
) -> None:
    folder = copy("qwen3_moe")
    edit_config(folder, **changes)
    with pytest.raises(fourfold.FourfoldError):
        fourfold.plan(folder, EXPERTS)
    assert peak_resident() < 4e9


def test_odd_names_are_copied(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("qwen3_moe")
    names = ["²", "[/bold]", "layers." + "9" * 5000 + ".x", "a/../b", "x\x1b[31m", "é.weight"]
    edit(folder, lambda tensors: tensors.update({name: torch.ones(3) for name in names}))
    result = fourfold.quantize(folder, tmp_path / "out", EXPERTS)
    assert result.clean, str(result.report)
    assert "[/bold]" in str(inspect(tmp_path / "out"))


def test_kept_tensors_of_dtypes_that_pytorch_lacks(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("qwen3_moe")
    edit(folder, lambda tensors: tensors.update({"extra": torch.ones(8, dtype=torch.uint8)}))
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["extra"]["dtype"] = "F8_E5M2FNUZ"
    text = json.dumps(header, separators=(",", ":")).encode()
    changed = len(text).to_bytes(8, "little") + text + raw[8 + length :]
    (folder / "model.safetensors").write_bytes(changed)
    result = fourfold.quantize(folder, tmp_path / "out", EXPERTS)
    assert result.clean, str(result.report)


def test_scale_groups(written: Written) -> None:
    plan = fourfold.plan(written("deepseek_v3")[0], "w4a16_nvfp4_default")
    groups = [sorted(x.name.rpartition(".")[2] for x in group.linears) for group in plan.groups]
    assert ["kv_a_proj_with_mqa", "q_a_proj"] in groups
    assert ["gate_proj", "up_proj"] in groups
    plan = fourfold.plan(written("qwen3_moe")[0], "w4a16_nvfp4_default")
    groups = [sorted(x.name.rpartition(".")[2] for x in group.linears) for group in plan.groups]
    assert ["k_proj", "q_proj", "v_proj"] in groups
    plan = fourfold.plan(written("qwen3_5_moe")[0], "w4a16_nvfp4_default")
    groups = [sorted(x.name.rpartition(".")[2] for x in group.linears) for group in plan.groups]
    assert ["in_proj_qkv", "in_proj_z"] in groups
    assert ["in_proj_a", "in_proj_b"] in groups


def test_input_sites(written: Written) -> None:
    plan = fourfold.plan(written("qwen3_moe")[0], "w4a16_nvfp4_default")
    sites = {linear.input_site for linear in plan.linears if linear.layer == 1}
    experts = {
        linear.input_site
        for linear in plan.linears
        if linear.layer == 1 and linear.expert is not None
    }
    assert len(experts) == 2
    assert len(sites) == 4  # experts' two, qkv, o


def test_tensor_parallel_sizes(written: Written) -> None:
    plan = fourfold.plan(written("qwen3_moe")[0], EXPERTS)
    assert list(plan.tensor_parallel) == [1, 2, 4, 8, 16, 32]
    assert "intermediate size 48" in plan.tensor_parallel[1]
    assert any(
        ("Marlin" in note and "[64, 48]" in note) or "[48, 64]" in note for note in plan.notes
    )


@pytest.mark.slow
def test_plan_of_671_billion_parameters(tmp_path: Path) -> None:
    """DeepSeek-V3's own shapes, in a file with a header and a hole: seconds, and no weights."""
    config = large.config()
    config.save_pretrained(tmp_path)
    large.write_with_hole(tmp_path / "model.safetensors", large.tensors(config))
    before = peak_resident()
    plan = fourfold.plan(tmp_path, EXPERTS)
    assert peak_resident() - before < 1.5e9
    assert len(plan.linears) == 58 * 256 * 3
    assert 1.3e12 < plan.nbytes < 1.35e12
    assert all(shard.nbytes <= 5_000_000_000 for shard in plan.shards)
    assert not any(plan.tensor_parallel.values())


def test_no_engine_reads_it(written: Written) -> None:
    plan = fourfold.plan(written("gpt_oss")[0], EXPERTS)
    assert any("no engine is known" in note for note in plan.notes)


def test_prints_as_a_table_and_as_json(written: Written) -> None:
    plan = fourfold.plan(written("qwen3_moe")[0], EXPERTS)
    text = str(plan)
    for word in ("experts", "quantized", "kept bit for bit", "bits/weight", "tensor-parallel"):
        assert word in text
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["linear_weights"] == 24
    assert len(data["tensors"]) == len(plan.rows)


def test_other_weight_files_are_left_behind(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("qwen3_moe")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.pth").write_bytes(b"x")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("hello")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_mine.py").write_text("x = 1\n")
    (folder / "generation_config.json").write_text('{"top_k": 3}')
    result = fourfold.quantize(folder, tmp_path / "out", EXPERTS)
    for name in ("sub/notes.txt", "tokenizer.json", "modeling_mine.py", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "out" / "original").exists()
    assert any("consolidated.pth" in note for note in result.plan.notes)


def test_config_is_the_sources_own(written: Written, tmp_path: Path) -> None:
    folder, _ = written("qwen3_5_moe_vl")
    fourfold.quantize(folder, tmp_path / "out", EXPERTS)
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    added = after.pop("quantization_config")
    assert after == before
    assert list(after) == list(before)
    other = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert added["quant_algo"] == other["quant_algo"] == "W4A16_NVFP4"
    assert added["ignore"] == other["exclude_modules"] == sorted(added["ignore"])
    assert "input_activations" not in added["config_groups"]["group_0"]


def test_fp8_cast_kv_cache_is_configuration_only(written: Written, tmp_path: Path) -> None:
    file = recipe(tmp_path, "quantize: [experts]\nkv_cache: {format: fp8, scale: cast}")
    result = fourfold.quantize(written("qwen3_moe")[0], tmp_path / "out", file)
    assert result.clean, result.report
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    other = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert config["kv_cache_scheme"] == {"type": "float", "num_bits": 8, "dynamic": False}
    assert other["kv_cache_quant_algo"] == "FP8"


def test_shards_are_split_at_their_limit(written: Written, tmp_path: Path) -> None:
    model = written("qwen3_moe")[0]
    plan = execute(model, tmp_path / "split", EXPERTS, Limits(shard_bytes=10_000))
    shards = list((tmp_path / "split").glob("*.safetensors"))
    assert len(shards) == len(plan.shards) > 10
    fourfold.quantize(model, tmp_path / "whole", EXPERTS, output=OutputConfig(verify=False))
    tensors = [load_file(file) for file in shards]
    split = {name: tensor for each in tensors for name, tensor in each.items()}
    whole = tensors_of(tmp_path / "whole")
    assert sum(map(len, tensors)) == len(split) == len(whole)
    for name, tensor in whole.items():
        pair = [x.reshape(-1).view(torch.uint8) for x in (tensor, split[name])]  # scalars, too
        assert torch.equal(*pair), name


def test_large_groups_are_read_in_pieces(written: Written, tmp_path: Path) -> None:
    folder, _ = written("deepseek_v3")
    fourfold.quantize(folder, tmp_path / "whole", "w4a16_nvfp4_default_mse")
    limits = Limits(group_bytes=2048)
    execute(folder, tmp_path / "pieces", "w4a16_nvfp4_default_mse", limits)
    assert_same_shards(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_several_shards(dtype: torch.dtype, tmp_path: Path) -> None:
    write_checkpoint(FAMILIES["qwen3_5_moe"], tmp_path / "model", dtype=dtype, shards=3)
    result = fourfold.quantize(tmp_path / "model", tmp_path / "out", "w4a16_nvfp4_default_mse")
    assert result.clean, result.report


def test_a_source_with_files_of_our_names(written: Written, tmp_path: Path) -> None:
    """A checkpoint that was made from another one of ours: ours are written, not copied over."""
    folder = Path(shutil.copytree(written("qwen3_moe")[0], tmp_path / "model"))
    (folder / "report.html").write_text("theirs")
    (folder / "quant_summary.json").write_text("{}")
    work = fourfold.plan(folder, EXPERTS)
    assert not work.side_files.copied
    assert fourfold.quantize(folder, tmp_path / "out", EXPERTS).clean
    assert (tmp_path / "out" / "report.html").read_text() != "theirs"
