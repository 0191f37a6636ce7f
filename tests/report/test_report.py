"""The page: it stands alone, says what the document says, and shows cold experts as cold.

The last tests look at it through Chromium, pixel by pixel.
"""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourfold.reporting import html_of
from fourfold.reporting.charts import Scale, level_of
from fourfold.reporting.document import read_document
from fourfold.reporting.style import DARK, LIGHT
from fourfold.reporting.tally import by_site
from fourfold.reporting.words import figure, runs

from .browser import Page, needs_chromium, screenshot_report
from .documents import document, first_version, weights_only

COLD = {(0, 2): 0, (1, 9): 0, (1, 10): 0, (2, 11): 40, (3, 5): 0}
"""What five experts of the calibrated document saw; an even share is about 30,000 tokens."""


@pytest.fixture(scope="module")
def calibrated() -> dict[str, Any]:
    return document(tokens_of=COLD)


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return document(2, 3, tokens_of={(0, 1): 0})


def page_of(summary: dict[str, Any]) -> Page:
    return Page(html_of(summary))


@pytest.mark.parametrize("kind", ["calibrated", "weights only", "first version"])
def test_stands_alone(calibrated, kind: str) -> None:
    makers = {"weights only": weights_only, "first version": first_version}
    text = html_of(makers.get(kind, lambda same: same)(calibrated))
    assert not re.findall(r"https?:|src=|href|@import|url\(|<script|<link|<iframe", text)
    assert "default-src 'none'" in text
    page = Page(text)
    assert page.tags.count("h1") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_same_document_same_bytes(calibrated) -> None:
    text = html_of(calibrated)
    assert html_of(json.loads(json.dumps(calibrated))) == text
    reordered = {key: calibrated[key] for key in reversed(calibrated)}
    assert html_of(reordered) == text


def test_bytes_do_not_depend_on_the_interpreter(calibrated, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(calibrated))
    code = (
        "import json, sys\nfrom fourfold.reporting import html_of\n"
        "sys.stdout.buffer.write(html_of(json.load(open(sys.argv[1]))).encode())\n"
        "assert 'torch' not in sys.modules\n"
    )
    pages = {
        subprocess.run(
            [sys.executable, "-c", code, file],
            capture_output=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    }
    assert pages == {html_of(calibrated).encode()}


def test_head(calibrated) -> None:
    text = page_of(calibrated).text
    ledger = calibrated["ledger"]
    for words in (
        "Folded-30B-A3B",
        "Qwen3MoeForCausalLM · qwen3_moe · recipe nvfp4_default_mse-fp8_kv",
        "✓ 208 linear weights planned = 208 quantized · 219 tensors read, 843 written",
        "2.0 GB → 1.5 GB",
        f"{ledger['bytes_before'] / ledger['bytes_after']:.2f}× smaller · 11.72 bits a weight",
        "65,536 tokens",
        "4 experts unreached, 1 cold",
    ):
        assert words in text


@pytest.mark.parametrize("change", ["planned", "listed", "no ledger"])
def test_a_ledger_that_does_not_balance_is_bad_news(calibrated, change: str) -> None:
    broken = copy.deepcopy(calibrated)
    if change == "planned":
        broken["ledger"]["linear_weights_planned"] += 1
    elif change == "listed":
        broken["linears"].pop()
    else:
        del broken["ledger"]
    page = page_of(broken)
    assert ("p", "class", "verdict bad") in page.attributes
    assert "✓" not in page.text
    assert ("does not balance" in page.text) == (change != "no ledger")


def test_every_expert_has_its_cell(calibrated) -> None:
    cells = page_of(calibrated).cells
    titles = {cell.title.split(" (")[0] for cell in cells}
    assert titles == {
        f"layer {row['layer']}, expert {expert}: {count:,} token{'' if count == 1 else 's'}"
        for row in calibrated["experts"]
        for expert, count in enumerate(row["tokens"])
    }
    assert len(cells) == 4 * 16
    assert [cell.level for cell in cells].count("none") == 4
    assert [cell.level for cell in cells].count("cold") == 1


def test_cold_experts_are_listed(calibrated) -> None:
    text = page_of(calibrated).text
    assert (
        "Unreached, no token: 4 experts in 3 layers. layer 0: 2 · layer 1: 9–10 · layer 3: 5"
    ) in text
    assert "Cold, under 1\xa0% of an even share: 1 expert in 1 layer. layer 2: 11".replace(
        "\xa0", " "
    ) in text.replace("\xa0", " ")
    assert "input scale for gate and up" in text


def test_all_experts_changes_what_is_said(calibrated) -> None:
    shown = {**calibrated, "calibration": {**calibrated["calibration"], "all_experts": True}}
    text = page_of(shown).text
    assert "Every expert was shown every token" in text
    assert "neighbours' tokens" not in text


@pytest.mark.parametrize(
    ("tokens", "level"),
    [
        *((0, "none"), (1, "cold"), (9, "cold"), (10, "l0"), (99, "l0"), (100, "l1"), (499, "l2")),
        *((999, "l3"), (1000, "l4"), (1999, "l4"), (2000, "l5"), (4000, "l6"), (100_000, "l6")),
    ],
)
def test_levels(tokens: int, level: str) -> None:
    """Of 100 experts that saw 100,000 tokens: an even share is 1,000, and 10 are 1 % of it."""
    assert level_of(tokens, 100_000, 100).name == level


def test_a_layer_without_any_token() -> None:
    page = page_of(document(1, 4, tokens_of={(0, expert): 0 for expert in range(4)}))
    assert [cell.level for cell in page.cells] == ["none"] * 4
    assert "Unreached, no token: 4 experts in 1 layer. layer 0: 0–3" in page.text


def test_layers_with_different_numbers_of_experts(calibrated) -> None:
    rows = [
        {"module": "model.layers.1.mlp.experts", "tokens": [5, 5]},
        {"module": "model.layers.0.mlp.experts", "layer": None, "tokens": [3, 3, 3, 0]},
        {"module": "mtp.experts", "layer": None, "tokens": [7]},
        {"module": "model.layers.2.mlp.experts", "layer": 2, "tokens": []},
    ]
    cells = page_of({**calibrated, "experts": rows}).cells
    assert [cell.title.split(",")[0] for cell in cells] == (
        ["layer 0"] * 4 + ["layer 1"] * 2 + ["layer mtp.experts"]
    )


def test_weights_only_says_so_in_a_line(calibrated) -> None:
    page = page_of(weights_only(calibrated))
    assert "No calibration: activations stay at 16 bits" in page.text
    assert not page.cells
    for words in ("Input amax", "k_scale", "unreached"):
        assert words not in page.text


def test_document_of_the_first_version(calibrated) -> None:
    page = page_of(first_version(calibrated))
    assert "208 linear weights planned = 208 quantized" in page.text
    assert "No calibration" in page.text
    assert "Relative error by layer and role" in page.text
    assert page.text.count("model.layers.0.") > 3  # layers are read from names


JUNK = (None, 1, -1.5, "x", [], {}, [1], ["x", {}], {"a": 1}, [{}], math.nan, 10**400, True)


def test_no_key_is_needed_and_no_kind_is_trusted(tiny) -> None:
    for key in tiny:
        Page(html_of({each: value for each, value in tiny.items() if each != key}))
        for junk in JUNK:
            Page(html_of({**tiny, key: junk}))
    Page(html_of({}))


@pytest.mark.parametrize("part", ["linears", "experts", "kv_cache", "roles"])
def test_no_key_of_an_entry_is_needed(tiny, part: str) -> None:
    for key in tiny[part][0]:
        for junk in (*JUNK, "absent"):
            changed = copy.deepcopy(tiny)
            for entry in changed[part][:3]:
                entry[key] = junk
                if junk == "absent":
                    del entry[key]
            Page(html_of(changed)).text.encode()


@pytest.mark.parametrize("part", ["calibration", "ledger", "recipe", "versions"])
def test_no_key_of_a_mapping_is_needed(tiny, part: str) -> None:
    for key in tiny[part]:
        for junk in JUNK:
            Page(html_of({**tiny, part: {**tiny[part], key: junk}}))


HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;\u202e\x1b[2J\n\ud800"


def test_hostile_names_are_text(calibrated) -> None:
    hostile = json.loads(
        json.dumps(calibrated).replace("gate_proj", "GATE").replace("attention", "A")
    )
    for entry in hostile["linears"]:
        entry["name"] = entry["name"].replace("GATE", HOSTILE)
        entry["role"] = f"{entry['role']}{HOSTILE}"
        entry["format"] = HOSTILE
    for key in ("model", "model_type", "architecture", "producer"):
        hostile[key] = HOSTILE
    hostile["recipe"] = dict.fromkeys(("name", "description", HOSTILE), HOSTILE)
    hostile["versions"] = {HOSTILE: HOSTILE}
    hostile["calibration"] |= {"origin": HOSTILE, "digest": HOSTILE}
    for part in ("experts", "kv_cache", "roles"):
        for entry in hostile[part]:
            entry |= {"module": HOSTILE, "layer": None, "what": HOSTILE}
            entry |= {} if "role" in entry else {"name": HOSTILE}
    hostile["roles"][0]["role"] = HOSTILE
    text = html_of(hostile)
    page = Page(text)
    assert set(page.tags) <= set(page_of(calibrated).tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert('x')</script>" in page.text
    assert not {"\u202e", "\x1b", "\ud800"} & set(text)
    text.encode()


def test_absurdly_long_names_are_clipped(calibrated) -> None:
    long = copy.deepcopy(calibrated)
    for entry in long["linears"]:
        entry["name"] += "x" * 10_000
        entry["role"] *= 1000
    assert len(html_of(long)) < 2 * len(html_of(calibrated))


def test_errors_by_role_and_the_worst(calibrated) -> None:
    text = page_of(calibrated).text
    errors = {each["name"]: each["relative_error"] for each in calibrated["linears"]}
    experts = [value for name, value in errors.items() if ".experts." in name]
    assert (
        f"{figure(min(experts))} {figure(float(np.median(experts)))} {figure(max(experts))}" in text
    )
    worst = sorted(errors, key=lambda name: (-errors[name], name))
    listed = re.findall(r"\d+ (model\.layers\.\S+) (?:experts|attention) \d+ ×", text)
    assert listed == worst[:50]


def test_a_weight_with_nan_is_the_worst(calibrated) -> None:
    broken = copy.deepcopy(calibrated)
    broken["linears"][100]["relative_error"] = math.nan
    text = page_of(broken).text
    first = re.search(r" 1 (model\.\S+) .*? (\S+) 2 model\.", text[text.index("largest error") :])
    assert first is not None
    assert first.groups() == (broken["linears"][100]["name"], "NaN")


def test_sizes_by_role(calibrated) -> None:
    text = page_of(calibrated).text
    assert "experts quantized 192 192 604.0 MB 169.9 MB 4.50" in text
    assert "total 219 208 2.0 GB 1.5 GB 11.72" in text


def test_kv_scales(calibrated) -> None:
    text = page_of(calibrated).text
    for entry in calibrated["kv_cache"]:
        k, v = figure(entry["k_scale"]), figure(entry["v_scale"])
        assert f"layer {entry['name'].split('.')[2]}: k_scale {k}, v_scale {v}" in text


def test_recipe_versions_digest(calibrated) -> None:
    text = page_of(calibrated).text
    for words in (
        "weights: {format: nvfp4, scale: mse}",
        "keep: ['*.layers.0.self_attn.*']",
        "torch 2.13.0",
        f"sha256 {calibrated['calibration']['digest']}",
        "the embedded mixed text · 128 samples × 512 tokens, 65,536 in all",
    ):
        assert words in text


def test_input_sites_are_what_shares_scales(calibrated) -> None:
    shared = copy.deepcopy(calibrated)
    for entry in shared["linears"]:
        is_first = entry["name"].endswith(("gate_proj", "up_proj", "q_proj", "k_proj", "v_proj"))
        entry["input_scale"] = entry["layer"] + (0.25 if is_first else 0.5)
    sites = {name: len(each) for name, each in by_site(read_document(shared).linears)}
    assert sites == {
        "experts gate_proj, up_proj": 128,
        "experts down_proj": 64,
        "attention k_proj, q_proj, v_proj": 12,
        "attention o_proj": 4,
    }


def test_a_model_of_1t_is_a_small_page_and_quick() -> None:
    huge = document(61, 384, tokens_of={(layer, 6 * layer): 0 for layer in range(61)})
    assert len(huge["linears"]) > 70_000
    begun = time.perf_counter()
    text = html_of(huge)
    assert time.perf_counter() - begun < 30  # about 2 s on an idle core
    assert len(text.encode()) < 4e6
    cells = Page(text).cells
    assert len(cells) == 61 * 384
    assert [cell.level for cell in cells].count("none") == 61


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (0, "0"),
        (1.1480422e-4, "1.148e-4"),
        (0.00999, "9.99e-3"),
        (0.0814, "0.0814"),
        (34.75, "34.75"),
        (12345.6, "12,346"),
        (3e9, "3e9"),
        (-2e-9, "-2e-9"),
        (math.nan, "NaN"),
        (math.inf, "inf"),
    ],
)
def test_figures(value: float | None, shown: str) -> None:
    assert figure(value) == shown


def test_runs() -> None:
    assert runs([]) == ""
    assert runs([9, 5, 7, 8]) == "5, 7–9"


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[], [0], [0.1], [0.08, 0.084], [1e-9, 1e9], [0, 5], [1e-30, 1e-29], [1e29]]
)
def test_scales_hold_their_values(values: list[float], log: bool) -> None:
    scale = Scale.around(values, log=log)
    assert all(0 <= scale.part(value) <= 1 for value in values)
    assert all(-1e-9 <= scale.part(tick) <= 1 + 1e-9 for tick in scale.ticks())
    assert len(scale.ticks()) <= 12


def colour(palette: dict[str, str], name: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(palette[name].removeprefix("#")))


def cells_in_place(picture: Any, page: Page, palette: dict[str, str]) -> list[tuple[int, int]]:
    """Where the heat map's corner may lie so that every cell has its colour: once, we hope."""
    first = next(cell for cell in page.cells if cell.level == "none")
    is_none = (picture == colour(palette, "none")).all(axis=2)
    corners = is_none[1:, 1:] & ~is_none[:-1, 1:] & ~is_none[1:, :-1]
    places = [(int(x) + 1 - first.x, int(y) + 1 - first.y) for y, x in np.argwhere(corners)]
    return [place for place in places if _all_fit(picture, page, palette, *place)]


def _all_fit(picture: Any, page: Page, palette: dict[str, str], left: int, top: int) -> bool:
    height, width, _ = picture.shape
    for cell in page.cells:
        x, y = left + cell.x, top + cell.y
        inside = x >= 0 and y >= 0 and x + cell.width <= width and y + cell.height <= height
        spots = ((1, 1), (cell.width - 2, cell.height - 2), (cell.width - 2, 1))
        wanted = colour(palette, cell.level)
        if not inside or any(tuple(picture[y + b, x + a]) != wanted for a, b in spots):
            return False
    return True


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_chromium_shows_every_cell_in_its_colour(calibrated, dark: bool) -> None:
    text, palette = html_of(calibrated), DARK if dark else LIGHT
    picture = screenshot_report.photograph(text, width=1120, height=800, dark=dark)
    assert picture.shape == (800, 1120, 3)
    assert tuple(picture[0, 0]) == colour(palette, "page")
    assert len(np.unique(picture.reshape(-1, 3)[::7], axis=0)) > 30
    page = Page(text)
    assert len(cells_in_place(picture, page, palette)) == 1
    page.cells[-1].level = "cold"  # and the check can fail
    assert not cells_in_place(picture, page, palette)


@needs_chromium
def test_chromium_shows_cold_experts_among_many() -> None:
    """Cells of 384 experts are two pixels wide; those of the cold ones are four, and on top."""
    text = html_of(document(8, 384, tokens_of={(2, 100): 0, (5, 301): 0, (5, 303): 3}))
    page = Page(text)
    cold = [cell for cell in page.cells if cell.level in ("none", "cold")]
    page.cells = cold
    assert {cell.width for cell in cold} == {4}
    picture = screenshot_report.photograph(text, width=1120, height=800)
    assert len(cells_in_place(picture, page, LIGHT)) == 1


@pytest.mark.slow
@needs_chromium
def test_the_docs_picture_can_be_taken_again(calibrated, tmp_path: Path) -> None:
    (tmp_path / "quant_summary.json").write_text(json.dumps(calibrated))
    picture = tmp_path / "pictures" / "report.png"
    script = Path(screenshot_report.__file__)
    subprocess.run([sys.executable, script, tmp_path, "--to", picture], check=True, timeout=120)
    assert 50_000 < picture.stat().st_size < 250_000
    assert picture.read_bytes().startswith(b"\x89PNG")
