# SPDX-License-Identifier: Apache-2.0
"""Imported by the process that jobs are forked from: does each kind of job once.

What is imported, compiled and built then, no job has to do again.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

import fourfold
from families import FAMILIES, write_checkpoint
from fourfold.config import CalibrationConfig, Runtime
from jobs import MODEL, W4A4, W4A16, ids_file

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    model = folder / "model"
    model.mkdir()
    write_checkpoint(FAMILIES[MODEL], model)
    fourfold.quantize(model, folder / "a", W4A16, runtime=Runtime(threads=1))
    fourfold.quantize(
        model,
        folder / "b",
        W4A4,
        calibration=CalibrationConfig(calib=[ids_file(folder)], calib_seq=24, calib_size=1),
        runtime=Runtime(threads=1),
    )
