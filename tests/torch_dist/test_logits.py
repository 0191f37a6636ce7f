# SPDX-License-Identifier: Apache-2.0
"""Converted models of megatron-core: transformers predicts what Megatron predicts.

Each is built by megatron-core on the CPU, saved by it on one rank and again in other shardings,
converted by us, and loaded by transformers. Transformer Engine's kernels are not here: its grouped
layout is saved by megatron-core's own `TEGroupedMLP` around plain linear layers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fourfold
from families import FAMILIES

from .core_jobs import Case, Ranks, Saved, run

pytestmark = pytest.mark.skipif(
    find_spec("megatron") is None or find_spec("megatron.core") is None,
    reason="megatron-core is not installed (pip install 'fourfold[megatron]')",
)

CLOSE = 1e-5
"""A tolerance for float32 logits of at most about 4."""

RECIPE = "w4a16_nvfp4_default_mse"

FOUR_LAYERS = {"num_hidden_layers": 4}
HYBRID = Case(
    "qwen3_5_moe_text",
    {"grouped": True, "padding": 32},
    {
        **FOUR_LAYERS,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_value_heads": 8,
    },
)
SEQUENTIAL = Case("qwen3_moe", {}, {**FOUR_LAYERS, "norm_topk_prob": True, "mlp_only_layers": []})
DENSE = Case("qwen3", {}, {**FOUR_LAYERS, "layer_types": ["full_attention"] * 4})
NOT_NORMALIZED = Case(
    "qwen3_moe",
    {"moe_layer_freq": [0, 1, 1, 1], "moe_router_pre_softmax": True, "grouped": True},
    {**FOUR_LAYERS, "norm_topk_prob": False, "mlp_only_layers": [0]},
)
DENSE_FIRST = {"moe_layer_freq": [0, 1, 1, 1]}
LATENT = Case("deepseek_v3", {**DENSE_FIRST, "grouped": True}, FOUR_LAYERS)

LAYERS = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"]
MAMBA = Case(
    "nemotron_h",
    {"grouped": True, "fused": True, "padding": 32},
    {
        "layers_block_type": LAYERS,
        "moe_latent_size": 32,
        "routed_scaling_factor": 2.5,
    },
)

CASES = {
    "hybrid, grouped": HYBRID,
    "experts apart": Case(HYBRID.family, {**HYBRID.options, "singleton": True}, HYBRID.changes),
    "sequential": SEQUENTIAL,
    "experts' weights as they are": NOT_NORMALIZED,
    "dense": DENSE,
    "tied": Case("qwen3", {}, {**DENSE.changes, "tie_word_embeddings": True}),
    "mixtral": Case("mixtral", {"grouped": True}, FOUR_LAYERS),
    "latent attention": LATENT,
    "hybrid, MTP": Case(HYBRID.family, {**HYBRID.options, "mtp": True}, HYBRID.changes),
    "Mamba, latent experts": MAMBA,
    "Mamba, norms apart": Case(
        MAMBA.family,
        {"singleton": True, "grouped": True},
        {"layers_block_type": LAYERS},
    ),
    "Mamba, sequential": Case(MAMBA.family, {"fused": True}, {}),
    "latent attention, MTP": Case(LATENT.family, {**LATENT.options, "mtp": True}, FOUR_LAYERS),
}

ALL = [Ranks(tp=2), Ranks(ep=2), Ranks(pp=2), Ranks(tp=2, ep=2, pp=2)]


def digests(folder: Path) -> dict[str, str]:
    """Digests of all files but the reports, which name the checkpoint."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in ("report.html", "README.md", "quant_summary.json")
    }


SUFFICE = {"qwen3", "qwen3_moe", "mixtral"}
"""Families whose configuration can be made from a checkpoint's arguments."""


def predicted(case: Case, out: Path, theirs: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The model in `out`, and a batch for which its logits are those of Megatron's model."""
    model_class = getattr(transformers, FAMILIES[case.family].model_class)
    model = model_class.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    ids = torch.arange(24).reshape(2, 12) * 7 % model.config.vocab_size
    with torch.no_grad():
        logits = model.eval()(ids).logits
    assert float((logits - theirs[..., : logits.shape[-1]]).abs().max()) < CLOSE
    assert float(logits.abs().max()) > 1
    return model, ids


def check_own_configuration(case: Case, checkpoint: Path, out: Path, theirs: torch.Tensor) -> None:
    """Without `hf_config`, the configuration made from the arguments computes the same."""
    if case.family in SUFFICE:
        fourfold.convert(checkpoint, out)
        predicted(case, out, theirs)
        assert json.loads((out / "config.json").read_text())["eos_token_id"] is None
    else:
        with pytest.raises(fourfold.UsageError, match="`hf_config`"):
            fourfold.convert(checkpoint, out)


def check(case: Case, saved: Saved, folder: Path) -> None:
    """Converted, each sharding has the logits of megatron-core; quantized, the same bytes."""
    converted, quantized = [], []
    for name, checkpoint in saved.checkpoints.items():
        out = folder / f"hf {name}"
        fourfold.convert(checkpoint, out, hf_config=saved.hf_config)
        check_mtp_names(out, has_mtp=bool(case.options.get("mtp")))
        converted.append(digests(out))
        model, ids = predicted(case, out, saved.logits[name])
        check_own_configuration(case, checkpoint, folder / f"own {name}", saved.logits[name])
        if case.options.get("mtp"):
            difference = mtp_states(model, out, ids) - saved.mtp[name]
            assert float(difference.abs().max()) < CLOSE, name
        result = fourfold.quantize(
            checkpoint, folder / f"nvfp4 {name}", RECIPE, hf_config=saved.hf_config
        )
        assert result.clean
        quantized.append(digests(folder / f"nvfp4 {name}"))
    assert all(each == converted[0] for each in converted)
    assert all(each == quantized[0] for each in quantized)


BESIDE = {
    "fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden",
    "eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.norm", "shared_head.head",
}  # fmt: skip
"""Tensors of an MTP layer that decoder layers lack, by Qwen's names and by DeepSeek's."""


def check_mtp_names(out: Path, *, has_mtp: bool) -> None:
    """The MTP layer has the tensors of the last decoder layer, and those of `BESIDE`."""
    names = set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"])
    mtp = {name for name in names if name.startswith(("mtp.", "model.layers.4."))}
    assert bool(mtp) == has_mtp
    rest = {re.sub(r"^(mtp\.layers\.0|mtp|model\.layers\.4)\.", "", name) for name in mtp}
    beside = {name for name in rest if name.removesuffix(".weight") in BESIDE}
    assert len(beside) in ((4, 6) if has_mtp else (0,))
    layer = {name.removeprefix("model.layers.3.") for name in names if ".layers.3." in name}
    assert rest - beside == (layer if has_mtp else set())


@torch.no_grad()
def mtp_states(model: Any, out: Path, ids: torch.Tensor) -> torch.Tensor:
    """The converted MTP layer's output for a batch, from a decoder layer of transformers.

    What goes in is the next token's embedding and the model's last hidden state, both normalized.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    layer, names = ("mtp.layers.0.", QWEN) if "mtp.fc.weight" in tensors else (_DEEPSEEK, DEEPSEEK)
    fc, first, second, last = (tensors[name] for name in names)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    config.layer_types = ["full_attention"]
    config.first_k_dense_replace = 0
    body = type(model.model)(config).eval()
    norm = type(body.norm)(config.hidden_size, config.rms_norm_eps)
    own = [name for name in tensors if name.startswith(layer)]
    state = {f"layers.0.{name.removeprefix(layer)}": tensors[name] for name in own}
    report = body.load_state_dict(_fused({**state, "norm.weight": last}), strict=False)
    assert set(report.missing_keys) <= {"embed_tokens.weight"}
    hidden = model.model(ids).last_hidden_state
    following = model.model.embed_tokens(ids.roll(-1, 1).index_fill(1, torch.tensor([-1]), 0))
    parts = []
    for weight, states in ((first, following), (second, hidden)):
        norm.weight.copy_(weight)
        parts.append(norm(states))
    return body(inputs_embeds=torch.cat(parts, -1) @ fc.T).last_hidden_state


QWEN = (
    "mtp.fc.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight",
    "mtp.norm.weight",
)  # fmt: skip
_DEEPSEEK = "model.layers.4."
DEEPSEEK = tuple(
    f"{_DEEPSEEK}{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm")
)


def _fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fuse the experts, as transformers has them in memory."""
    made = {name: value for name, value in state.items() if not re.search(r"experts\.\d", name)}
    if len(made) < len(state):
        each = "layers.0.mlp.experts.{}.{}_proj.weight"
        pairs = [[state[each.format(e, x)] for x in ("gate", "up")] for e in range(4)]
        made["layers.0.mlp.experts.gate_up_proj"] = torch.stack([torch.cat(x) for x in pairs])
        downs = [state[each.format(e, "down")] for e in range(4)]
        made["layers.0.mlp.experts.down_proj"] = torch.stack(downs)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid, grouped", "Mamba, latent experts"])
def test_a_hybrid_of_two_ranks(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    check(case, run(case, [Ranks(tp=2, ep=2)], tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_sharding(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    shardings: Sequence[Ranks] = ALL
    if "Moe" not in FAMILIES[case.family].model_class and case.family == "qwen3":
        shardings = [Ranks(tp=2), Ranks(pp=2), Ranks(tp=2, pp=2)]
    check(case, run(case, shardings, tmp_path), tmp_path)
