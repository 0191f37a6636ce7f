# SPDX-License-Identifier: Apache-2.0
"""Patches that let megatron-core build, run and save a model on a CPU. For worker processes only.

Megatron asks CUDA for its device and its random states, and takes kernels of Transformer Engine
and of flash-linear-attention where it has no code of its own. Here it gets the CPU, and plain
modules of the same layout: the classes that hold and save the weights stay Megatron's.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

warnings.filterwarnings("ignore")
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what Megatron would compile takes half a minute

torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """einops' function, for permutations whose last axes may be split or joined."""
    before, after = pattern.split(" -> ")
    if "(" in before:
        x = x.unflatten(-1, (-1, *sizes.values()))
    names, order = (re.sub("[()]", "", side).split() for side in (before, after))
    x = x.permute([names.index(name) for name in order])
    return x.flatten(-2) if "(" in after else x


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, _: int, **options: Any) -> Tensor:
    """The recurrence of Mamba-2, a token at a time: h = exp(dt a) h + dt b x, y = c h + D x."""
    dt = nn.functional.softplus(dt + options["dt_bias"])
    b, c = (each.repeat_interleave(x.shape[2] // each.shape[2], 2) for each in (b, c))
    state = torch.zeros(*x[:, 0].shape, b.shape[-1])
    found = []
    for t in range(x.shape[1]):
        added = dt[:, t, :, None, None] * x[:, t, :, :, None] * b[:, t, :, None]
        state = torch.exp(dt[:, t] * a)[..., None, None] * state + added
        found.append((state * c[:, t, :, None]).sum(-1) + options["D"][:, None] * x[:, t])
    return torch.stack(found, 1)


class GatedNorm(nn.Module):
    """RMS norm of groups of channels, after these were multiplied by their gates."""

    def __init__(self, size: int, eps: float, group_size: int, dtype: Any, **_: Any) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        groups = (x * nn.functional.silu(z)).unflatten(-1, (-1, self.group_size))
        return (
            nn.functional.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2)
            * self.weight
        )


_KERNELS: dict[str, dict[str, Any]] = {
    "einops": {"rearrange": rearrange, "repeat": None},
    "mamba_ssm": {},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": GatedNorm},
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": scan,
        "mamba_split_conv1d_scan_combined": None,
    },
}
"""Modules that megatron-core's Mamba layers import → what they take from them."""

for _name, _members in _KERNELS.items():
    sys.modules[_name] = ModuleType(_name)
    vars(sys.modules[_name]).update(_members)
from megatron.core.ssm import mamba_mixer  # noqa: E402

for _name in _KERNELS:
    del sys.modules[_name]
assert mamba_mixer.HAVE_MAMBA_SSM

from megatron.core.ssm import gated_delta_net  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from megatron.core.transformer import multi_latent_attention  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.utils import (  # noqa: E402
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

megatron_random.CudaRNGStatesTracker.fork = (  # type: ignore[method-assign]
    lambda self, *_: contextlib.nullcontext()
)
moe_utils.te_general_gemm = None
multi_latent_attention.HAVE_TE = False


def l2norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


gated_delta_net.HAVE_FLA = True
gated_delta_net.l2norm = l2norm


class Norm(nn.Module):
    """RMS norm, as Transformer Engine's: multiplies by w, or by 1 + w."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.one = float(config.layernorm_zero_centered_gamma)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size) - self.one)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale * (self.weight + self.one)).to(x)


class Duplicated(nn.Linear):
    """A linear layer that every rank has whole, as Transformer Engine's."""

    def __init__(self, ins: int, outs: int, *, bias: bool, **_: Any) -> None:
        super().__init__(ins, outs, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class CoreAttention(nn.Module):
    """Causal attention whose keys and values differ in size, as latent attention has them."""

    def __init__(self, config: Any, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        first, second, third = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        found = nn.functional.scaled_dot_product_attention(
            first, second, third, is_causal=True, scale=self.scale
        )
        return found.permute(2, 0, 1, 3).flatten(2)


class _Grouped(nn.Module):
    """The weights of local experts as Transformer Engine's grouped linear has them: `weight{i}`."""

    axis: int
    """The dimension that tensor parallelism cuts."""

    def __init__(
        self, num_gemms: int, ins: int, outs: int, *, config: Any, pg_collection: Any, **_: Any
    ) -> None:
        super().__init__()
        self.num_gemms, self.groups = num_gemms, pg_collection
        size = pg_collection.expt_tp.size()
        shape = (outs // size, ins) if self.axis == 0 else (outs, ins // size)
        for number in range(num_gemms):
            weight = nn.Parameter(torch.empty(shape))
            weight.allreduce = False  # type: ignore[attr-defined]
            self.register_parameter(f"weight{number}", weight)

    def forward(self, x: Tensor, tokens: list[int]) -> tuple[Tensor, None]:
        parts = torch.split(x, tokens)
        done = [part @ self.get_parameter(f"weight{n}").T for n, part in enumerate(parts)]
        return torch.cat(done), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """One key for all experts, or one for each, as the metadata asks."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        apart = metadata.get("singleton_local_shards", False)
        ep = self.groups.ep
        found = {}
        for number in range(self.num_gemms):
            expert = ep.rank() * self.num_gemms + number
            offsets = sharded_offsets
            if not apart:
                offsets = (*offsets, (len(offsets), expert, ep.size() * self.num_gemms))
            made = make_sharded_tensors_for_checkpoint(
                {"weight": self.get_parameter(f"weight{number}")},
                f"{expert}.{prefix}" if apart else prefix,
                {"weight": self.axis},
                offsets,
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            tensor = next(iter(made.values()))
            tensor.replica_id = (*tensor.replica_id[:2], self.groups.expt_dp.rank())
            found[f"{prefix}weight{number}"] = tensor
        return found


class GroupedColumn(_Grouped):
    """The linear layer of gate and up."""

    axis = 0


class GroupedRow(_Grouped):
    """The down linear layer; the dispatcher sums its outputs over the ranks."""

    axis = 1
