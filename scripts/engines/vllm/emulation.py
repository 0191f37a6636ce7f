# SPDX-License-Identifier: Apache-2.0
"""NVFP4 for vLLM's CPU platform, which has no kernels for it: vLLM's own emulation in its place.

Only the products are replaced. Loader, names, fusing, scales, and what is quantized stay vLLM's:
weights are dequantized by `dequantize_to_dtype`, and under W4A4 inputs are rounded by
`ref_nvfp4_quant_dequant`, as vLLM does on GPUs without NVFP4.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearLayerConfig
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.fused_moe.router import cpu_router
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    dequantize_to_dtype,
    ref_nvfp4_quant_dequant,
)
from vllm.model_executor.models.registry import _LazyRegisteredModel, _ModelInfo


class WeightOnlyKernel(EmulationNvFp4LinearKernel):
    """W4A16: the inputs are not rounded."""

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        scale = layer.weight_global_scale
        weight = dequantize_to_dtype(
            layer.weight.data, layer.weight_scale.data, scale, x.dtype, swizzle=False
        )
        return F.linear(x, weight, bias)


class EmulatedExperts(CPUUnquantizedExperts):
    """W4A4 experts as plain matrix products, one expert after the other."""

    rounds_inputs = True

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave the weights packed."""

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        *rest: Any,
        apply_router_weight_on_input: bool = False,
        **more: Any,
    ) -> None:
        config, dtype = self.quant_config, hidden_states.dtype
        w13 = dequantize_to_dtype(w1, self.w1_scale, config.g1_alphas, dtype, swizzle=False)
        w2 = dequantize_to_dtype(w2, self.w2_scale, config.g2_alphas, dtype, swizzle=False)
        output.zero_()
        for expert in topk_ids.unique().tolist():
            token, place = (topk_ids == expert).nonzero(as_tuple=True)
            inner = self._rounded(hidden_states[token], config.a1_gscale) @ w13[expert].T
            inner = self._rounded(self._activated(activation, inner), config.a2_gscale)
            out = inner @ w2[expert].T
            if not apply_router_weight_on_input:
                out = out * topk_weights[token, place, None]
            output.index_add_(0, token, out.to(dtype))

    def _rounded(self, x: Tensor, global_scale: Tensor) -> Tensor:
        return ref_nvfp4_quant_dequant(x, global_scale, 16) if self.rounds_inputs else x

    def _activated(self, activation: MoEActivation, inner: Tensor) -> Tensor:
        """The activation by its definition: vLLM's CPU build has not all of its kernels."""
        gate, up = inner.chunk(2, -1) if activation.is_gated else (inner, None)
        limit = self.quant_config.gemm1_clamp_limit or self.moe_config.swiglu_limit
        if activation is MoEActivation.SWIGLUOAI_UNINTERLEAVE:
            alpha = self.quant_config.gemm1_alpha or self.moe_config.swiglu_alpha
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return gate * torch.sigmoid(alpha * gate) * (up + self.quant_config.gemm1_beta)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        gate = _FUNCTIONS[activation.value.removesuffix("_no_mul")](gate)
        return gate if up is None else gate * up


class WeightOnlyExperts(EmulatedExperts):
    """W4A16 experts: the inputs are not rounded."""

    rounds_inputs = False


_FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def linear_kernel(use_a16: bool = False) -> EmulationNvFp4LinearKernel:
    """Stand in for `init_nvfp4_linear_kernel`."""
    kernel = WeightOnlyKernel if use_a16 else EmulationNvFp4LinearKernel
    return kernel(NvFp4LinearLayerConfig())


def no_kernel(**options: Any) -> EmulationNvFp4LinearKernel:
    """Stand in for the kernels of FP8 layers in a model that is loaded and not run."""
    return linear_kernel()


def moe_backend(config: Any, weight_key: Any, activation_key: Any) -> tuple[Any, type]:
    """Stand in for `select_nvfp4_moe_backend`."""
    experts = WeightOnlyExperts if activation_key is None else EmulatedExperts
    return NvFp4MoeBackend.EMULATION, experts


def biased(route: Any) -> Any:
    """`CPURouter` ignores the experts' bias where they have no groups. One group of all experts
    means the same, and there it does not."""

    def compute_routing(self: Any, hidden: Tensor, logits: Tensor, *rest: Any, **more: Any) -> Any:
        plain = self.scoring_func == "softmax" and self.e_score_correction_bias is None
        grouped = self.use_grouped_topk or self.scoring_func == "sqrtsoftplus"
        if plain or grouped or self.custom_routing_function is not None:
            return route(self, hidden, logits, *rest, **more)
        return cpu_router._grouped_topk(
            gating_output=logits,
            topk=self.top_k,
            renormalize=self.renormalize,
            num_expert_group=1,
            topk_group=1,
            scoring_func=self.scoring_func,
            routed_scaling_factor=self.routed_scaling_factor,
            e_score_correction_bias=self.e_score_correction_bias,
        )

    return compute_routing


def without_gate(check: Any) -> Any:
    """Let the check of an experts' configuration pass where they have no gate, as on GPUs."""

    def post_init(self: Any) -> None:
        try:
            check(self)
        except NotImplementedError as error:
            if "is_act_and_mul=False" not in str(error):
                raise

    return post_init


CUTLASS = ("", ".cute", ".cute.nvgpu", ".cute.nvgpu.common", ".cute.nvgpu.cpasync", ".cute.runtime")
CUTLASS += (".cutlass_dsl", "._mlir", "._mlir.dialects", ".pipeline", ".utils")


def without_cuda() -> None:
    """Let models for CUDA alone be imported and built, to load their weights and not run them."""
    names = [f"cutlass{name}" for name in CUTLASS]
    for name in (*names, "cuda", "cuda.bindings", "cuda.bindings.driver"):
        sys.modules.setdefault(name, MagicMock())
    torch.cuda.Stream = torch.cuda.Event = MagicMock()
    modelopt.init_fp8_linear_kernel = modelopt.init_mxfp8_linear_kernel = no_kernel


def install() -> None:
    """Replace what vLLM lacks on a CPU in this process, and allow float32 with NVFP4."""
    cpu_router.CPURouter._compute_routing = biased(cpu_router.CPURouter._compute_routing)
    FusedMoEConfig.__post_init__ = without_gate(FusedMoEConfig.__post_init__)
    modelopt.init_nvfp4_linear_kernel = linear_kernel
    modelopt.select_nvfp4_moe_backend = moe_backend
    for config in (modelopt.ModelOptNvFp4Config, modelopt.ModelOptMixedPrecisionConfig):
        config.get_supported_act_dtypes = lambda self: [torch.float32, torch.bfloat16]
    # vLLM looks at a model's class in a new process each, which takes longer than all the rest.
    _LazyRegisteredModel.inspect_model_cls = lambda self: _ModelInfo.from_model_cls(
        self.load_model_cls()
    )
