# SPDX-License-Identifier: Apache-2.0
"""Plan, quantize, verify, convert, resume and calibrate from a Megatron checkpoint; errors."""

from __future__ import annotations

import argparse
import enum
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fourfold
from conftest import Written
from fourfold.cli.app import app
from fourfold.config import Runtime
from fourfold.errors import FourfoldError, ModelError, OutputError, SourceError, UsageError
from fourfold.events import Resumed, ShardWritten
from fourfold.sources.megatron import MegatronCheckpoint
from fourfold.sources.megatron.families import rename
from fourfold.sources.megatron.parameters import Parameter
from fourfold.sources.megatron.rules import RuleBook, Section
from fourfold.sources.megatron.safe_pickle import METADATA, read_pickle
from fourfold.sources.megatron.sizes import Sizes
from jobs import flat, only

from .conftest import FAMILY
from .inverse import to_megatron
from .writing import halves, singles, whole

W4A16 = "w4a16_nvfp4_experts_only_mse"


def refused(
    checkpoint: Path, hf: Path, *words: str, kind: type[FourfoldError] = SourceError
) -> None:
    with pytest.raises(kind) as error:
        fourfold.plan(checkpoint, W4A16, hf_config=hf)
    text = str(error.value)
    assert all(word in text for word in words), text
    assert len(text.splitlines()) <= 2


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix == ".safetensors" or path.name in ("config.json", "hf_quant_config.json")
    }


# The flow.


@pytest.mark.parametrize("name", [FAMILY, "nemotron_h"])
def test_what_is_quantized_does_not_depend_on_where_it_came_from(
    name: str, made: Callable[..., tuple[Path, Path]], written: Written, tmp_path: Path
) -> None:
    folder, _ = written(name)
    fourfold.quantize(folder, tmp_path / "plain", W4A16)
    for number, (dialect, cut) in enumerate(
        [("B", whole), ("B", singles(1, halves(-1))), ("C", halves(0))]
    ):
        checkpoint, hf = made(name, dialect=dialect, cut=cut)
        result = fourfold.quantize(checkpoint, tmp_path / f"{number}", W4A16, hf_config=hf)
        assert result.clean
        assert digests(tmp_path / f"{number}") == digests(tmp_path / "plain")
        report = fourfold.verify(tmp_path / f"{number}", source=checkpoint, hf_config=hf)
        assert report.clean
        assert report.counts.compared_linears == len(result.linears)
        shutil.rmtree(checkpoint)


@pytest.mark.parametrize("name", [FAMILY, "deepseek_v3", "qwen3_5_moe_text"])
def test_activations_are_calibrated_on_what_is_presented(
    name: str, made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, hf = made(name)
    ids = tmp_path / "ids.jsonl"
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 90, (30,), generator=draw).tolist() for _ in range(9)]
    ids.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    fourfold.convert(checkpoint, tmp_path / "hf", hf_config=hf)
    for source, out, more in (
        (tmp_path / "hf", "theirs", {}),
        (checkpoint, "ours", {"hf_config": hf}),
    ):
        result = fourfold.quantize(
            source,
            tmp_path / out,
            "nvfp4_default_mse-fp8_kv",
            **flat(calib=[ids], calib_seq=24, **more),
        )
        assert result.clean
        assert result.report is not None
        assert result.report.counts.input_scales == len(result.linears)
    assert digests(tmp_path / "ours") == digests(tmp_path / "theirs")


def run_with_a_damaged_layer(
    run: Callable[..., Any], checkpoint: Path, *arguments: Any, **options: Any
) -> None:
    """Run something while layer 2 cannot be read: other layers are finished by then."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    places = metadata.storage_data.items()
    place = next(place for index, place in places if ".layers.2." in index.fqn)
    file = checkpoint / place.relative_path
    intact, status = file.read_bytes(), file.stat()
    end = place.offset + place.length
    damaged = intact[: end - 22] + bytes(22) + intact[end:]  # without the end of the chunk's zip

    def write(content: bytes) -> None:
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    write(damaged)
    with pytest.raises(SourceError, match="is damaged"):
        run(checkpoint, *arguments, **options)
    write(intact)


RUNS = [
    (fourfold.quantize, {"recipe": W4A16, "runtime": Runtime(threads=1)}),
    (fourfold.convert, {"threads": 1}),
]


@pytest.mark.parametrize(("run", "options"), RUNS)
def test_a_run_that_was_stopped_goes_on(
    run: Any,
    options: dict[str, Any],
    made: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    checkpoint, hf = made()
    run(checkpoint, tmp_path / "whole", hf_config=hf, **options)
    run_with_a_damaged_layer(run, checkpoint, tmp_path / "out", hf_config=hf, **options)
    assert not (tmp_path / "out" / "config.json").exists()
    resumed: list[tuple[int, int]] = []
    run(
        checkpoint,
        tmp_path / "out",
        hf_config=hf,
        on_event=only(Resumed, lambda event: resumed.append((event.finished, event.shards))),
        **options,
    )
    assert resumed == [(3, 4)]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not (tmp_path / "out" / ".fourfold").exists()


@pytest.mark.parametrize(("run", "options"), RUNS)
@pytest.mark.parametrize("what", ["weights", "configuration"])
def test_a_changed_checkpoint_is_not_gone_on_from(
    what: str,
    run: Any,
    options: dict[str, Any],
    made: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    checkpoint, hf = made()
    own = tmp_path / "hf"
    own.mkdir()
    shutil.copy(hf / "config.json", own)
    run_with_a_damaged_layer(run, checkpoint, tmp_path / "out", hf_config=own, **options)
    file = checkpoint / "__0_0.distcp" if what == "weights" else own / "config.json"
    os.utime(file, (1, file.stat().st_mtime + 5))
    with pytest.raises(OutputError, match="Changed since"):
        run(checkpoint, tmp_path / "out", hf_config=own, **options)


@pytest.mark.parametrize(("run", "options"), RUNS)
@pytest.mark.parametrize("what", ["weights", "configuration"])
def test_a_checkpoint_that_changes_meanwhile_ends_the_run(
    what: str,
    run: Any,
    options: dict[str, Any],
    made: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    checkpoint, hf = made()
    own = tmp_path / "hf"
    own.mkdir()
    shutil.copy(hf / "config.json", own)
    file = checkpoint / "common.pt" if what == "weights" else own / "config.json"
    if what == "weights":
        torch.save({"iteration": 7}, file)

    on_event = only(ShardWritten, lambda _: os.utime(file, (1, 1)))

    with pytest.raises(SourceError, match="changed while it was read"):
        run(checkpoint, tmp_path / "out", hf_config=own, on_event=on_event, **options)
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_lies_beside_the_weights_comes_from_the_hugging_face_folder(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, hf = made()
    beside = tmp_path / "hf"
    beside.mkdir()
    config = json.loads((hf / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (beside / "config.json").write_text(json.dumps(config))
    (beside / "tokenizer.json").write_text("{}")
    (beside / "model.safetensors").write_bytes(b"other weights")
    done = fourfold.convert(checkpoint, tmp_path / "out", hf_config=beside)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written
    assert any("quantization_config is left out" in note for note in done.notes)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "model.safetensors").exists()
    plan = fourfold.plan(checkpoint, W4A16, hf_config=beside)
    assert str(checkpoint) in "".join(plan.notes)


def test_the_commands(made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, hf = made()
    run = CliRunner().invoke
    names = [str(checkpoint), str(tmp_path / "hf-out")]
    done = run(app, ["convert", *names, "--hf-config", str(hf), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tensors"] == 56
    planned = run(app, ["plan", str(checkpoint), "--hf-config", str(hf), "--json"])
    assert json.loads(planned.stdout)["linear_weights"] == 24
    out = str(tmp_path / "out")
    quantized = run(app, ["quantize", str(checkpoint), out, "--hf-config", str(hf), "--json"])
    assert quantized.exit_code == 0, quantized.output
    verified = run(
        app, ["verify", out, "--source", str(checkpoint), "--hf-config", str(hf), "--json"]
    )
    assert verified.exit_code == 0, verified.output


# What must not be read.


def test_the_configuration_must_be_given(made: Callable[..., tuple[Path, Path]]) -> None:
    checkpoint, hf = made()
    with pytest.raises(UsageError, match="`hf_config`"):
        fourfold.plan(checkpoint, W4A16)
    with pytest.raises(UsageError, match="no such folder"):
        fourfold.plan(checkpoint, W4A16, hf_config=hf / "nothing")
    with pytest.raises(UsageError, match="only for a Megatron checkpoint"):
        fourfold.plan(hf, W4A16, hf_config=hf)
    with pytest.raises(SourceError, match=r"no config\.json"):
        fourfold.plan(checkpoint, W4A16, hf_config=checkpoint.parent)


def test_out_may_not_lie_in_what_is_read(made: Callable[..., tuple[Path, Path]]) -> None:
    checkpoint, hf = made()
    with pytest.raises(OutputError, match="lies inside"):
        fourfold.convert(checkpoint, checkpoint / "out", hf_config=hf)


def test_other_families_are_named(made: Callable[..., tuple[Path, Path]], written: Written) -> None:
    checkpoint, _ = made()
    refused(checkpoint, written("olmoe")[0], "olmoe", "no rules", "qwen3_moe")


def test_a_weight_without_a_rule_is_named(made: Callable[..., tuple[Path, Path]]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.layers.1.self_attention.core_attention.sinks"] = torch.zeros(4)

    refused(*made(change=change), "self_attention.core_attention.sinks", "no rule for it")


def test_a_name_with_an_asterisk_is_refused(made: Callable[..., tuple[Path, Path]]) -> None:
    """An asterisk stands for the number of a layer or an expert while names are parsed."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.layers.*.extra.weight"] = torch.zeros(4)

    refused(*made(change=change), r"decoder.layers.*.extra.weight", "asterisk")


def test_a_weight_of_another_family_is_named(
    made: Callable[..., tuple[Path, Path]], written: Written
) -> None:
    checkpoint, _ = made("deepseek_v3")
    refused(checkpoint, written(FAMILY)[0], "no rule for it")


def test_a_missing_weight_is_named(made: Callable[..., tuple[Path, Path]]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["decoder.layers.1.mlp.router.weight"]

    refused(*made(change=change), "model.layers.1.mlp.gate.weight", "no tensor for it")


def test_a_name_made_twice_is_named_with_both_rules(
    made: Callable[..., tuple[Path, Path]],
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.layers.1.input_layernorm.weight"] = torch.zeros(64).bfloat16()

    refused(
        *made(change=change),
        "model.layers.1.input_layernorm.weight: made twice",
        "decoder.layers.1.input_layernorm.weight",
        "linear_qkv.layer_norm_weight",
    )


def test_a_weight_with_two_rules_is_named() -> None:
    parameter = Parameter("norm.weight", "stored.norm.weight", (), (4,), "BF16")
    book = RuleBook((Section("", "", (rename(r"norm\.weight", "a"), rename(r"norm\..*", "b"))),))
    sizes = Sizes(1, 4, 1, 1, 4, 4, 0, 0, is_tied=False)
    with pytest.raises(SourceError, match=r"stored\.norm\.weight: more than one rule"):
        list(book.pieces(parameter, sizes))


@pytest.mark.parametrize("dialect", ["B", "C"])
def test_a_missing_expert_is_named(dialect: str, made: Callable[..., tuple[Path, Path]]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if dialect == "C":
            del tensors["decoder.layers.1.mlp.experts.experts.3.linear_fc2.weight"]
        else:
            key = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
            tensors[key] = tensors[key][:3]

    refused(*made(change=change, dialect=dialect), "model.layers.1.mlp.experts")


def test_a_missing_part_is_named(made: Callable[..., tuple[Path, Path]]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["decoder.layers.0.self_attention.in_proj.weight.key"]

    refused(
        *made("qwen3_5_moe_text", change),
        "model.layers.0.linear_attn.in_proj_qkv.weight",
        "part 2 of 3 is missing",
        "in_proj",
    )


def test_a_missing_expert_of_a_stack_is_named(made: Callable[..., tuple[Path, Path]]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["decoder.layers.0.mlp.experts.experts.2.linear_fc1.weight_v"]

    refused(
        *made("qwen3_5_moe_text", change, dialect="C"),
        "model.layers.0.mlp.experts.gate_up_proj",
        "expert 2, part 2 of 2 is missing",
    )


def test_parts_of_different_dtypes_are_named(made: Callable[..., tuple[Path, Path]]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = "decoder.layers.0.self_attention.in_proj.weight.key"
        tensors[key] = tensors[key].float()

    refused(*made("qwen3_5_moe_text", change), "in_proj_qkv", "its parts do not fit", "F32")


def test_more_experts_than_configured_are_named(made: Callable[..., tuple[Path, Path]]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
        tensors[key] = torch.cat([tensors[key]] * 2)

    refused(*made(change=change), "has an expert 4", "4 experts")


@pytest.mark.parametrize("layer", [3, 7])
def test_more_layers_than_configured_are_named(
    layer: int, made: Callable[..., tuple[Path, Path]]
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".layers.2." in key]:
            tensors[key.replace(".layers.2.", f".layers.{layer}.")] = tensors[key]

    refused(*made(change=change), f"0, 1, 2, {layer}", "num_hidden_layers 3")


def test_too_few_layers_are_named(made: Callable[..., tuple[Path, Path]]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".layers.2." in key]:
            del tensors[key]

    refused(*made(change=change), "decoder layers 0, 1", "num_hidden_layers 3")


def test_heads_that_do_not_fit_are_named(made: Callable[..., tuple[Path, Path]]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = "decoder.layers.0.self_attention.linear_qkv.weight"
        tensors[key] = tensors[key][:-16]

    refused(*made(change=change), "linear_qkv.weight", "qkv", "128 rows: 2 groups of 4 heads of 16")


def test_too_small_a_vocabulary_is_named(made: Callable[..., tuple[Path, Path]]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["output_layer.weight"] = tensors["output_layer.weight"][:100]

    refused(*made(change=change), "output_layer.weight", "at least 128 rows")


def test_an_odd_gate_up_is_named(made: Callable[..., tuple[Path, Path]]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = "decoder.layers.0.mlp.linear_fc1.weight"
        tensors[key] = tensors[key][:-1]

    refused(*made(change=change), "mlp.linear_fc1.weight", "an even number of rows")


def test_a_head_beside_a_tied_embedding_is_named(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, hf = made()
    tied = tmp_path / "tied"
    tied.mkdir()
    config = json.loads((hf / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    refused(checkpoint, tied, "output_layer.weight", "tie_word_embeddings")


def test_what_optimizers_keep_is_left_out(
    made: Callable[..., tuple[Path, Path]], written: Written
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"optimizer.state.exp_avg.{name}"] = tensors[name].float()
        tensors["chained_0.optimizer.distributed.dp_group_idx_0.param"] = torch.zeros(4)

    checkpoint, hf = made(change=change)
    plan = fourfold.plan(checkpoint, W4A16, hf_config=hf)
    assert len(plan.rows) == 56
    left = len(to_megatron(written(FAMILY)[1].raw)) + 1
    assert any(note.startswith(f"{left} keys that are not weights") for note in plan.notes)


@pytest.mark.parametrize("command", ["inspect", "verify", "quantize", "generate"])
def test_commands_that_want_another_kind_say_so(
    command: str, made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, _ = made()
    more = {
        "quantize": [str(tmp_path / "out")],
        "generate": ["--prompt", "x"],
    }.get(command, [])
    done = CliRunner().invoke(app, [command, str(checkpoint), *more])
    assert isinstance(done.exception, FourfoldError)
    assert "a Megatron checkpoint" in str(done.exception)


def test_objects_that_are_no_bookkeeping_are_named(
    made: Callable[..., tuple[Path, Path]],
) -> None:
    known = [
        "decoder.layers.mlp._extra_state/shard_0.1_3.4",
        "rng_state/shard_0.0_1.2",
        "optimizer.state.exp_avg",
        "chained_1.optimizer.param_groups",
        "rerun_state_machine_state/shard_0_1",
    ]
    checkpoint, hf = made(objects=known)
    assert fourfold.plan(checkpoint, W4A16, hf_config=hf)
    shutil.rmtree(checkpoint)
    refused(*made(objects=[*known, "model.secret_weight"]), "model.secret_weight", "bookkeeping")


class Backend(enum.Enum):
    LOCAL = 1


ARGS = {
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "group_query_attention": True,
    "kv_channels": 16,
    "num_experts": 4,
    "moe_router_topk": 2,
    "norm_epsilon": 1e-6,
    "apply_layernorm_1p": False,
    "attention_backend": Backend.LOCAL,
    "params_dtype": torch.bfloat16,
}


def test_arguments_that_fit_are_taken(made: Callable[..., tuple[Path, Path]]) -> None:
    checkpoint, hf = made(common={"args": argparse.Namespace(**ARGS), "iteration": 7})
    plan = fourfold.plan(checkpoint, W4A16, hf_config=hf)
    assert not any("has no training arguments" in note for note in plan.notes)


def test_a_checkpoint_without_arguments_is_noted(made: Callable[..., tuple[Path, Path]]) -> None:
    checkpoint, hf = made()
    plan = fourfold.plan(checkpoint, W4A16, hf_config=hf)
    assert any("has no training arguments" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("moe_mlp_glu_interleave_size", 32, "gate and up are interleaved"),
        ("moe_single_grouped_weight", True, "packed in one weight"),
        ("rotary_interleaved", True, "pair neighbours"),
        ("apply_layernorm_1p", True, "norms are kept as w − 1"),
        ("num_layers", 4, "num_layers is 4"),
        ("num_experts", 8, "num_experts is 8"),
        ("kv_channels", 32, "kv_channels is 32"),
        ("num_query_groups", 4, "num_query_groups is 4"),
        ("moe_router_topk", 4, "moe_router_topk is 4"),
        ("norm_epsilon", 1e-5, "norm_epsilon is 1e-05"),
        ("moe_router_pre_softmax", False, "another router"),
        ("enable_mhc_connections", True, "residuals are not those"),
        ("moe_router_load_balancing_type", "sinkhorn", "not that of these families"),
        ("moe_router_topk_limited_devices", 2, "do not do"),
        ("moe_router_score_function", "sigmoid", "do not do"),
        ("moe_router_topk_scaling_factor", 2.5, "do not do"),
        ("softmax_scale", 0.5, "do not do"),
        ("no_rope_freq", [1, 0, 0], "do not do"),
        ("rotary_percent", 0.5, "do not do"),
        pytest.param("hidden_size", 10**5000, "too long", id="digits"),
        ("rotary_base", 77, "rotary_base is 77"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    name: str, value: Any, words: str, made: Callable[..., tuple[Path, Path]]
) -> None:
    common = {"args": argparse.Namespace(**{**ARGS, name: value})}
    refused(*made(common=common), "common.pt", words)


def test_norms_that_are_not_centered_are_named(made: Callable[..., tuple[Path, Path]]) -> None:
    common = {"args": argparse.Namespace(apply_layernorm_1p=False)}
    refused(*made("qwen3_5_moe_text", common=common), "norms are kept as w (")


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def test_arguments_run_nothing(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, hf = made(common={"args": argparse.Namespace(**ARGS), "x": Harmful()})
    fourfold.plan(checkpoint, W4A16, hf_config=hf)
    assert not (tmp_path / "harmed").exists()


class Member:
    """A member of an enumeration, as some releases of Python 3.11 pickle it."""

    def __init__(self, owner: Any, name: str) -> None:
        self.parts = owner, name

    def __reduce__(self) -> Any:
        return getattr, self.parts


def test_members_of_enumerations_are_not_looked_up() -> None:
    from torch.distributed.checkpoint.metadata import Metadata

    owned = [(Metadata, "__init__"), (Metadata, "no such name"), (3, "x")]
    data = pickle.dumps([Member(owner, name) for owner, name in owned])
    members = read_pickle(data, Path("a file"), METADATA)
    shown = ["Metadata.__init__", "Metadata.no such name", "Member(3, 'x')"]
    assert [*map(repr, members)] == shown
    with pytest.raises(fourfold.SourceError, match=r"names 'posix\.system'"):
        read_pickle(pickle.dumps(Member(os.system, "__call__")), Path("a file"), METADATA)


def test_a_damaged_common_file_is_named(made: Callable[..., tuple[Path, Path]]) -> None:
    checkpoint, hf = made(common={"args": argparse.Namespace(**ARGS)})
    (checkpoint / "common.pt").write_bytes(b"nothing")
    refused(checkpoint, hf, "common.pt", "damaged")


def test_names_that_the_model_has_no_place_for_are_refused(
    made: Callable[..., tuple[Path, Path]],
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.layers.0.self_attention.linear_qkv.bias"] = torch.zeros(128).bfloat16()

    refused(*made(change=change), "k_proj.bias", "this layer has no bias", kind=ModelError)


FIELDS = [
    "model_type", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size",
    "num_experts", "rope_parameters", "text_config",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_configuration_of_nonsense_is_refused(
    field: str, made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, hf = made(common={"args": argparse.Namespace(**ARGS)})
    config = json.loads((hf / "config.json").read_text())
    for number, value in enumerate(["x", 0, 10**15, [], {"a": []}]):
        own = tmp_path / str(number)
        own.mkdir()
        (own / "config.json").write_text(json.dumps({**config, field: value}))
        try:
            fourfold.plan(checkpoint, W4A16, hf_config=own)
        except FourfoldError as error:
            lines = str(error).splitlines()
            assert len(lines) <= 3, (value, lines)


def test_peak_memory_is_that_of_a_slab(
    made: Callable[..., tuple[Path, Path]],
) -> None:
    """Only the bytes of a slab are read, not the whole chunk."""
    checkpoint, hf = made(cut=whole)
    source = MegatronCheckpoint(checkpoint, hf)
    read: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: Any, position: int) -> int:
        read.append(preadv(descriptor, buffers, position))
        return read[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counted)
        source.slab("model.embed_tokens.weight", 10, 14)
    assert sum(read) == 4 * 64 * 2
    source.close()
