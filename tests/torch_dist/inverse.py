# SPDX-License-Identifier: Apache-2.0
"""Hugging Face tensors as Megatron keeps them: written with views of tensors, without our rules.

Only for the sizes of `tests/families`: 4 heads of 16 in 2 groups, 3 layers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

GROUPS, SIZE = 2, 16
PADDING = 24
"""Rows beyond the vocabulary."""

Tensors = dict[str, Tensor]


def qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Groups of queries, then the group's key and value."""
    rest = q.shape[1:]
    parts = [x.reshape(GROUPS, -1, *rest) for x in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def gated_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `qkv`; in q each head is followed by its gate, in Megatron all queries by all gates."""
    heads = q.reshape(GROUPS, -1, 2, SIZE, q.shape[-1])
    queries, gates = heads[:, :, 0], heads[:, :, 1]
    flat = [x.reshape(GROUPS, -1, q.shape[-1]) for x in (queries, gates, k, v)]
    return torch.cat(flat, dim=1).reshape(-1, q.shape[-1])


def padded(tensor: Tensor) -> Tensor:
    """A vocabulary that tensor parallelism divides."""
    return torch.cat([tensor, torch.full((PADDING, *tensor.shape[1:]), 7.0).to(tensor)])


@dataclass
class Layer:
    """One decoder layer's tensors, by their names in it; each is taken once."""

    tensors: Tensors
    made: Tensors = field(default_factory=dict)

    def take(self, *names: str) -> list[Tensor] | None:
        if any(name not in self.tensors for name in names):
            return None
        return [self.tensors.pop(name) for name in names]

    def move(self, key: str, *names: str, by: Callable[..., Tensor] | None = None) -> None:
        taken = self.take(*names)
        if taken is not None:
            self.made[key] = by(*taken) if by else taken[0]


def cat(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def megatron_layer(tensors: Mapping[str, Tensor], *, te: bool = True) -> Tensors:
    """A decoder layer of any of the families, in Megatron's names; experts stacked `[E, …]`.

    te: norms that are part of the linear layer behind them are called after it.
    """
    layer = Layer(dict(tensors))
    is_moe = any("experts" in name for name in tensors)
    is_delta = "linear_attn.in_proj_z.weight" in tensors
    is_latent = "self_attn.kv_b_proj.weight" in tensors
    after = (
        "input_layernorm.weight" if is_latent or not te
        else "self_attention.in_proj.layer_norm_weight" if is_delta
        else "self_attention.linear_qkv.layer_norm_weight"
    )  # fmt: skip
    layer.move(after, "input_layernorm.weight")
    before = "mlp.linear_fc1.layer_norm_weight" if te and not is_moe else "pre_mlp_layernorm.weight"
    layer.move(before, "post_attention_layernorm.weight")
    _attention(layer)
    _latent(layer, te)
    _delta(layer)
    _mlp(layer)
    _experts(layer)
    assert not layer.tensors, list(layer.tensors)
    return layer.made


def _attention(layer: Layer) -> None:
    a = "self_attention"
    q = layer.tensors.get("self_attn.q_proj.weight")
    o = layer.tensors.get("self_attn.o_proj.weight")
    if q is not None and o is not None:
        by = gated_qkv if q.shape[0] == 2 * o.shape[1] else qkv
        names = [f"self_attn.{x}_proj.weight" for x in "qkv"]
        layer.move(f"{a}.linear_qkv.weight", *names, by=by)
    layer.move(f"{a}.linear_proj.weight", "self_attn.o_proj.weight")
    layer.move(f"{a}.q_layernorm.weight", "self_attn.q_norm.weight")
    layer.move(f"{a}.k_layernorm.weight", "self_attn.k_norm.weight")


def _latent(layer: Layer, te: bool) -> None:
    a, s = "self_attention", "self_attn"
    layer.move(f"{a}.linear_q_down_proj.weight", f"{s}.q_a_proj.weight")
    layer.move(f"{a}.linear_q_up_proj.weight", f"{s}.q_b_proj.weight")
    layer.move(f"{a}.linear_kv_down_proj.weight", f"{s}.kv_a_proj_with_mqa.weight")
    layer.move(f"{a}.linear_kv_up_proj.weight", f"{s}.kv_b_proj.weight")
    q, kv = (
        (f"{a}.linear_q_up_proj.layer_norm_weight", f"{a}.linear_kv_up_proj.layer_norm_weight")
        if te
        else (f"{a}.q_layernorm.weight", f"{a}.kv_layernorm.weight")
    )
    layer.move(q, f"{s}.q_a_layernorm.weight")
    layer.move(kv, f"{s}.kv_a_layernorm.weight")


def _delta(layer: Layer) -> None:
    a, s = "self_attention", "linear_attn"
    for name, source in (("in_proj", "in_proj_qkv"), ("conv1d", "conv1d")):
        taken = layer.take(f"{s}.{source}.weight")
        if taken is not None:
            values = taken[0].shape[0] // 2  # as many as queries and keys together
            for part, tensor in zip(
                ("query", "key", "value"),
                taken[0].split([values // 2, values // 2, values]),
                strict=True,
            ):
                layer.made[f"{a}.{name}.weight.{part}"] = tensor
    layer.move(f"{a}.in_proj.weight.z", f"{s}.in_proj_z.weight")
    layer.move(f"{a}.in_proj.weight.beta", f"{s}.in_proj_b.weight")
    layer.move(f"{a}.in_proj.weight.alpha", f"{s}.in_proj_a.weight")
    layer.move(f"{a}.A_log", f"{s}.A_log")
    layer.move(f"{a}.dt_bias", f"{s}.dt_bias")
    layer.move(f"{a}.out_norm.weight", f"{s}.norm.weight", by=lambda w: (w.double() - 1).to(w))
    layer.move(f"{a}.out_proj.weight", f"{s}.out_proj.weight")


def _mlp(layer: Layer) -> None:
    shared = "mlp.shared_experts"
    for to, of in (("mlp", "mlp"), (shared, "mlp.shared_expert"), (shared, "mlp.shared_experts")):
        fc1 = [f"{of}.gate_proj.weight", f"{of}.up_proj.weight"]
        layer.move(f"{to}.linear_fc1.weight", *fc1, by=cat)
        layer.move(f"{to}.linear_fc2.weight", f"{of}.down_proj.weight")
    layer.move(f"{shared}.gate_weight", "mlp.shared_expert_gate.weight")
    for gate in ("mlp.gate", "block_sparse_moe.gate"):
        layer.move("mlp.router.weight", f"{gate}.weight")
    layer.move("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias")


def _experts(layer: Layer) -> None:
    fc1, fc2 = (f"mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))
    stack = layer.tensors.get("mlp.experts.gate_up_proj")
    is_transposed = stack is not None and stack.shape[1] < stack.shape[2]  # [E, 64, 2 · 48]
    for key, name in ((fc1, "gate_up_proj"), (fc2, "down_proj")):
        layer.move(
            key, f"mlp.experts.{name}", by=(lambda w: w.mT.contiguous()) if is_transposed else None
        )
    for where, names in (
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
        ("block_sparse_moe", ("w1", "w3", "w2")),
    ):
        found = [
            [layer.tensors.pop(f"{where}.experts.{e}.{name}.weight") for name in names]
            for e in range(4)
            if f"{where}.experts.{e}.{names[0]}.weight" in layer.tensors
        ]
        if found:
            layer.made[fc1] = torch.stack([torch.cat([gate, up]) for gate, up, _ in found])
            layer.made[fc2] = torch.stack([down for _, _, down in found])


def to_megatron(raw: Mapping[str, Tensor], *, te: bool = True, dialect: str = "auto") -> Tensors:
    """A whole checkpoint in one of Megatron's dialects of keys.

    A: a layer axis, where all layers are alike. B: layers apart. C: experts apart, too.
    """
    if "backbone.embeddings.weight" in raw:
        return mamba_hybrid(raw, te=te, experts_apart=dialect == "C")
    left = dict(raw)
    made: Tensors = {}
    model = "model.language_model." if any("language_model" in key for key in raw) else "model."
    made["embedding.word_embeddings.weight"] = padded(left.pop(f"{model}embed_tokens.weight"))
    if "lm_head.weight" in left:
        made["output_layer.weight"] = padded(left.pop("lm_head.weight"))
    made["decoder.final_layernorm.weight"] = left.pop(f"{model}norm.weight")
    for key in [key for key in left if key.startswith("model.visual.")]:
        made[key.replace("model.visual.", "vision_model.")] = left.pop(key)
    layers: dict[int, Tensors] = defaultdict(dict)
    mtp: Tensors = {}
    for key, tensor in left.items():
        found = re.fullmatch(re.escape(model) + r"layers\.(\d+)\.(.+)", key)
        if found and int(found[1]) < 3:
            layers[int(found[1])][found[2]] = tensor
        else:
            mtp[key] = tensor
    body = [megatron_layer(layers[number], te=te) for number in range(3)]
    alike = all(
        {key: x.shape for key, x in each.items()} == {key: x.shape for key, x in body[0].items()}
        for each in body
    )
    if dialect == "auto":
        dialect = "A" if alike else "B"
    if dialect == "A":
        for key in body[0]:
            made[f"decoder.layers.{key}"] = torch.stack([each[key] for each in body])
    else:
        for number, each in enumerate(body):
            for key, tensor in each.items():
                made |= _apart(f"decoder.layers.{number}.{key}", tensor, dialect)
    made |= _mtp(mtp, te)
    return made


HEADS, WIDTH, STATE = 8, 128, 32
"""Mamba: heads; channels of x and of z; groups times states, the channels of B and of C."""


def mamba_hybrid(raw: Mapping[str, Tensor], *, te: bool, experts_apart: bool) -> Tensors:
    """Nemotron-H as megatron-core's `MambaModel` saves it: layers apart, projections in parts."""
    made: Tensors = {}
    for key, tensor in raw.items():
        found = re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", key)
        if found is None:
            continue
        mixer = {name for name in raw if name.startswith(f"backbone.layers.{found[1]}.mixer.")}
        kinds = ("in_proj", "q_proj", "experts", "up_proj")
        kind = next(kind for kind in kinds if any(f"mixer.{kind}" in name for name in mixer))
        layer = f"decoder.layers.{found[1]}."
        for name, part in _of_hybrid(kind, found[2], tensor, te).items():
            made[layer + name] = part
    for layer in {key.rpartition("query.")[0] for key in made if "query." in key}:
        q, k, v = (made.pop(f"{layer}{name}.weight") for name in ("query", "key", "value"))
        made[f"{layer}linear_qkv.weight"] = qkv(q, k, v)
    if not experts_apart:
        each = re.compile(r"(.+\.mlp\.experts\.experts\.)(\d+)\.(linear_fc[12]\.weight)")
        apart = [found for key in made if (found := each.fullmatch(key))]
        for head, tail in {(found[1], found[3]) for found in apart}:
            made[head + tail] = torch.stack([made.pop(f"{head}{e}.{tail}") for e in range(4)])
    made["embedding.word_embeddings.weight"] = padded(raw["backbone.embeddings.weight"])
    made["output_layer.weight"] = padded(raw["lm_head.weight"])
    made["decoder.final_norm.weight"] = raw["backbone.norm_f.weight"]
    return made


def _of_hybrid(kind: str, name: str, tensor: Tensor, te: bool) -> Tensors:
    """One tensor of a layer whose mixer is of some kind."""
    if name == "norm.weight":
        inside = {"in_proj": "mixer.in_proj", "q_proj": "self_attention.linear_qkv",
                  "up_proj": "mlp.linear_fc1"}  # fmt: skip
        beside = {"in_proj": "norm", "q_proj": "input_layernorm"}
        fused = te and kind in inside
        return {
            f"{inside[kind]}.layer_norm_weight" if fused
            else f"{beside.get(kind, 'pre_mlp_layernorm')}.weight": tensor
        }  # fmt: skip
    if kind == "in_proj":
        if name == "mixer.in_proj.weight":
            parts, letters = tensor.split([WIDTH, WIDTH, STATE, STATE, HEADS]), "z x B C dt"
        elif "conv1d" in name:
            parts, letters = tensor.split([WIDTH, STATE, STATE]), "x B C"
        else:
            return {name: tensor}
        return {f"{name}.{x}": part for x, part in zip(letters.split(), parts, strict=True)}
    rest = name.removeprefix("mixer.")
    if kind == "q_proj":
        own = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "linear_proj"}
        return {f"self_attention.{own[rest.partition('.')[0]]}.weight": tensor}
    own = {"gate.weight": "router.weight", "gate.e_score_correction_bias": "router.expert_bias"}
    rest = own.get(rest, rest)
    rest = rest.replace("up_proj", "linear_fc1").replace("down_proj", "linear_fc2")
    return {"mlp." + re.sub(r"^experts", "experts.experts", rest): tensor}


def _apart(key: str, tensor: Tensor, dialect: str) -> Tensors:
    if dialect != "C":
        return {key: tensor}
    is_fc1 = key.endswith("linear_fc1.weight")
    if ".experts.experts." not in key:
        if not is_fc1:
            return {key: tensor}
        gate, up = tensor.chunk(2)
        return {f"{key}_w": gate, f"{key}_v": up}
    found: Tensors = {}
    for expert, each in enumerate(tensor):
        name = key.replace(".experts.experts.", f".experts.experts.{expert}.")
        if is_fc1:
            found[f"{name}_w"], found[f"{name}_v"] = each.chunk(2)
        else:
            found[name] = each
    return found


def _mtp(tensors: Tensors, te: bool) -> Tensors:
    """One MTP layer, of Qwen's names or of DeepSeek's."""
    made: Tensors = {}
    body: Tensors = {}
    names = {
        "mtp.fc.weight": "eh_proj.weight",
        "mtp.pre_fc_norm_embedding.weight": "enorm.weight",
        "mtp.pre_fc_norm_hidden.weight": "hnorm.weight",
        "mtp.norm.weight": "final_layernorm.weight",
        "model.layers.3.eh_proj.weight": "eh_proj.weight",
        "model.layers.3.enorm.weight": "enorm.weight",
        "model.layers.3.hnorm.weight": "hnorm.weight",
        "model.layers.3.shared_head.norm.weight": "final_layernorm.weight",
    }
    for key, tensor in tensors.items():
        rest = re.sub(r"^(mtp\.layers\.0|model\.layers\.3)\.", "", key)
        if key in names:
            made[f"mtp.layers.0.{names[key]}"] = tensor
        elif rest not in ("embed_tokens.weight", "shared_head.head.weight"):  # Megatron has one
            body[rest] = tensor
    if body:
        for key, tensor in megatron_layer(body, te=te).items():
            made[f"mtp.layers.0.transformer_layer.{key}"] = tensor
    return made
