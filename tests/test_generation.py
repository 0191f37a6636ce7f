# SPDX-License-Identifier: Apache-2.0
"""Proves that `fourfold generate` shows what both models write: streamed or whole the same tokens,
as transformers alone writes them; and that it says what it did, and what it cannot do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import fourfold
from families import Truth
from fourfold import generate
from fourfold.cli.tables import generation_table
from fourfold.config import OutputConfig
from fourfold.embedded import model_dir
from fourfold.errors import ModelError, ResourceError, SourceError, UsageError
from fourfold.evaluation import generation
from fourfold.evaluation.generation import Continuation, Generation
from fourfold.events import Event, TokenGenerated
from nvfp4_folders import with_input_scales

Written = Callable[[str], tuple[Path, Truth]]
PROMPT = "import os\nimport sys\n\ndef find("
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's experts in NVFP4 (W4A16)."""
    folder = tmp_path_factory.mktemp("embedded") / "out"
    fourfold.quantize(
        model_dir(), folder, "w4a16_nvfp4_experts_only", output=OutputConfig(verify=False)
    )
    return folder


@pytest.fixture(scope="module")
def w4a4(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_input_scales(out, tmp_path_factory.mktemp("w4a4") / "out", lambda _: 16 / 2688)


@pytest.fixture(scope="module")
def pair(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Family's name -> its source, with a byte tokenizer, and its W4A4 checkpoint."""

    @cache
    def make(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        source, half = folder / "source", folder / "w4a16"
        shutil.copytree(written(name)[0], source)
        for file in TOKENIZER_FILES:
            shutil.copy(model_dir() / file, source)
        fourfold.quantize(source, half, "w4a16_nvfp4_default", output=OutputConfig(verify=False))
        return source, with_input_scales(half, folder / "out", lambda _: 6 / 2688)

    return make


def by_transformers(model: Any, count: int, prompt: str = PROMPT) -> tuple[int, ...]:
    """What the model writes greedily, one token after the other, without a cache."""
    ids = torch.tensor([list(prompt.encode())])
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tuple(ids[0, -count:].tolist())


# --- what is written ----------------------------------------------------------------------


def test_both_texts_are_what_transformers_writes(out: Path) -> None:
    found = generate(out, PROMPT, source=model_dir(), max_new_tokens=6)
    assert found.source is not None
    assert found.source.tokens == by_transformers(
        AutoModelForCausalLM.from_pretrained(model_dir()), 6
    )
    assert found.quantized.tokens == by_transformers(fourfold.load(out), 6)
    assert found.source.text == bytes(found.source.tokens).decode()
    assert found.quantized.model == str(out)
    assert not found.simulated


def test_activations_are_rounded_where_they_are_quantized(w4a4: Path) -> None:
    model = fourfold.load(w4a4, simulate_activations=True)
    found = generate(w4a4, PROMPT, max_new_tokens=6)
    assert found.simulated
    assert found.quantized.tokens == by_transformers(model, 6)
    model.fourfold_simulation.remove()
    alone = generate(w4a4, PROMPT, max_new_tokens=6, simulate_activations=False)
    assert not alone.simulated
    assert alone.quantized.tokens == by_transformers(model, 6)


@pytest.mark.parametrize(
    "name",
    [
        "embedded",
        "jamba",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gpt_oss", "qwen3_moe", "qwen3_5_moe_vl", "granitemoehybrid", "llama4")
        ),
    ],
)
def test_streamed_or_whole_the_tokens_are_the_same(name: str, pair, w4a4: Path) -> None:
    """Fused experts, hybrids with states of their own, a multimodal wrapper."""
    source, out = (model_dir(), w4a4) if name == "embedded" else pair(name)
    options: dict[str, Any] = {"source": source, "max_new_tokens": 4}
    for sampled in ({}, {"temperature": 1.0, "seed": 5}):
        whole = generate(out, PROMPT, stream=False, **options, **sampled)
        streamed = generate(out, PROMPT, stream=True, **options, **sampled)
        assert (whole.quantized.streamed, streamed.quantized.streamed) == (False, True)
        assert streamed.simulated
        assert streamed.quantized.tokens == whole.quantized.tokens
        assert streamed.source is not None
        assert whole.source is not None
        assert streamed.source.tokens == whole.source.tokens


def test_a_seed_repeats_itself_and_leaves_the_generator_alone(out: Path) -> None:
    state = torch.random.get_rng_state()
    texts = [
        generate(out, PROMPT, temperature=1.5, seed=seed, max_new_tokens=12).quantized.text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_settings_for_sampling_do_not_matter(out: Path, tmp_path: Path) -> None:
    """Many checkpoints ask for top_p and top_k; greedy is greedy, and a draw is from all tokens."""
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    settings = {"do_sample": True, "temperature": 0.1, "top_p": 0.1, "top_k": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    for options in ({}, {"temperature": 1.5, "seed": 3}):
        pair = (generate(x, PROMPT, max_new_tokens=8, **options) for x in (out, folder))
        first, second = (found.quantized.tokens for found in pair)
        assert first == second


def test_an_encoder_decoder_writes_without_the_prompt(pair) -> None:
    source, out = pair("switch_transformers")
    found = generate(out, "abc", source=source, max_new_tokens=6)
    model = fourfold.load(out, simulate_activations=True)
    ids, written = torch.tensor([list(b"abc")]), [1]
    for _ in range(6):
        with torch.no_grad():
            logits = model(ids, decoder_input_ids=torch.tensor([written])).logits
        written.append(int(logits[0, -1].argmax()))
    assert found.quantized.tokens == tuple(written[1:])


def test_what_does_not_fit_into_memory_is_streamed(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not generate(out, PROMPT, max_new_tokens=1).quantized.streamed
    monkeypatch.setattr(generation, "memory_available", lambda: 1_000_000)
    assert generate(out, PROMPT, max_new_tokens=1).quantized.streamed
    monkeypatch.setattr("fourfold.evaluation.loading.memory_available", lambda: 1_000_000)
    with pytest.raises(ResourceError, match="of memory are needed for the whole model"):
        generate(out, PROMPT, max_new_tokens=1, stream=False)


def test_progress_counts_tokens(out: Path) -> None:
    seen: list[Event] = []
    generate(
        out,
        PROMPT,
        source=model_dir(),
        max_new_tokens=3,
        on_event=seen.append,
    )
    assert seen == [
        TokenGenerated(label, n, 3) for label in ("source", "quantized") for n in range(4)
    ]


# --- what is shown ------------------------------------------------------------------------

OURS = Continuation("out", "two three", (2, 3, 4), False, 0.5)
THEIRS = Continuation("model", "two four", (2, 5), True, 1.5)


def test_it_prints_side_by_side(terminal: Callable[[int], None]) -> None:
    terminal(110)
    console = Console(width=110, file=StringIO())
    console.print(generation_table(Generation("one", THEIRS, OURS, simulated=True)))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines[0] == "one"
    assert re.fullmatch(r"source +quantized, activations rounded", lines[2])
    assert re.fullmatch(r"model +out", lines[3])
    assert re.fullmatch(r"two four +two three", lines[4])
    assert lines[-1] == "the first 1 of 3 tokens are the same"
    assert "weights alone" in str(Generation("one", THEIRS, OURS, simulated=False))


def test_alone_it_says_how_to_get_both() -> None:
    text = str(Generation("one", None, OURS, simulated=False))
    assert "quantized, weights alone" in text
    assert "`source` shows the source's text next to it" in text


def test_the_same_tokens_are_counted() -> None:
    same = Generation("one", OURS, OURS, simulated=False)
    assert same.same_tokens == 3
    assert "all 3 tokens are the same" in str(same)
    shorter = Generation("one", Continuation("m", "", (2, 3), False, 1.0), OURS, simulated=False)
    assert "the first 2 of 3 tokens are the same" in str(shorter)
    assert Generation("one", None, OURS, simulated=False).same_tokens is None


def test_what_would_steer_a_terminal_is_shown_not_sent() -> None:
    odd = Continuation("out", "a\x1b[31mb[bold]c[/]\td\n\x07", (1,), False, 0.5)
    text = str(Generation("p\x1b[0m", None, odd, simulated=False))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"p\x1b[0m" in text
    assert r"a\x1b[31mb[bold]c[/]" in text


def test_plain_data() -> None:
    data = json.loads(json.dumps(Generation("one", THEIRS, OURS, simulated=True).to_dict()))
    assert data["source"] == {
        "model": "model", "text": "two four", "tokens": [2, 5], "streamed": True, "seconds": 1.5
    }  # fmt: skip
    assert data["quantized"]["tokens"] == [2, 3, 4]
    assert (data["prompt"], data["simulated"], data["same_tokens"]) == ("one", True, 1)


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    from fourfold.cli.app import main

    monkeypatch.setattr("sys.argv", ["fourfold", "generate", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as caught:
        code = int(caught.code or 0)
    return code, *capsys.readouterr()


def test_the_commands_options() -> None:
    from typer.main import get_command

    from fourfold.cli.app import app

    command = get_command(app).commands["generate"]  # type: ignore[attr-defined]
    found = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    options = """
        out --prompt -p --source -s --max-new-tokens --temperature --seed --simulate-activations
        --weights-only --stream --no-stream --device --trust-remote-code --json --quiet -q
        --log-file
    """
    assert found == set(options.split())


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any, w4a4: Path) -> None:
    options = ["--prompt", PROMPT, "--source", model_dir(), "--max-new-tokens", 3]
    code, text, err = run(monkeypatch, capsys, w4a4, *options)
    assert (code, err) == (0, "")
    assert text.startswith(PROMPT)
    assert "activations rounded" in text
    code, text, err = run(monkeypatch, capsys, w4a4, *options, "--json", "--weights-only")
    assert (code, err) == (0, "")
    found = json.loads(text)
    expected = generate(
        w4a4, PROMPT, source=model_dir(), max_new_tokens=3, simulate_activations=False
    ).to_dict()
    assert found["quantized"]["tokens"] == list(expected["quantized"]["tokens"])
    assert not found["simulated"]


def test_the_commands_errors(monkeypatch: pytest.MonkeyPatch, capsys: Any, out: Path) -> None:
    code, text, err = run(monkeypatch, capsys, out, "-p", "x", "--simulate-activations")
    assert (code, text) == (2, "")
    assert "only its weights are quantized (W4A16)" in err
    code, _, err = run(monkeypatch, capsys, out, "-p", "x", "--device", "tpu")
    assert code == 2
    assert "device 'tpu'" in err


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "The prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: give at least 1"),
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"simulate_activations": True}, "only its weights are quantized (W4A16)"),
    ],
)
def test_options_that_make_no_sense(out: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        generate(out, **({"prompt": PROMPT} | options))


def test_a_checkpoint_without_a_tokenizer_is_named(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    for file in TOKENIZER_FILES:
        (folder / file).unlink()
    with pytest.raises(SourceError, match="tokenizer") as caught:
        generate(folder, PROMPT)
    assert str(folder) in str(caught.value)
    assert "Put the tokenizer's files there." in str(caught.value)
    for file in TOKENIZER_FILES:
        (folder / file).write_text("{")
    with pytest.raises(SourceError, match=r"its tokenizer cannot be loaded: .*Put its files"):
        generate(folder, PROMPT)


def test_a_source_may_be_quantized_itself(out: Path, w4a4: Path) -> None:
    both = generate(out, PROMPT, source=w4a4, max_new_tokens=2)
    alone = generate(w4a4, PROMPT, simulate_activations=False, max_new_tokens=2)
    assert both.source is not None
    assert both.source.text == alone.quantized.text


def test_a_source_that_is_not_there(out: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        generate(out, PROMPT, source=tmp_path / "nowhere")


def test_a_model_that_writes_no_text(pair) -> None:
    _, out = pair("openai_privacy_filter")
    with pytest.raises(ModelError, match="a model that does not write text"):
        generate(out, PROMPT)
