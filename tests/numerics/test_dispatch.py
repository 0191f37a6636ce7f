# SPDX-License-Identifier: Apache-2.0
"""Proves that one place decides which kernels run, and that wrong names are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fourfold.errors import UsageError
from fourfold.formats import dispatch
from fourfold.formats.dispatch import Kernel

CPU = torch.device("cpu")


def test_auto_takes_numba_on_the_cpu_and_the_reference_elsewhere(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    assert dispatch.choose("auto", CPU) is Kernel.NUMBA
    assert dispatch.choose("auto", torch.device("meta")) is Kernel.REFERENCE
    monkeypatch.setattr(dispatch, "has_numba", lambda: False)
    assert dispatch.choose("auto", CPU) is Kernel.REFERENCE


def a_gpu(monkeypatch, *, capability=(9, 0), name="NVIDIA H200", hip=None):
    """Let there seem to be a CUDA device."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.7.1")
    dispatch._warn_once.cache_clear()


CUDA = torch.device("cuda:0")


def test_auto_takes_triton_on_a_gpu_and_says_which(monkeypatch):
    a_gpu(monkeypatch)
    found = dispatch.choice("auto", CUDA)
    assert (found.kernel, found.is_fallback) == (Kernel.TRITON, False)
    assert str(found) == "triton kernels: tensors are on cuda:0, NVIDIA H200"
    assert dispatch.choice_for_weights(CUDA) == found
    assert dispatch.choose("triton", CUDA) is Kernel.TRITON


@pytest.mark.parametrize(
    ("version", "capability", "hip", "why"),
    [
        (None, (9, 0), None, "triton is not installed: pip install triton"),
        ("3.5.1", (9, 0), None, "triton 3.5.1 is too old: pip install 'triton>=3.6'"),
        ("3.7.1", (7, 0), None, "NVIDIA V100 has compute capability 7.0, and 7.5 is needed"),
        ("3.7.1", (9, 0), "6.4", "never run on AMD's GPUs"),
    ],
)
def test_a_gpu_that_cannot_run_triton_falls_back_and_says_so_once(
    monkeypatch, version, capability, hip, why
):
    a_gpu(monkeypatch, capability=capability, name="NVIDIA V100", hip=hip)
    monkeypatch.setattr(dispatch, "triton_version", lambda: version)
    found = dispatch.choice("auto", CUDA)
    assert (found.kernel, found.is_fallback) == (Kernel.REFERENCE, True)
    assert why in found.reason
    with pytest.warns(RuntimeWarning, match="falls back to slow reference kernels"):
        assert dispatch.choose("auto", CUDA) is Kernel.REFERENCE
    assert dispatch.choose("auto", CUDA) is Kernel.REFERENCE  # a second warning would be an error
    weights = dispatch.choice_for_weights(CUDA)
    assert (weights.kernel, weights.is_fallback) == (Kernel.NUMBA, True)
    assert why in str(weights)
    with pytest.raises(UsageError, match="triton kernels were asked for by kernel='triton', but"):
        dispatch.choose("triton", CUDA)


def test_the_environment_decides_for_weights(monkeypatch):
    a_gpu(monkeypatch)
    assert dispatch.choice_for_weights(CPU).kernel is Kernel.NUMBA
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "numba")
    found = dispatch.choice_for_weights(CUDA)
    assert (found.kernel, found.is_fallback) == (Kernel.NUMBA, False)
    assert found.reason == "asked for by FOURFOLD_KERNELS"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    assert dispatch.choice_for_weights(CUDA).kernel is Kernel.TRITON


def test_the_environment_lets_a_job_have_both_devices(monkeypatch):
    """What a job on a GPU does on the CPU, and the other way round, it still can do."""
    a_gpu(monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    assert dispatch.choose("auto", CPU) is Kernel.NUMBA
    assert dispatch.choose("auto", CUDA) is Kernel.TRITON
    with pytest.raises(UsageError, match="asked for by FOURFOLD_KERNELS, but triton works on CUDA"):
        dispatch.choice_for_weights(CPU)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "numba")
    assert dispatch.choose("auto", CPU) is Kernel.NUMBA
    assert dispatch.choose("auto", CUDA) is Kernel.REFERENCE


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.7.1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("triton", CPU) is Kernel.TRITON
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match="in CPU memory: move it to the GPU"):
        dispatch.choose("triton", CPU)
    with pytest.raises(UsageError, match="this one is on meta"):
        dispatch.choose("triton", torch.device("meta"))


def test_the_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert dispatch.choose("auto", CPU) is Kernel.REFERENCE
    assert dispatch.choose("numba", CPU) is Kernel.NUMBA
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(UsageError, match="FOURFOLD_KERNELS: unknown kernels 'fast'"):
        dispatch.choose("auto", CPU)


def test_numba_where_it_cannot_run_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="meta"):
        dispatch.choose("numba", torch.device("meta"))
    monkeypatch.setattr(dispatch, "has_numba", lambda: False)
    with pytest.raises(UsageError, match="pip install numba"):
        dispatch.choose("numba", CPU)


def test_numba_and_triton_are_imported_at_first_use_only():
    loaded = "bool({'numba', 'triton'} & sys.modules.keys())"
    code = f"import sys, fourfold.formats.nvfp4; sys.exit({loaded})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
