# SPDX-License-Identifier: Apache-2.0
"""Every rule that `verify` applies: id, severity, what must hold, what a breach breaks.

The ids are stable: scripts may depend on them. `docs/verify.md` lists the same table.

**error**: an engine fails to load it, or computes wrong numbers, possibly without an error message.
**warning**: valid, but an engine, kernel or tool may refuse it, or work worse with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """The severity of a finding."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: what must hold, and what a breach does in which engine."""

    id: str
    severity: Severity
    says: str
    effect: str


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One breach of a rule. `tensor` names a tensor, a linear, a module, or a file."""

    severity: Severity
    id: str
    tensor: str
    found: str
    effect: str


_E, _W = Severity.ERROR, Severity.WARNING

_LOADERS = "vLLM, SGLang and TensorRT-LLM fail to load it"
_NEVER_READ = "engines leave the parameter as it was allocated: random numbers, without a word"
_GARBAGE = "every engine computes garbage, without a word"

_RULES = (
    # Files
    Rule("index-missing", _E, "Several shards come with an index.",
         "transformers refuses the folder; vLLM loads every *.safetensors file there is"),
    Rule("index-entry-missing", _E, "The index lists every tensor of its shards.",
         "transformers does not load the tensor; vLLM and SGLang take it from the shard anyway"),
    Rule("index-entry-wrong", _E, "What the index lists lies where the index says.",
         "transformers and TensorRT-LLM fail or skip the tensor"),
    Rule("index-total-size", _W, "The index's total_size is the sum of the tensors' bytes.",
         "tools that plan memory by it plan wrongly"),
    Rule("shard-unlisted", _W, "No safetensors file lies beside those that the index names.",
         "engines that load every *.safetensors file may read old weights over new ones"),
    Rule("tensor-twice", _E, "A tensor lies in one shard only.",
         "which copy wins depends on the engine and on the order of files"),

    # Configuration
    Rule("config-only-nested", _W, "config.json has a quantization_config.",
         "vLLM and SGLang fall back to hf_quant_config.json; other tools see a BF16 checkpoint"),
    Rule("config-nested-w4a16", _E, "W4A16_NVFP4 stands in config.json, not only in the nested "
         "form of hf_quant_config.json.", "vLLM refuses the checkpoint"),
    Rule("hf-quant-config-missing", _W, "hf_quant_config.json lies beside config.json.",
         "TensorRT-LLM reads this file first and may take the checkpoint for an unquantized one"),
    Rule("config-disagrees", _E, "config.json and hf_quant_config.json say the same; beside the "
         "compressed-tensors layout there is none.",
         "vLLM and SGLang follow config.json, TensorRT-LLM hf_quant_config.json: one is wrong"),
    Rule("quant-method", _E, "quant_method is modelopt, or compressed-tensors in that layout.",
         "vLLM and SGLang choose another loader, which fails on the scales or reads them wrongly"),
    Rule("quant-algo", _E, "quant_algo is NVFP4, W4A16_NVFP4 or MIXED_PRECISION.",
         "vLLM, SGLang and TensorRT-LLM refuse the checkpoint or look for other tensors"),
    Rule("group-size", _E, "group_size is 16, wherever it stands; in the compressed-tensors layout "
         "32 for MXFP8, and 128 for the inputs of FP8 blocks.",
         "block scales are read with the wrong stride, or refused"),
    Rule("config-groups", _E, "config_groups describe what quant_algo says: 4-bit float weights; "
         "4-bit float activations under NVFP4, none under W4A16_NVFP4; in the compressed-tensors "
         "layout, what the format of the group needs.",
         "vLLM and compressed-tensors readers build other layers than the tensors need"),
    Rule("config-format", _E, "In the compressed-tensors layout the format of a group is "
         "nvfp4-pack-quantized, float-quantized (FP8) or mxfp8-quantized, as its weights are; that "
         "of the whole is the same, or mixed-precision where the groups differ.",
         "SGLang refuses it; transformers reads the codes as those of another format"),
    Rule("config-status", _E, "In the compressed-tensors layout quantization_status is "
         "compressed.", "transformers builds layers with other parameters, and does not load them"),
    Rule("config-targets", _E, "In the compressed-tensors layout every reader finds a quantized "
         "linear in the same group.", "the engine builds it in another format than its tensors "
         "have"),
    Rule("quantized-layers", _E, "Under MIXED_PRECISION, quantized_layers names exactly the "
         "quantized linears.", "the layer is built in another format than its tensors have"),

    # Tensors
    Rule("fp8-tensors", _E, "An FP8 linear has the tensors, dtypes and shapes of its algorithm: "
         "weight F8_E4M3, weight_scale for all of it, a channel, a block or 32 inputs.", _LOADERS),
    Rule("weight-missing", _E, "A linear that has scales has a weight.", _NEVER_READ),
    Rule("block-scale-missing", _E, "A packed weight has its weight_scale.", _NEVER_READ),
    Rule("global-scale-missing", _E, "A packed weight has its weight_scale_2.", _NEVER_READ),
    Rule("input-scale-missing", _E, "Under NVFP4 (W4A4) a quantized linear has an input_scale.",
         "vLLM reads uninitialized memory for experts, SGLang takes 1.0, neither complains; "
         "TensorRT-LLM fails"),
    Rule("input-scale-unexpected", _W, "Under W4A16_NVFP4 no linear has an input_scale.",
         "vLLM 0.33 and SGLang read it and do not use it; older loaders fail at it"),
    Rule("weight-dtype", _E, "A quantized weight is uint8.", _LOADERS),
    Rule("block-scale-dtype", _E, "weight_scale is float8_e4m3fn.",
         "copied into an E4M3 parameter, the values are rounded or the load fails"),
    Rule("global-scale-dtype", _E, "weight_scale_2 is float32.",
         "a global scale near 1e-4 loses its digits in 16 bits; TensorRT-LLM fails"),
    Rule("input-scale-dtype", _E, "input_scale is float32.",
         "an input scale loses its digits in 16 bits; TensorRT-LLM fails"),
    Rule("weight-shape", _E, "A packed weight is [out, in/2].", _LOADERS),
    Rule("block-scale-shape", _E, "weight_scale is [out, in/16] of its weight.", _LOADERS),
    Rule("global-scale-shape", _E, "weight_scale_2 holds one number.", _LOADERS),
    Rule("input-scale-shape", _E, "input_scale holds one number.", _LOADERS),
    Rule("scale-not-scalar", _W, "weight_scale_2 and input_scale have shape [], not [1]; in the "
         "compressed-tensors layout global scales have shape [1].",
         "vLLM and SGLang reshape it; stricter loaders refuse it"),
    Rule("input-alignment", _E, "The input dimension is a multiple of 16.",
         "no engine has a kernel for it"),
    Rule("cutlass-alignment", _W, "An expert's intermediate size is a multiple of 64.",
         "CUTLASS and FlashInfer MoE kernels in vLLM and SGLang refuse it or need padding"),
    Rule("marlin-alignment", _W, "A quantized linear's dimensions are multiples of 64.",
         "vLLM's and SGLang's Marlin path (GPUs before Blackwell) refuses it"),
    Rule("expert-name", _E, "A quantized expert's linears are called as its family's loaders in "
         "engines map them: <experts module>.<number>.<projection>.",
         "vLLM, SGLang: KeyError while loading, or they skip the name and " + _NEVER_READ),
    Rule("expert-missing", _E, "Experts count from 0 to n-1 in every layer.", _NEVER_READ),
    Rule("projection-missing", _E, "Every expert of a layer has the same projections.",
         "vLLM counts per fused parameter and does not notice: " + _NEVER_READ),
    Rule("expert-shape", _E, "An expert's projections fit: gate and up [n, hidden], down "
         "[hidden, n].", _LOADERS),
    Rule("layer-missing", _E, "Layers count from 0 without a gap, as many as the config says.",
         _NEVER_READ),
    Rule("sibling-missing", _W, "No layer alone lacks what a layer otherwise like it has.",
         "if the architecture needs it: " + _NEVER_READ),
    Rule("tensor-unexpected", _E, "A quantized linear has no other tensors than the layout's, "
         "and no quantizer state is left over.", "vLLM, SGLang: KeyError while loading"),
    Rule("kept-weight-dtype", _E, "A weight that is not quantized is BF16, FP16 or FP32.",
         "engines copy the codes into a BF16 parameter as if they were numbers"),

    Rule("tied-head", _E, "Where config.json ties the head to the embedding, no other head is "
         "stored.", "engines leave the stored head out and compute logits with the embedding"),

    # Values
    Rule("kept-not-finite", _W, "A weight that is not quantized is finite, but for the embeddings "
         "of no token.", "what computes with it gives NaN, in every engine"),
    Rule("block-scale-zero", _E, "No block scale is 0.",
         "16 weights become 0 in every engine, without a word"),
    Rule("block-scale-nan", _E, "No block scale is NaN.",
         "the layer's output is NaN; in MoE layers no engine checks for it"),
    Rule("block-scale-negative", _E, "No block scale is negative.",
         "vLLM's Marlin path drops the sign bit, other kernels negate 16 weights"),
    Rule("block-scale-subnormal", _W, "No block scale falls below 2⁻⁶ after scaling up by what "
         "the layer's largest leaves.",
         "vLLM's Marlin path (GPUs before Blackwell) flushes these scales to 0"),
    Rule("fp8-scale-value", _E, "The scales of an FP8 weight are positive and finite.",
         "the weights under it are 0, or the output is NaN"),
    Rule("fp8-nan", _E, "No code of an FP8 weight is NaN.", "the layer's output is NaN"),
    Rule("global-scale-zero", _E, "weight_scale_2 is not 0.",
         "the whole weight is 0, or its reciprocal infinite, in every engine"),
    Rule("global-scale-nan", _E, "weight_scale_2 is finite.", "the layer's output is NaN or Inf"),
    Rule("global-scale-negative", _E, "weight_scale_2 is positive.",
         "every weight has the wrong sign, or the kernel's scale arithmetic breaks"),
    Rule("scale-product-underflow", _E, "The smallest block scale × global scale is a normal "
         "float32.", "GPU kernels flush it to 0, and 16 weights with it"),
    Rule("scale-product-overflow", _E, "6 × largest block scale × global scale is finite and in "
         "the range of bfloat16.", "weights become Inf, the output NaN"),
    Rule("input-scale-zero", _E, "input_scale is not 0.",
         "its reciprocal is infinite: the layer's output is NaN"),
    Rule("input-scale-nan", _E, "input_scale is finite.", "the layer's output is NaN"),
    Rule("input-scale-negative", _E, "input_scale is positive.",
         "activation block scales saturate at 0: " + _GARBAGE),
    Rule("kv-scale-dtype", _E, "k_scale and v_scale are float32.",
         "vLLM rounds them while loading; TensorRT-LLM fails"),
    Rule("kv-scale-shape", _E, "k_scale and v_scale hold one number.", _LOADERS),
    Rule("kv-scale-value", _E, "k_scale and v_scale are positive and finite.",
         "vLLM replaces a scale ≤ 0 by 1.0 or fails; a NaN spreads over the whole sequence"),
    Rule("kv-scale-missing", _E,
         "k_scale and v_scale come in pairs, in all layers but MTP layers, or in none.",
         "engines take 1.0 for the missing one, without a word"),
    Rule("kv-scale-unexpected", _W, "k_scale and v_scale come with an FP8 KV cache in the config.",
         "vLLM and SGLang use them only if the KV cache's dtype is asked for by hand"),
    Rule("kv-cache-format", _W, "The KV cache that the config names is in FP8 or NVFP4.",
         "vLLM warns and keeps the model's dtype, SGLang keeps it without a word"),
    Rule("kv-cache-scheme", _E, "In the compressed-tensors layout kv_cache_scheme is 8-bit float, "
         "symmetric and static, with one scale for a tensor or a head.",
         "vLLM refuses to start, SGLang keeps the model's dtype"),
    Rule("kv-cache-latent", _W, "An NVFP4 KV cache is not for MLA.",
         "vLLM refuses to start, unless the KV cache's dtype is asked for by hand"),

    # Linears that belong together
    Rule("group-scale-differs", _E, "Linears that engines fuse share one weight_scale_2.",
         "vLLM warns and takes the largest (or w1's) without rescaling, SGLang takes the largest: "
         "wrong numbers; TensorRT-LLM fails an assertion"),
    Rule("group-algo-differs", _E, "Linears that engines fuse have one algorithm.",
         "vLLM refuses it, or builds all of them by the first one's"),
    Rule("fp8-group-scale-differs", _W, "FP8 linears that engines fuse share one weight_scale.",
         "vLLM quantizes their weights again with the largest, and loses some"),
    Rule("group-input-scale-differs", _E, "Linears that engines fuse share one input_scale.",
         "vLLM and SGLang take the largest; TensorRT-LLM fails an assertion"),
    Rule("group-partial", _E, "A module that an engine fuses is quantized wholly or not at all: "
         "q/k/v, gate/up, all experts of a layer.",
         "vLLM and SGLang refuse it, or read packed codes into BF16 parameters"),
    Rule("site-input-scale-differs", _W, "All experts' gate and up of a layer share one "
         "input_scale, and so do all experts' down.",
         "FlashInfer MoE kernels in vLLM and SGLang take the largest for all experts"),
    Rule("ignore-lacks-unquantized", _E, "The ignore list covers every linear that is not "
         "quantized, under each engine's matching.",
         "the engine builds a quantized layer for it, and fails on the BF16 weight or never "
         "fills the parameter"),
    Rule("ignore-excludes-quantized", _E, "The ignore list covers no quantized linear, under any "
         "engine's matching.",
         "the engine builds a BF16 layer for it, and fails on the scales or reads codes as such"),
    Rule("ignore-refused", _E, "Each engine can apply the ignore list: all parts of a fused "
         "module or none, and valid patterns.", "the engine raises an error while loading"),

    # The source
    Rule("config-contradicts", _E, "config.json has the source's sizes, counts and architecture.",
         "engines build another model than the tensors are of"),
    Rule("config-changed", _W, "config.json is the source's, but for quantization_config.",
         "engines read other hyperparameters, or field names that they do not know"),
    Rule("side-file-missing", _W, "The files beside the source's weights lie beside the output's.",
         "without its tokenizer or chat template an engine refuses it, or prompts it badly"),
    Rule("tensor-lost", _E, "Every tensor of the source is quantized or copied.", _NEVER_READ),
    Rule("tensor-extra", _E, "Every tensor comes from the source.",
         "vLLM and SGLang: KeyError while loading, or a weight that the model does not have"),
    Rule("tensor-unplaced", _W, "Every tensor has a place in the architecture, or is an MTP "
         "layer's.", "transformers computes without it; vLLM and SGLang: KeyError while loading, "
         "unless they skip its name"),
    Rule("copied-dtype-differs", _E, "A copied tensor has the source's dtype.",
         "numbers are rounded, in every engine"),
    Rule("copied-shape-differs", _E, "A copied tensor has the source's shape.", _LOADERS),
    Rule("copied-bits-differ", _E, "A copied tensor is the source's, bit for bit.",
         "every engine computes with other numbers than the source, without a word"),
    Rule("quantized-shape-differs", _E, "A quantized linear has the source's [out, in].",
         _LOADERS),
    Rule("weight-error", _E, "A dequantized weight is the source's, up to what NVFP4 must lose.",
         "swapped or shuffled rows, nibbles, experts or scales: " + _GARBAGE),
    Rule("weight-ruined", _W, "A weight's scales can hold it.",
         "nothing is in the wrong place, but little of the weight is left: too small beside an "
         "outlier of its scale group, or below what NVFP4 can express"),
    Rule("weight-error-outlier", _W, "A weight's error is like its siblings', or explained by its "
         "values.", "nearly equal experts may have been swapped, or the scales chosen badly"),
    Rule("source-not-finite", _E, "The source's weights are finite.",
         "the source itself gives NaN; nothing can be said of the quantized weight"),
    Rule("reference-differs", _E, "The reference is what the source was made from.",
         "the errors against it say nothing of the output; give the right one, without NaN"),
)  # fmt: skip

RULES: Mapping[str, Rule] = {rule.id: rule for rule in _RULES}
"""By id, in the order of the documentation."""


def finding(rule_id: str, tensor: str, found: str) -> Finding:
    """Return a breach of the rule `rule_id`."""
    rule = RULES[rule_id]
    return Finding(rule.severity, rule.id, tensor, found, rule.effect)
