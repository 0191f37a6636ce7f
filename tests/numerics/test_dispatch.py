"""Proves that one place decides which kernels run, and that wrong names are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fourfold.errors import UsageError
from fourfold.numerics import dispatch
from fourfold.numerics.dispatch import Kernel

CPU = torch.device("cpu")


def test_auto_takes_numba_on_the_cpu_and_the_reference_elsewhere(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    assert dispatch.choose("auto", CPU) is Kernel.NUMBA
    assert dispatch.choose("auto", torch.device("meta")) is Kernel.REFERENCE
    monkeypatch.setattr(dispatch, "has_numba", lambda: False)
    assert dispatch.choose("auto", CPU) is Kernel.REFERENCE


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


def test_numba_is_imported_at_first_use_only():
    code = "import sys, fourfold.numerics; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
