# SPDX-License-Identifier: Apache-2.0
"""The report page: it works offline, says what the summary says, and shows cold experts as cold."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import fourfold
from fourfold.embedded import model_dir
from fourfold.events import Event, WarningIssued
from fourfold.reporting import QuantSummary, render_report, write_report
from fourfold.reporting.page import color_of, draw_report, note_in_report
from fourfold.reporting.text import figure, runs
from fourfold.verification.rules import Severity

from .documents import document, weights_only, with_budget

UNREACHED = {(0, 2): 0, (1, 9): 0, (1, 10): 0, (2, 11): 40, (3, 5): 0}
"""What five experts of the calibrated model saw; an even share is about 30,000 tokens."""


class Page(HTMLParser):
    """A page taken apart. Fails if an element is never closed, or closed by another."""

    def __init__(self, summary: dict[str, Any]) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[tuple[str, str]] = []
        """Color and title of every cell of a heat map."""
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.html = render(summary)
        self.feed(self.html)
        self.close()
        assert not self._open, f"never closed: {self._open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += values.items()
        if tag == "i" and "title" in values:
            self.cells.append((values["class"], values["title"]))
        if tag not in ("meta", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] != ["style"]:
            self.words.append(data)

    def token_cells(self) -> list[tuple[str, str]]:
        return [(color, title) for color, title in self.cells if "token" in title]


def render(summary: dict[str, Any]) -> str:
    return render_report(QuantSummary.model_validate_json(json.dumps(summary)))


@pytest.fixture(scope="module")
def calibrated() -> dict[str, Any]:
    return document(tokens_of=UNREACHED)


@pytest.fixture(scope="module")
def page(calibrated) -> Page:
    return Page(calibrated)


def test_needs_nothing_beside_itself(page) -> None:
    assert not re.findall(r"https?:|src=|href|@import|url\(|<link|<iframe|fetch|XMLHttp", page.html)
    assert page.tags.count("script") == 2  # the weights, and what searches and sorts them
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("h1") == 1
    assert "prefers-color-scheme:dark" in page.html


def test_the_same_summary_gives_the_same_bytes(calibrated, page, tmp_path: Path) -> None:
    (tmp_path / "quant_summary.json").write_text(json.dumps(calibrated))
    command = [sys.executable, "-m", "fourfold", "report", tmp_path]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "1"})
    assert (tmp_path / "report.html").read_bytes() == page.html.encode()


def test_head(page) -> None:
    for words in (
        "Folded-30B-A3B",
        "Qwen3MoeForCausalLM · qwen3_moe · recipe nvfp4_default_mse-fp8_kv",
        "✓ 208 linear weights planned = 208 quantized · 219 tensors read, 843 written",
        "2.0 GB → 1.5 GB 1.37× smaller",
        "65,536 tokens 4 experts without a token",
    ):
        assert words in page.text


@pytest.mark.parametrize("change", ["planned", "listed"])
def test_a_ledger_that_does_not_balance_is_bad_news(calibrated, change: str) -> None:
    broken = copy.deepcopy(calibrated)
    if change == "planned":
        broken["ledger"]["linear_weights_planned"] += 1
    else:
        broken["linears"].pop()
    page = Page(broken)
    assert ("class", "bad") in page.attributes
    assert "✓" not in page.text
    assert "these numbers must be equal" in page.text


def test_every_role_is_listed_with_its_bytes(calibrated, page) -> None:
    for entry in calibrated["roles"]:
        assert f"{entry['role']} {entry['what']} {entry['tensors']}" in page.text
    assert "experts quantized 192 192 604.0 MB 169.9 MB 4.50" in page.text
    assert "total 219 208 2.0 GB 1.5 GB 11.72" in page.text


def test_every_expert_has_a_cell_with_its_tokens(calibrated, page) -> None:
    cells = page.token_cells()
    assert sorted(title for _, title in cells) == sorted(
        f"layer {row['layer']}, expert {expert}: {count:,} token{'' if count == 1 else 's'}"
        for row in calibrated["experts"]
        for expert, count in enumerate(row["tokens"])
    )
    colors = [color for color, _ in cells]
    assert (colors.count("none"), colors.count("cold")) == (4, 1)


def test_every_expert_has_a_cell_with_its_largest_error(calibrated, page) -> None:
    largest: dict[tuple[int, int], float] = {}
    for entry in calibrated["linears"]:
        if entry["expert"] is not None:
            place = entry["layer"], entry["expert"]
            largest[place] = max(entry["relative_error"], largest.get(place, 0))
    errors = {title: color for color, title in page.cells if "token" not in title}
    assert set(errors) == {
        f"layer {layer}, expert {expert}: {figure(error)}"
        for (layer, expert), error in largest.items()
    }
    by_error = sorted(errors, key=lambda title: float(title.rpartition(" ")[2]))
    assert [errors[by_error[0]], errors[by_error[-1]]] == ["l0", "l6"]


def test_unreached_and_cold_experts_are_listed(page) -> None:
    unreached = "No token: 4 experts. layer 0: 2 · layer 1: 9–10 · layer 3: 5"
    assert unreached in page.text
    assert "Cold: 1 expert. layer 2: 11" in page.text
    assert "a cold expert's scales come from the tokens of the others" in page.text


def test_all_experts_changes_what_is_said(calibrated) -> None:
    calibration = {**calibrated["calibration"], "all_experts": True}
    text = Page({**calibrated, "calibration": calibration}).text
    assert "Every expert computed every token" in text
    assert "tokens of the others" not in text


@pytest.mark.parametrize(
    ("share", "color"),
    [(0, "none"), (0.001, "cold"), (0.01, "l0"), (0.1, "l1"), (0.5, "l3"), (1, "l4"), (9, "l6")],
)
def test_colors(share: float, color: str) -> None:
    assert color_of(share) == color


def test_a_layer_without_any_token() -> None:
    page = Page(document(1, 4, tokens_of={(0, expert): 0 for expert in range(4)}))
    assert [color for color, _ in page.token_cells()] == ["none"] * 4
    assert "No token: 4 experts. layer 0: 0–3" in page.text


def test_layers_with_different_numbers_of_experts(calibrated) -> None:
    rows = [
        {"module": "model.layers.0.mlp.experts", "layer": 0, "tokens": [3, 3, 3, 0]},
        {"module": "model.layers.1.mlp.experts", "layer": 1, "tokens": [5, 5]},
        {"module": "model.layers.2.mlp.experts", "layer": 2, "tokens": []},
        {"module": "mtp.experts", "layer": None, "tokens": [7]},
    ]
    cells = Page({**calibrated, "experts": rows}).token_cells()
    assert [title.split(",")[0] for _, title in cells] == (
        ["layer 0"] * 4 + ["layer 1"] * 2 + ["layer mtp.experts"]
    )


def test_what_a_budget_was_spent_on(calibrated, page) -> None:
    text = Page(with_budget(calibrated)).text
    for words in (
        "measured on 8,192 tokens of mine.jsonl: 4.50 → 4.62 bits a weight, KL 0.05 → 0.0321 nats",
        "0.06 → 0.0432 on 4,096 other tokens",
        "step bits a weight KL KL, other text the rules alone 4.500 0.05 0.06",
        "layers.<0>.o_proj → fp8 4.625 0.0321 0.0432",
        "component stored as weights KL with fp8 KL with bf16 layers.<0>.o_proj FP8 4,096 0.0321",
        "layers.0.experts NVFP4 W4A4 4,096 0.04",
    ):
        assert words in text
    assert "Budget" not in page.text


def test_weights_only(calibrated) -> None:
    page = Page(weights_only(calibrated))
    assert "Calibration none activations are not quantized" in page.text
    assert not page.token_cells()
    for words in ("Largest inputs", "k_scale", "No token"):
        assert words not in page.text


def test_nothing_quantized(calibrated) -> None:
    empty = {**calibrated, "linears": [], "roles": [], "experts": [], "kv_cache": []}
    assert not Page(empty).cells


def test_errors_inputs_and_the_worst(calibrated, page) -> None:
    errors = {entry["name"]: entry["relative_error"] for entry in calibrated["linears"]}
    experts = sorted(value for name, value in errors.items() if ".experts." in name)
    median = (experts[95] + experts[96]) / 2
    spread = f"experts 192 {figure(experts[0])} {figure(median)} {figure(experts[-1])}"
    assert spread in page.text
    assert "experts down_proj 64 " in page.text
    worst = sorted(errors, key=lambda name: (-errors[name], name))
    assert re.findall(r"(model\.layers\.\S+) (?:experts|attention) \d+×", page.text) == worst[:20]


def test_kv_scales_recipe_versions_and_digest(calibrated, page) -> None:
    entry = calibrated["kv_cache"][2]
    assert f"{entry['name']} {figure(entry['k_scale'])} {figure(entry['v_scale'])}" in page.text
    for words in (
        "weights: {format: nvfp4, scale: mse}",
        "keep: ['*.layers.0.self_attn.*']",
        "torch 2.13.0",
        f"sha256 {calibrated['calibration']['digest']}",
        "the embedded mixed text · 128 samples of up to 512 tokens, 65,536 in all",
    ):
        assert words in page.text


HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;{{ 7*7 }}\u202e\x1b[2J"


def test_hostile_names_are_text(calibrated, page) -> None:
    hostile = copy.deepcopy(calibrated)
    for entry in hostile["linears"]:
        entry["name"] = entry["name"].replace("gate_proj", HOSTILE)
        entry["role"] += HOSTILE
    for key in ("model", "model_type", "architecture", "producer"):
        hostile[key] = HOSTILE
    hostile["recipe"] = dict.fromkeys(("name", "description", HOSTILE), HOSTILE)
    hostile["versions"] = {HOSTILE: HOSTILE}
    hostile["calibration"] |= {"origin": HOSTILE, "digest": HOSTILE}
    for entry in (*hostile["experts"], *hostile["kv_cache"], *hostile["roles"]):
        for key in entry.keys() & {"module", "name", "role", "what"}:
            entry[key] = HOSTILE
        entry |= {"layer": None}
    shown = Page(hostile)
    assert set(shown.tags) <= set(page.tags)
    assert not [name for name, _ in shown.attributes if name.startswith("on")]
    assert "<script>alert('x')</script>" in shown.text
    assert shown.tags.count("script") == 2
    assert "<script>alert('x')</script>" in json.loads(shown.scripts[0])["groups"][0][1]
    assert "{{ 7*7 }}" in shown.text
    assert not {"\u202e", "\x1b"} & set(shown.html)


def test_long_names_are_clipped(calibrated, page) -> None:
    long = copy.deepcopy(calibrated)
    for entry in long["linears"]:
        entry["name"] += "x" * 10_000
        entry["role"] *= 1000
    assert len(render(long)) < 2 * len(page.html)


@pytest.mark.parametrize("layers", [4, pytest.param(88, marks=pytest.mark.slow)])
def test_the_page_grows_by_two_cells_an_expert_and_a_row_a_weight(layers: int) -> None:
    """88 layers of 384 experts have more than 100,000 linear weights: a page of 9 MB."""
    page = Page(document(layers, 384, tokens_of={(layer, 4 * layer): 0 for layer in range(layers)}))
    assert len(page.cells) == 2 * layers * 384
    weights = len(json.loads(page.scripts[0])["rows"])
    assert len(page.html.encode()) < 40_000 + 80 * len(page.cells) + 50 * weights
    assert [color for color, _ in page.token_cells()].count("none") == layers


def test_a_page_that_cannot_be_drawn_is_a_warning() -> None:
    warnings: list[str] = []
    assert draw_report(QuantSummary.model_construct(linears=()), warnings.append) is None
    (warning,) = warnings
    assert re.match(r"report\.html: could not be drawn \(AttributeError: .*\)", warning)


def test_a_run_whose_page_cannot_be_drawn_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, events = tmp_path / "out", list[Event]()
    with monkeypatch.context() as patch:
        patch.setattr("jinja2.Environment.get_template", None)
        result = fourfold.quantize(
            model_dir(), out, "w4a16_nvfp4_experts_only", on_event=events.append
        )
    assert result.clean
    warnings = tuple(event.text for event in events if isinstance(event, WarningIssued))
    assert result.warnings == warnings
    for warning, name in zip(warnings, ("report.html", "README.md"), strict=True):
        assert f"{name}: could not be drawn" in warning
        assert not (out / name).exists()
    fourfold.merge([out], tmp_path / "merged")
    assert write_report(out) == out / "report.html"
    merged = tmp_path / "merged/report.html"
    again = write_report(tmp_path / "merged", tmp_path / "again.html")
    assert again.read_text() == merged.read_text()


def test_every_weight_is_in_the_table(calibrated, page) -> None:
    data = json.loads(page.scripts[0])
    names = [
        f"{data['groups'][group][0]}{'' if expert is None else expert}{data['groups'][group][1]}"
        for group, expert, *_ in data["rows"]
    ]
    assert sorted(names) == sorted(entry["name"] for entry in calibrated["linears"])
    errors = {name: row[-1] for name, row in zip(names, data["rows"], strict=True)}
    for entry in calibrated["linears"]:
        assert errors[entry["name"]] == pytest.approx(entry["relative_error"], rel=1e-3)


NODE = """
const element = () => ({
  value: "", hidden: false, textContent: "", children: [], heard: {},
  append(...nodes) { this.children.push(...nodes); },
  replaceChildren(...nodes) { this.children = nodes; },
  addEventListener(name, call) { this.heard[name] = call; },
});
const known = {};
globalThis.document = {
  getElementById: (id) => (known[id] ??= element()), createElement: element,
};
const [, , weights, script, typed, clicks] = process.argv;
const read = (file) => require("fs").readFileSync(file, "utf8");
document.getElementById("linears").textContent = read(weights);
eval(read(script));
known.find.value = typed;
known.find.heard.input();
for (const at of clicks) known.heads.children[at].children[0].heard.click();
console.log(JSON.stringify({
  rows: known.found.children.map((tr) => tr.children.map((td) => td.textContent)),
  count: known.count.textContent, more: !known.more.hidden,
}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_weights_are_searched_and_sorted(calibrated, page, tmp_path: Path) -> None:
    def show(typed: str, clicks: str = "") -> dict[str, Any]:
        files = {"weights": page.scripts[0], "script": page.scripts[1], "run.js": NODE}
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        command = ["node", "run.js", "weights", "script", typed, clicks]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    shown = show("")
    assert shown["count"] == "100 of 208 shown, 208 in all"
    assert shown["more"]
    shown = show("layers.1. DOWN_proj", "8")
    assert shown["count"] == "16 of 16 shown, 208 in all"
    assert not shown["more"]
    entries = [x for x in calibrated["linears"] if re.search(r"layers\.1\..*down_proj", x["name"])]
    by_error = sorted((x["relative_error"] for x in entries), reverse=True)
    assert [float(row[8]) for row in shown["rows"]] == pytest.approx(by_error, rel=1e-3)
    upwards = show("layers.1. down_proj", "88")["rows"]
    assert [float(row[8]) for row in upwards] == pytest.approx(by_error[::-1], rel=1e-3)
    names = [row[0] for row in show("layers.1. down_proj", "0")["rows"]]
    assert names[2].endswith("experts.2.down_proj")  # 2 before 10
    assert show("no such weight")["rows"] == []


def test_it_says_whether_and_when_it_was_verified(written: Any, tmp_path: Path) -> None:
    model, out = written("qwen3_moe")[0], tmp_path / "out"
    fourfold.quantize(model, out, output=fourfold.OutputConfig(verify=False))
    page = (out / "report.html").read_text()
    assert "Not verified when it was written." in page
    assert "vllm serve " in page
    fourfold.merge([out], tmp_path / "merged")
    fourfold.quantize(model, out, output=fourfold.OutputConfig(overwrite=True))
    for folder in (out, tmp_path / "merged"):
        page = (folder / "report.html").read_text()
        assert re.search(r"✓ Verified on 20\d\d-\d\d-\d\d, .*: no error.* · 24 linear w", page)
    assert write_report(out).read_text() == (out / "report.html").read_text()
    assert "✓ Verified on 20" in write_report(out, tmp_path / "page.html").read_text()
    report = fourfold.verify(tmp_path / "merged")
    broken = replace(report.findings[0], severity=Severity.ERROR)
    note_in_report(out, replace(report, findings=(broken,)))
    page = (out / "report.html").read_text()
    assert re.search(r'class="bad">✗ Verified on .*: 1 error', page)
    assert page.count("erified on") == 1


def test_where_the_page_is_written(calibrated, tmp_path: Path) -> None:
    (tmp_path / "quant_summary.json").write_text(json.dumps(calibrated))
    assert write_report(tmp_path, tmp_path / "page.html").is_file()
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(fourfold.OutputError, match=r"no/page\.html: cannot be written"):
        write_report(tmp_path, tmp_path / "no/page.html")
    with pytest.raises(fourfold.SourceError, match=r"no quant_summary\.json"):
        write_report(model_dir())


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
        (float("inf"), "inf"),
    ],
)
def test_figures(value: float | None, shown: str) -> None:
    assert figure(value) == shown


def test_runs() -> None:
    assert runs([]) == ""
    assert runs([9, 5, 7, 8]) == "5, 7–9"
