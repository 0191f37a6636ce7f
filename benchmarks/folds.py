# SPDX-License-Identifier: Apache-2.0
"""What folded factors bring: on the embedded model, and on activations with outlier channels.

    python benchmarks/folds.py [RECIPE …]

Each recipe is carried out without and with `folds: {smooth: auto}`, calibrated on the embedded
mixed text, and both outputs are compared with the source on held-out text, as `fourfold eval` does:
the ratio of their KLs has a 95 % interval over the same windows. Then the second table: the loss of
`calibration.smoothing` on six channels that are 20 to 100 times larger, with powers of two and with
real factors. Prints the figures of docs/numerics.md. One thread.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from fourfold import Recipe, evaluate, quantize
from fourfold.calibration import smoothing
from fourfold.calibration.smoothing import NONE, POWERS, Reader, Site
from fourfold.config import Runtime
from fourfold.embedded import heldout_text, model_dir
from fourfold.formats.scheme import Scheme
from fourfold.storage.quant_summary import read_summary

RECIPES = (
    "w4a16_nvfp4_default_mse",
    "w4a16_nvfp4_default_best",
    "nvfp4_default_mse-fp8_kv",
    "nvfp4_default_best",
)
WINDOWS, LENGTH = 128, 512


def measure(recipe: str, folder: Path, text: Path) -> None:
    """Print one row of the first table."""
    outs, seconds = [], []
    for folds in ("", "folds: {smooth: auto}\n"):
        file = folder / f"{recipe}{bool(folds)}.yaml"
        file.write_text(Recipe.load(recipe).to_yaml() + folds)
        outs.append(file.with_suffix(""))
        began = time.perf_counter()
        result = quantize(model_dir(), outs[-1], file, runtime=Runtime(threads=1), progress=False)
        seconds.append(time.perf_counter() - began)
        assert result.clean, str(result)
    plain, folded = evaluate(
        model_dir(), outs, text, length=LENGTH, windows=WINDOWS, cache=False, progress=False
    ).models
    folds = read_summary(outs[-1]).folds
    assert folds is not None
    assert folded.ratio_interval is not None
    low, high = folded.ratio_interval
    print(
        f"{recipe:28} {plain.kl * 1e3:8.2f} {folded.kl * 1e3:8.2f} {folded.ratio:6.3f} "
        f"[{low:.3f}, {high:.3f}] {folds.kept:2} of {len(folds.choices)} "
        f"{seconds[0]:6.0f} {seconds[1]:6.0f} s",
        flush=True,
    )


def outliers(activations: str | None, balance: float) -> None:
    """Print one row of the second table."""
    random = torch.Generator().manual_seed(0)
    x_RI = torch.randn(768, 256, generator=random)
    w_OI = torch.randn(128, 256, generator=random) / 16
    sizes_I = torch.ones(256)
    sizes_I[torch.randperm(256, generator=random)[:6]] = torch.logspace(1.301, 2, 6)
    x_RI, w_OI = x_RI * sizes_I, w_OI / sizes_I**balance
    reader = Reader("w", w_OI, Scheme("nvfp4", "mse", activations), "group")
    site = Site(x_RI[:256], x_RI[256:512], x_RI[512:], [reader])
    powers = smoothing.smooth([site])
    real = min(
        (_real_loss(site, a, b, site.choose_RI), _real_loss(site, a, b, site.judge_RI))
        for a in POWERS
        for b in POWERS
    )[1]
    before = smoothing.loss_of(site, site.judge_RI, site.sizes.exponents(*NONE))
    print(
        f"{'W4A4' if activations else 'W4A16':6} weights / size^{balance:<4} loss {before:.5f} "
        f"powers of two {powers.after / before:.3f} real {real / before:.3f}"
    )


def _real_loss(site: Site, a: float, b: float, rows_RI: torch.Tensor) -> float:
    return smoothing.loss_of(site, rows_RI, site.sizes.logarithms(a, b))


def main() -> None:
    torch.set_num_threads(1)
    for activations in ("nvfp4", None):
        for balance in (0.0, 0.25, 0.5, 1.0):
            outliers(activations, balance)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "heldout.txt"
        text.write_text(heldout_text())
        for recipe in sys.argv[1:] or RECIPES:
            measure(recipe, Path(folder), text)


if __name__ == "__main__":
    main()
