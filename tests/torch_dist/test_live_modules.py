# SPDX-License-Identifier: Apache-2.0
"""A rank's modules tell where their parameters lie in the whole model, or are refused.

Without megatron-core: modules stand in for Megatron's and for Transformer Engine's. The models of
megatron-core itself are in `test_live.py`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fourfold
from conftest import Written
from fourfold.errors import ModelError, SourceError, UsageError
from fourfold.planning import Shard, deal
from fourfold.sources.megatron import LiveMegatron, MegatronCheckpoint, is_megatron
from fourfold.sources.megatron.live.modules import local_parameters

from .inverse import to_megatron
from .stand_in import ALONE, Group, Rank, build, joined
from .writing import write_torch_dist

W4A16 = "w4a16_nvfp4_experts_only_mse"
DELTA = {"qk_dim": 32, "v_dim": 64, "num_value_heads": 4}
MAMBA = {"d_state": 16, "ngroups": 2, "d_inner": 128, "nheads": 8}
NAMES = ["qwen3", "qwen3_moe", "qwen3_5_moe_text", "mixtral", "deepseek_v3", "nemotron_h"]


def ranks_of(
    tp: int, ep: int, etp: int, pp: int, sequential: bool, count: int = 3
) -> Iterator[Rank]:
    stages = [range(count)] if pp == 1 else [range(2), range(2, count)]
    for layers in stages:
        for t in range(tp):
            for e in range(ep):
                for x in range(etp):
                    yield Rank(Group(t, tp), Group(e, ep), Group(x, etp), layers, sequential)


def whole(ranks: Sequence[Any]) -> dict[str, Tensor]:
    """Join the shards of all ranks; each element must be there, and the same on all of them."""
    found: dict[str, Tensor] = {}
    for model in ranks:
        for each in local_parameters([model]):
            value = found.setdefault(each.name, torch.full(each.shape, torch.nan).bfloat16())
            assert value.shape == each.shape
            for part in each.shards:
                box = tuple(
                    slice(a, a + n) for a, n in zip(part.offsets, part.tensor.shape, strict=True)
                )
                assert bool((value[box].isnan() | (value[box] == part.tensor)).all())
                value[box] = part.tensor
    assert not any(bool(value.isnan().any()) for value in found.values())
    return found


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate the experts, by their numbers."""
    found = {}
    for key, tensor in tensors.items():
        if ".experts.experts." in key:
            for number, each in enumerate(tensor):
                found[key.replace(".experts.experts.", f".experts.{number}.")] = each
        else:
            found[key] = tensor
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("te", [True, False])
@pytest.mark.parametrize(
    ("tp", "ep", "etp", "pp", "sequential"),
    [(1, 1, 1, 1, False), (2, 2, 1, 2, False), (2, 4, 1, 1, True), (1, 2, 2, 1, False)],
)
def test_parts_make_the_whole(
    name: str, te: bool, tp: int, ep: int, etp: int, pp: int, sequential: bool, written: Written
) -> None:
    tensors = to_megatron(written(name)[1].raw, te=te, dialect="B")
    if name == "nemotron_h":
        hybrid = ranks_of(tp, ep, etp, pp, sequential, count=4)
        every, sizes = [replace(rank, is_gated=False) for rank in hybrid], MAMBA
    else:
        every, sizes = list(ranks_of(tp, ep, etp, pp, sequential)), DELTA
    models = [build(tensors, rank, sizes) for rank in every]
    found, wanted = whole(models), apart(tensors)
    assert sorted(found) == sorted(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor.bfloat16()), key


@pytest.fixture
def made(written: Written) -> Callable[..., tuple[Any, Path]]:
    """A whole model on one rank, and its Hugging Face folder."""

    def make(name: str = "qwen3_moe", **options: Any) -> tuple[Any, Path]:
        folder, truth = written(name)
        tensors = to_megatron(truth.raw, dialect="B")
        return build(tensors, Rank(**options), DELTA), folder

    return make


def test_one_process_gives_the_bytes_of_the_checkpoint(
    made: Callable[..., tuple[Any, Path]], written: Written, tmp_path: Path
) -> None:
    model, folder = made()
    write_torch_dist(tmp_path / "saved", to_megatron(written("qwen3_moe")[1].raw))
    with closing(MegatronCheckpoint(tmp_path / "saved", folder)) as source:
        wanted = {key: source.slab(key, 0, info.shape[0]) for key, info in source.tensors.items()}
        order = list(source.tensors)
    with closing(LiveMegatron(model, folder)) as live:
        assert list(live.tensors) == order
        for key, tensor in wanted.items():
            assert torch.equal(live.slab(key, 0, tensor.shape[0]), tensor), key
        assert live.notes == (f"weights come from the live model, config.json from {folder}",)
    result = fourfold.quantize(model, tmp_path / "live", W4A16, hf_config=folder)
    assert result.clean
    fourfold.quantize(tmp_path / "saved", tmp_path / "out", W4A16, hf_config=folder)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "live" / file.name).read_bytes()


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("mine")


def test_quantizers_of_modelopt_are_not_weights(made: Callable[..., tuple[Any, Path]]) -> None:
    model, folder = made()
    with closing(LiveMegatron(model, folder)) as live:
        before = live.tensors
    quantizer = nn.Module()
    quantizer.register_buffer("_amax", torch.ones(()))
    linear = model.decoder.layers[0].self_attention.linear_qkv
    linear.add_module("weight_quantizer", quantizer)
    with closing(LiveMegatron(model, folder)) as live:
        assert live.tensors == before
        assert any("ModelOpt's quantizers is left out" in note for note in live.notes)
    quantizer.register_buffer("_pre_quant_scale", torch.ones(64))
    with pytest.raises(SourceError, match=r"_pre_quant_scale: .*ModelOpt.* were smoothed"):
        LiveMegatron(model, folder)


def test_a_configuration_instead_of_a_folder(
    made: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = made()
    config = transformers.AutoConfig.from_pretrained(folder)
    with closing(LiveMegatron(model, config, tokenizer=Tokenizer())) as live:
        own = live.folder
        assert [str(path) for path in live.side_files().copied] == ["tokenizer.json"]
    assert not own.exists()
    for number, given in enumerate((config, folder)):
        out = tmp_path / str(number)
        fourfold.quantize(model, out, W4A16, hf_config=given, tokenizer=Tokenizer())
        assert (out / "tokenizer.json").read_text() == "mine"
    file = "model-00001-of-00004.safetensors"
    assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()


def test_who_has_most_of_a_shard_writes_it(written: Written) -> None:
    shards = fourfold.plan(written("qwen3_moe")[0], W4A16).shards
    owner = {id(shard): number % 3 for number, shard in enumerate(shards)}

    def near(shard: Shard) -> list[int]:
        return [5 if rank == owner[id(shard)] else 4 for rank in range(3)]

    numbers = range(len(shards))
    dealt = deal(shards, numbers, 3, near)
    assert dealt == [[x for x in numbers if x % 3 == rank] for rank in range(3)]
    # Where all have the same, nearness says nothing.
    assert deal(shards, numbers, 3, lambda _: [1, 1, 1]) == deal(shards, numbers, 3)


def test_what_is_near(made: Callable[..., tuple[Any, Path]]) -> None:
    model, folder = made()
    with closing(LiveMegatron(model, folder)) as live:
        assert live.ranks_per_layer == 1
        slabs = [(key, 0, info.shape[0]) for key, info in live.tensors.items()]
        assert live.rank_affinity(slabs) == [sum(info.nbytes for info in live.tensors.values())]
        key = "model.embed_tokens.weight"
        assert live.rank_affinity([(key, 3, 5)]) == [2 * 2 * live.tensors[key].shape[1]]


def test_wrapped_and_in_chunks(made: Callable[..., tuple[Any, Path]], written: Written) -> None:
    model, folder = made()
    wrapper = nn.Module()
    wrapper.module = model
    tensors = to_megatron(written("qwen3_moe")[1].raw, dialect="B")
    shell = {key: each for key, each in tensors.items() if "layers" not in key}
    layers = {key: each for key, each in tensors.items() if "layers" in key}
    chunks = [build({**shell, **layers}, Rank(layers=[0, 2])), build(layers, Rank(layers=[1]))]
    with (
        closing(LiveMegatron(wrapper, folder)) as one,
        closing(LiveMegatron(chunks, folder)) as two,
    ):
        assert one.tensors == two.tensors
        for key, info in one.tensors.items():
            assert torch.equal(one.slab(key, 0, info.shape[0]), two.slab(key, 0, info.shape[0]))


# What is refused.


def refused(model: Any, folder: Any, pattern: str, error: type[Exception] = SourceError) -> None:
    with pytest.raises(error, match=pattern):
        LiveMegatron(model, folder)


def test_packed_experts(made: Callable[..., tuple[Any, Path]]) -> None:
    model, folder = made()
    experts = model.decoder.layers[1].mlp.experts
    experts.linear_fc1.num_gemms = 5  # one weight of Transformer Engine for all of them
    refused(model, folder, r"decoder\.layers\.1\.mlp\.experts: \w+ packs all experts in one wei")
    model, folder = made()
    experts = model.decoder.layers[1].mlp.experts
    del experts.linear_fc1, experts.linear_fc2
    experts.weight1 = experts.weight2 = nn.Parameter(torch.zeros(4, 4))
    refused(model, folder, r"decoder\.layers\.1\.mlp\.experts: Module packs all experts in one")


class Quantized(Tensor):
    """A subclass of tensors, like Transformer Engine's FP8 parameters."""


def test_what_is_no_plain_tensor(made: Callable[..., tuple[Any, Path]]) -> None:
    model, folder = made()
    router = model.decoder.layers[1].mlp.router
    plain = router.weight.data
    router._parameters["weight"] = plain.as_subclass(Quantized)
    refused(model, folder, r"router\.weight: is Quantized, not a plain tensor")
    router._parameters["weight"] = plain.to("meta")
    refused(model, folder, r"router\.weight: has no values in memory\. Load the model's weights")
    given_back = plain.clone()
    given_back.untyped_storage().resize_(0)
    router._parameters["weight"] = given_back
    refused(model, folder, r"router\.weight: has no values in memory")


def test_an_adapter_has_no_rule(made: Callable[..., tuple[Any, Path]]) -> None:
    model, folder = made()
    model.decoder.layers[2].self_attention.adapter = nn.Linear(2, 2)
    refused(model, folder, r"decoder\.layers\.2\.self_attention\.adapter\.weight: no rule for it")


def test_what_is_missing_is_named(made: Callable[..., tuple[Any, Path]]) -> None:
    refused(
        *made(layers=[0, 1]), r"the live model: has decoder layers 0, 1, .* num_hidden_layers 3"
    )
    refused(
        *made("qwen3_5_moe_text", ep=Group(1, 2)),
        r"experts\.gate_up_proj: expert 0, part 1 of 1 is missing",
    )
    model, folder = made(ep=Group(1, 2))
    with pytest.raises(
        SourceError, match=r"mlp\.experts\.2\.gate_proj\.weight: 2 experts on disk, 4"
    ):
        fourfold.plan(model, W4A16, hf_config=folder)


def test_a_part_without_the_others(made: Callable[..., tuple[Any, Path]]) -> None:
    model, folder = made(tp=Group(0, 2))
    refused(
        model,
        folder,
        r"embedding\.word_embeddings\.weight \[\d+, 64\]: no chunk holds \[\d+:\d+\]\. Does every",
    )


def test_groups_that_nobody_knows(
    made: Callable[..., tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "megatron.core.parallel_state", raising=False)
    model, folder = made()
    del model.pg_collection
    with closing(LiveMegatron(model, folder)):
        pass  # nothing is shared
    model.config.expert_model_parallel_size = 2
    refused(model, folder, r"expert_model_parallel_size is 2, but neither .* parall", UsageError)


def test_megatrons_own_groups(
    made: Callable[..., tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(
        get_tensor_model_parallel_group=lambda check_initialized: ALONE,
        get_expert_model_parallel_group=lambda check_initialized: Group(1, 2),
        get_expert_tensor_parallel_group=lambda check_initialized: None,
    )
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    model, _ = made(ep=Group(1, 2))
    del model.pg_collection
    names = {each.name for each in local_parameters([model])}
    assert {int(found[1]) for x in names if (found := re.search(r"experts\.(\d)\.", x))} == {2, 3}


def test_a_delta_net_of_another_version(made: Callable[..., tuple[Any, Path]]) -> None:
    model, folder = made("qwen3_5_moe_text")
    (delta, *_) = (each for each in model.modules() if hasattr(each, "A_log"))
    delta.qk_dim = 16
    refused(model, folder, r"in_proj\.weight \[\d+, 64\]: should have \d+ rows here: 16, 16, 64")


@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        (
            "moe_mlp_glu_interleave_size",
            32,
            "moe_mlp_glu_interleave_size is 32: gate and up are inter",
        ),
        ("layernorm_zero_centered_gamma", True, "norms are kept as w − 1"),
        ("moe_router_topk", 3, "moe_router_topk is 3, .*config.json says 2"),
        ("layernorm_epsilon", 0.5, "norm_epsilon is 0.5"),
        ("num_query_groups", 1, "num_query_groups is 1"),
    ],
)
def test_a_model_that_computes_otherwise(
    name: str, value: Any, pattern: str, made: Callable[..., tuple[Any, Path]]
) -> None:
    model, folder = made()
    setattr(model.config, name, value)
    refused(model, folder, f"the live model: {pattern}")


def test_another_rotary_base(made: Callable[..., tuple[Any, Path]]) -> None:
    model, folder = made()
    model.rotary_base = 123.0
    refused(model, folder, r"the live model: rotary_base is 123\.0")


def test_what_is_given_wrongly(made: Callable[..., tuple[Any, Path]], tmp_path: Path) -> None:
    model, folder = made()
    refused(model, tmp_path / "none", r"hf_config \S+none: no such folder", UsageError)
    refused(model, {"model_type": "qwen3_moe"}, r"hf_config: dict is neither a folder", UsageError)
    refused(nn.Linear(2, 2), folder, r"Linear: not a Megatron model", UsageError)
    with pytest.raises(UsageError, match=r"a Megatron model\. Give the folder with its Hugging"):
        fourfold.quantize(model, tmp_path / "out", W4A16)
    with pytest.raises(UsageError, match=r"forward_loop.*only for a transformers model"):
        fourfold.quantize(
            model, tmp_path / "out", "nvfp4_experts_only", hf_config=folder,
            forward_loop=lambda model: None,
        )  # fmt: skip
    with pytest.raises(UsageError, match=r"hf_config: only for Megatron's"):
        fourfold.plan(nn.Linear(2, 2), W4A16, hf_config=folder)
    with pytest.raises(UsageError, match=r"list: is no model of transformers"):
        fourfold.plan([], W4A16)
    with pytest.raises((ModelError, SourceError)):
        fourfold.plan(model, W4A16, hf_config=made("mixtral")[1])


def test_what_is_megatrons(made: Callable[..., tuple[Any, Path]]) -> None:
    model, _ = made()
    assert is_megatron(model)
    assert is_megatron([model, model])
    assert not is_megatron([])
    assert not is_megatron("model")
    assert not is_megatron(nn.Linear(2, 2))
    assert joined({"a.weight.value": torch.ones(1), "a.weight.query": torch.zeros(1)})[
        "a.weight"
    ].tolist() == [0, 1]
