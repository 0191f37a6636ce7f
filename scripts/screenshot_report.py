"""Take the picture of a report that the docs show.

    python scripts/screenshot_report.py [OUT] [--to docs/images/report.png] [--dark] [--width 1120]

OUT is a folder with a quant_summary.json. Without it, the embedded model is calibrated on numbers
alone and quantized (a minute): data so one-sided that some experts see none of it. Needs Chromium
on the PATH (Debian, Ubuntu: `apt-get install chromium`; macOS: `brew install --cask chromium`).
`pngquant 64 PICTURE` makes the picture a quarter of the size.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--force-device-scale-factor=1",
    "--force-color-profile=srgb",
)
DOCS = Path(__file__).parents[1] / "docs/images/report.png"


def photograph(page: str, picture: Path, *, width: int, dark: bool) -> None:
    """Write a PNG of the whole page as Chromium shows it."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "page.html")
        # A copy of the page that may run a script puts its height into its title.
        script = "<script>document.title = document.documentElement.scrollHeight</script>"
        file.write_text(page.replace("</body>", f"{script}</body>"), "utf-8")
        shown = _chromium(scratch, f"--window-size={width},800", "--dump-dom", file)
        height = re.search(r"<title>(\d+)<", shown)
        assert height is not None
        file.write_text(page, "utf-8")
        scheme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
        size = f"--window-size={width},{height[1]}"
        _chromium(scratch, size, f"--screenshot={picture.absolute()}", *scheme, file)


def _chromium(scratch: str, *arguments: object) -> str:
    chromium = next((path for name in NAMES if (path := shutil.which(name))), None)
    if chromium is None:
        sys.exit("error: no Chromium on the PATH. Install it: `apt-get install chromium`.")
    rights = ("--no-sandbox",) if os.geteuid() == 0 else ()
    profile = f"--user-data-dir={scratch}/profile"
    command = [chromium, *FLAGS, *rights, profile, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def _example(scratch: Path) -> Path:
    """Quantize the embedded model, calibrated on numbers alone."""
    from fourfold import OutputConfig, quantize
    from fourfold.embedded import model_dir

    dice, text = random.Random(1), scratch / "numbers.txt"
    rows = (" ".join(str(dice.randrange(10**6)) for _ in range(12)) for _ in range(900))
    text.write_text("\n".join(rows))
    shutil.copytree(model_dir(), scratch / "fourfold-embedded")
    quantize(
        scratch / "fourfold-embedded",
        scratch / "out",
        recipe="nvfp4_default_mse-fp8_kv",
        calibration=text,
        output=OutputConfig(verify=False),
    )
    return scratch / "out"


def main() -> None:
    """Draw the page and take its picture."""
    from fourfold.reporting import read_summary, render_report

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", nargs="?", type=Path, help="a folder with a quant_summary.json")
    parser.add_argument("--to", type=Path, default=DOCS, help="the picture's file")
    parser.add_argument("--dark", action="store_true", help="as a browser with the dark scheme")
    parser.add_argument("--width", type=int, default=1120, help="of the window, in pixels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        page = render_report(read_summary(options.out or _example(Path(scratch))))
    options.to.parent.mkdir(parents=True, exist_ok=True)
    photograph(page, options.to, width=options.width, dark=options.dark)
    print(f"{options.to}: {options.to.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
