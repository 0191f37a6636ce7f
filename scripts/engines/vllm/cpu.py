# SPDX-License-Identifier: Apache-2.0
"""What must be done before vLLM is imported on a CPU. Import this module first."""

from __future__ import annotations

import os

import torch

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

# PyPI's torchvision is built for CUDA. It can be imported where its operators are declared.
for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float t) -> Tensor")
