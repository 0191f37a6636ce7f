"""Take the picture of a report that the docs show.

    python scripts/screenshot_report.py [OUT] [--to docs/images/report.png] [--dark]

OUT is a folder with a quant_summary.json. Without it, the embedded model is calibrated on numbers
alone and quantized (a minute): data so one-sided that some experts see none of it. Needs Chromium
on the PATH (Debian, Ubuntu: `apt-get install chromium`; macOS: `brew install --cask chromium`).
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fourfold.config import OutputConfig

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--force-device-scale-factor=1",
    "--force-color-profile=srgb",
)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
WIDTH = 1120
DOCS = Path(__file__).parents[1] / "docs/images/report.png"
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def find_chromium() -> str | None:
    """Chromium, by whatever name it is on the PATH."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def photograph(page: str, *, width: int = WIDTH, height: int = 0, dark: bool = False) -> Pixels:
    """The page as a browser shows it, [height, width, 3]; all of it where no height is given."""
    with tempfile.TemporaryDirectory() as scratch:
        file, picture = Path(scratch, "page.html"), Path(scratch, "page.png")
        file.write_text(page, "utf-8")
        height = height or _height(page, scratch, width)
        scheme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
        _run(scratch, f"--window-size={width},{height}", f"--screenshot={picture}", *scheme, file)
        return decode(picture.read_bytes())


def _height(page: str, scratch: str, width: int) -> int:
    """How high the whole page is: a copy of it that may run a script tells."""
    file = Path(scratch, "height.html")
    script = "<script>document.title = document.documentElement.scrollHeight</script>"
    file.write_text(POLICY.sub("", page).replace("</body>", f"{script}</body>"), "utf-8")
    found = re.search(
        r"<title>(\d+)<", _run(scratch, f"--window-size={width},800", "--dump-dom", file)
    )
    assert found is not None
    return int(found[1])


def _run(scratch: str, *arguments: object) -> str:
    chromium = find_chromium()
    if chromium is None:
        sys.exit("error: no Chromium on the PATH. Install it: `apt-get install chromium`.")
    rights = ("--no-sandbox",) if os.geteuid() == 0 else ()
    command = [
        chromium,
        *FLAGS,
        *rights,
        f"--user-data-dir={scratch}/profile",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def decode(png: bytes) -> Pixels:
    """The pixels of an 8-bit RGB or RGBA PNG, [height, width, 3]. Filters: PNG specification, 9."""
    width, height, depth, kind = struct.unpack_from(">IIBB", png, 16)
    assert depth == 8
    assert kind in (2, 6)
    step, data, position = (3 if kind == 2 else 4), bytearray(), 8
    while position < len(png):
        size, name = struct.unpack_from(">I4s", png, position)
        data += png[position + 8 : position + 8 + size] if name == b"IDAT" else b""
        position += size + 12
    lines = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * step)
    above = np.zeros(width * step, np.uint8)
    rows = []
    for line in lines:
        above = _unfiltered(int(line[0]), line[1:], above, step)
        rows.append(above)
    return np.stack(rows).reshape(height, width, step)[:, :, :3]


def _unfiltered(kind: int, line: Pixels, above: Pixels, step: int) -> Pixels:
    if kind == 0:
        return line
    if kind == 1:
        return np.cumsum(line.reshape(-1, step), axis=0, dtype=np.uint8).ravel()
    if kind == 2:
        return line + above
    done, up = bytearray(line), bytes(above)
    for at in range(len(done)):
        left, corner = (done[at - step], up[at - step]) if at >= step else (0, 0)
        guess = (left + up[at]) // 2 if kind == 3 else _paeth(left, up[at], corner)
        done[at] = (done[at] + guess) & 255
    return np.frombuffer(bytes(done), np.uint8)


def _paeth(left: int, up: int, corner: int) -> int:
    far = left + up - corner
    return min((abs(far - left), 0, left), (abs(far - up), 1, up), (abs(far - corner), 2, corner))[
        2
    ]


def encode(pixels: Pixels) -> bytes:
    """A PNG of at most 256 colours: the commonest ones, and for the others the nearest of them."""
    packed = pixels.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    found, place, count = np.unique(packed.ravel(), return_inverse=True, return_counts=True)
    colours = (found[:, None] >> np.array([16, 8, 0], np.uint32) & 255).astype(np.int32)
    palette = colours[np.argsort(-count, kind="stable")[:256]]
    nearest = np.array([np.abs(palette - colour).sum(axis=1).argmin() for colour in colours])
    height, width, _ = pixels.shape
    lines = np.zeros((height, width + 1), np.uint8)
    lines[:, 1:] = nearest[place].reshape(height, width)
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"PLTE", palette.astype(np.uint8).tobytes())]
    chunks += [(b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in chunks)


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _example(scratch: Path) -> Path:
    """The embedded model, calibrated on numbers alone."""
    from fourfold import quantize
    from fourfold.embedded import model_dir

    dice, text = random.Random(1), scratch / "numbers.txt"
    rows = (" ".join(str(dice.randrange(10**6)) for _ in range(12)) for _ in range(900))
    text.write_text("\n".join(rows))
    shutil.copytree(model_dir(), scratch / "fourfold-embedded")
    quantize(
        scratch / "fourfold-embedded",
        scratch / "out",
        recipe="nvfp4_default_mse-fp8_kv",
        calibration=[str(text)],
        output=OutputConfig(verify=False),
    )
    return scratch / "out"


def main() -> None:
    """Read the summary, take the picture, write it small."""
    from fourfold.reporting import read_summary, render_report

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", nargs="?", type=Path, help="a folder with a quant_summary.json")
    parser.add_argument("--to", type=Path, default=DOCS, help="the picture's file")
    parser.add_argument("--dark", action="store_true", help="as a browser with the dark scheme")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        page = render_report(read_summary(given.out or _example(Path(scratch))))
    given.to.parent.mkdir(parents=True, exist_ok=True)
    size = given.to.write_bytes(encode(photograph(page, dark=given.dark)))
    print(f"{given.to}: {size:,} bytes")


if __name__ == "__main__":
    main()
