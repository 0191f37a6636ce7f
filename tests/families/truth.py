# SPDX-License-Identifier: Apache-2.0
"""The logical linear weights of a model, read from its modules in memory.

Every weight is returned as the matrix `[out, in]` it stands for, whatever the module keeps:
fused or not, transposed or not, gate and up concatenated or interleaved. Written against
transformers' modules only, so that it can judge what fourfold finds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Expert = tuple[str, int, str]  # (experts module, expert, "gate" | "up" | "down")
Matrices = dict[str, list[Tensor]]  # projection -> one [out, in] for each expert


@dataclass(frozen=True)
class Truth:
    """What a written checkpoint holds.

    `experts` and `linears` map each logical linear weight to its matrix `[out, in]`. An expert
    that is made of `nn.Linear` modules (Switch, NLLB) is in both. `raw` has every tensor on disk
    by its key; `extra` names those of them that the model in memory has no place for (MTP).
    """

    experts: dict[Expert, Tensor]
    linears: dict[str, Tensor]
    raw: dict[str, Tensor]
    extra: frozenset[str] = frozenset()
    state: dict[str, Tensor] = field(default_factory=dict)  # the model's parameters and buffers

    @property
    def weights(self) -> dict[str | Expert, Tensor]:
        return {**self.linears, **self.experts}


@dataclass(frozen=True)
class Stacked:
    """How an experts module keeps its weights: the flags of `use_experts_implementation`."""

    has_gate: bool = True
    is_transposed: bool = False
    is_concatenated: bool = True


# Experts modules that transformers does not decorate.
UNDECORATED = {
    "Llama4TextExperts": Stacked(is_transposed=True),
    "LongcatFlashExperts": Stacked(),
    "Step3p7Experts": Stacked(),
}


def stacked(module: nn.Module) -> Stacked | None:
    """How `module` keeps its experts, or None where it is not an experts module."""
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
        return Stacked(module.has_gate, module.is_transposed, module.is_concatenated)
    return UNDECORATED.get(type(module).__name__)


def stacked_parameters(how: Stacked) -> tuple[str, str]:
    return ("gate_up_proj" if how.has_gate else "up_proj", "down_proj")


def linears_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def experts_of(model: nn.Module) -> dict[str, Matrices]:
    """Experts module -> projection -> one matrix for each expert."""
    found: dict[str, Matrices] = {}
    for name, module in model.named_modules():
        how = stacked(module)
        if how is not None:
            found[name] = _split_stacked(module, how)
        elif reader := OTHER.get(type(module).__name__):
            found[name] = reader(module)
    return found


def flatten(experts: dict[str, Matrices]) -> dict[Expert, Tensor]:
    return {
        (path, index, projection): matrix
        for path, matrices in experts.items()
        for projection, stack in matrices.items()
        for index, matrix in enumerate(stack)
    }


def _split_stacked(module: nn.Module, how: Stacked) -> Matrices:
    first, down_name = stacked_parameters(how)
    first_eoi, down_eoi = getattr(module, first).detach(), getattr(module, down_name).detach()
    if how.is_transposed:
        first_eoi, down_eoi = first_eoi.mT, down_eoi.mT
    n_experts = down_eoi.shape[0]  # LongCat keeps unused rows for its zero experts
    down = list(down_eoi.contiguous())
    if not how.has_gate:
        return {"up": list(first_eoi[:n_experts].contiguous()), "down": down}
    if how.is_concatenated:
        gate, up = first_eoi.chunk(2, dim=1)
    else:
        gate, up = first_eoi[:, 0::2], first_eoi[:, 1::2]
    return {
        "gate": list(gate[:n_experts].contiguous()),
        "up": list(up[:n_experts].contiguous()),
        "down": down,
    }


def _dbrx(module: nn.Module) -> Matrices:
    shape = (module.moe_num_experts, module.ffn_hidden_size, module.hidden_size)
    gate, up, down = (getattr(module, n).detach().view(shape) for n in ("w1", "v1", "w2"))
    return {"gate": list(gate), "up": list(up), "down": list(down.mT.contiguous())}


def _jetmoe(module: nn.Module) -> Matrices:
    gate, up = module.input_linear.weight.detach().chunk(2, dim=1)
    down = module.output_linear.weight.detach()
    return {"gate": list(gate), "up": list(up), "down": list(down)}


def _module_dict(up: str, down: str):
    def read(module: nn.ModuleDict) -> Matrices:
        experts = [expert for name, expert in module.items() if name.startswith("expert_")]
        return {
            "up": [getattr(expert, up).weight.detach() for expert in experts],
            "down": [getattr(expert, down).weight.detach() for expert in experts],
        }

    return read


OTHER = {
    "DbrxExpertGLU": _dbrx,
    "JetMoeMoE": _jetmoe,
    "SwitchTransformersExperts": _module_dict("wi", "wo"),
    "NllbMoeExperts": _module_dict("fc1", "fc2"),
}


def randomize(model: nn.Module, seed: int) -> None:
    """Give every parameter (and router bias) random values that bfloat16 holds exactly.

    Matrices get a standard deviation of 1/sqrt(fan in), so that a forward pass stays finite and
    no two experts look alike; vectors keep their initial value with some noise on top.
    """
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict(keep_vars=True)
    parameters = {id(t): t for name, t in saved.items() if _is_learned(name, t)}
    with torch.no_grad():
        for tensor in parameters.values():
            if tensor.is_floating_point():
                tensor.copy_(_random(tensor, generator).bfloat16())


def _is_learned(name: str, tensor: Tensor) -> bool:
    """A parameter, or one of the router biases that many families keep as buffers."""
    return isinstance(tensor, nn.Parameter) or name.endswith(("correction_bias", "expert_bias"))


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim < 2:
        start = tensor.detach().float()
        return torch.where(start.isfinite(), start, 0) + 0.05 * noise
    fan_in = tensor.shape[-1] if tensor.ndim == 2 or tensor.shape[0] < 16 else tensor[0].numel()
    return noise * fan_in**-0.5
