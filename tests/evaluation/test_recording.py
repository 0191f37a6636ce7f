# SPDX-License-Identifier: Apache-2.0
"""Proves that `fourfold eval --record` puts the figures into an output's summary, report and card,
in place of earlier ones, and changes nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import fourfold
from fourfold.embedded import model_dir
from fourfold.errors import FourfoldWarning, SourceError
from fourfold.reporting import read_summary, write_report

from .checkpoints import Ran, options_for

RECIPE = "w4a16_nvfp4_experts_only_mse"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verified") / "out"
    assert fourfold.quantize(model_dir(), out, RECIPE).clean
    return out


@pytest.fixture
def out(verified: Path, tmp_path: Path) -> Path:
    return shutil.copytree(verified, tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def record(out: Path, cache: Path, **options: object) -> fourfold.Evaluation:
    return fourfold.evaluate(model_dir(), out, options_for(cache, **options), record=True)


def test_figures_are_in_summary_report_and_card(out: Path, cache: Path) -> None:
    before = contents(out)
    figures = record(out, cache).models[0]
    after = contents(out)
    assert {name for name in after if after[name] != before.get(name)} == {
        "quant_summary.json", "report.html", "README.md",
    }  # fmt: skip
    entry = read_summary(out).evaluation
    assert entry is not None
    assert (entry.kl, entry.kl_interval) == (figures.kl, figures.kl_interval)
    assert (entry.text, entry.source, entry.simulated) == ("heldout.txt", "model", False)
    shown = f"{figures.top1:.1%}"
    card, page = (out / "README.md").read_text(), (out / "report.html").read_text()
    assert shown in card.partition("## Quality")[2].partition("## Serve it")[0]
    assert "was not measured on this model" in before["README.md"].decode().replace("\n", " ")
    assert "was not measured" not in card.replace("\n", " ")
    assert "Verified after it was written" in card
    assert shown in page.partition("<h2>Quality</h2>")[2].partition("</section>")[0]
    assert "✓ Verified on" in page
    assert fourfold.verify(out, source=model_dir()).clean


def test_all_else_in_these_files_stays(out: Path, cache: Path) -> None:
    before = contents(out)
    record(out, cache)
    summary = json.loads((out / "quant_summary.json").read_text())
    del summary["evaluation"]
    assert summary == json.loads(before["quant_summary.json"])
    block = re.compile(r"<!-- fourfold: evaluation -->\n.*?<!-- fourfold: end -->\n\n", re.DOTALL)
    card = block.sub("", (out / "README.md").read_text())
    known = before["README.md"].decode().replace(", which\nwas not measured on this model", "")
    assert card == known
    section = re.compile(r"<section>\n<h2>Quality</h2>.*?</section>\n", re.DOTALL)
    assert section.sub("", (out / "report.html").read_text()) == before["report.html"].decode()


def test_later_figures_replace_earlier_ones(out: Path, cache: Path) -> None:
    record(out, cache)
    record(out, cache, windows=2)
    card = (out / "README.md").read_text()
    assert "on 2 windows" in card
    assert card.count("## Quality") == 1
    entry = read_summary(out).evaluation
    assert entry is not None
    assert entry.windows == 2
    page = (out / "report.html").read_bytes()
    write_report(out)
    assert (out / "report.html").read_bytes() == page


def test_a_merged_output_keeps_them(out: Path, cache: Path, tmp_path: Path) -> None:
    record(out, cache)
    fourfold.merge([out], tmp_path / "merged")
    assert read_summary(tmp_path / "merged").evaluation == read_summary(out).evaluation
    assert "<h2>Quality</h2>" in (tmp_path / "merged/report.html").read_text()


def test_a_card_of_ones_own_is_left_alone(out: Path, cache: Path) -> None:
    (out / "README.md").write_text("# Mine\n")
    (out / "report.html").unlink()
    with pytest.warns(FourfoldWarning, match=r"README\.md: has no place for the figures\."):
        record(out, cache)
    assert (out / "README.md").read_text() == "# Mine\n"
    assert not (out / "report.html").exists()
    assert read_summary(out).evaluation is not None


def test_an_output_without_a_summary_is_refused_first(out: Path, cache: Path) -> None:
    ran = Ran()
    (out / "quant_summary.json").unlink()
    with pytest.raises(SourceError, match=r"no quant_summary\.json, which `fourfold quantize`"):
        fourfold.evaluate(model_dir(), out, options_for(cache), record=True, on_event=ran)
    assert ran.models == []
