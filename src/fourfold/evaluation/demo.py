# SPDX-License-Identifier: Apache-2.0
"""`fourfold demo`: the effect of quantization on the embedded model, in figures and in text.

Both models are ordinary transformers models in float32: the source, and the output with its
weights dequantized and, if it is W4A4, its activations rounded, and its KV cache if the recipe asks
for a quantized one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourfold.embedded import heldout_text, model_dir
from fourfold.errors import SourceError
from fourfold.evaluation.comparison import Comparison, compare
from fourfold.evaluation.continuation import Sampling, continue_prompt, text_after
from fourfold.evaluation.loading import load
from fourfold.evaluation.simulated_activations import is_rounded
from fourfold.formats.kv_cache import KVFormat
from fourfold.models.internals import quiet
from fourfold.sources.decoded import open_decoded
from fourfold.sources.safetensors import open_source
from fourfold.storage.quant_summary import find_summary

PROMPT = "import os\nimport sys\n\ndef main():\n    "
SAMPLING = Sampling(max_new_tokens=200, temperature=0.7, seed=1)
WINDOW = 512


@dataclass(frozen=True)
class DemoResult:
    """Texts and figures. Printing it gives what the command prints after the run."""

    prompt: str
    reference_text: str
    quantized_text: str
    comparison: Comparison
    simulated: bool
    """True if the inputs of the quantized model's linear layers were rounded."""
    temperature: float
    kv_cache: KVFormat | None = None
    """The format that the quantized model's keys and values were rounded to."""

    def __str__(self) -> str:
        figures = self.comparison
        model = "dequantized weights" + (", rounded activations" if self.simulated else "")
        model += f", {self.kv_cache.upper()} KV cache" if self.kv_cache is not None else ""
        return (
            f"--- before, drawn at temperature {self.temperature}:\n{self.reference_text}\n"
            f"--- after, from the {model} and the same seed:\n{self.quantized_text}\n"
            f"--- on {figures.positions:,} bytes of held-out text: KL {figures.kl:.2e} nats a "
            f"byte, top-1 agreement {figures.top1_agreement:.1%}, "
            f"{figures.reference_bits:.4f} -> {figures.quantized_bits:.4f} bits a byte"
        )


def is_demo_output(folder: Path) -> bool:
    """Return True if `folder` holds the embedded model, quantized: it may be overwritten."""
    try:
        summary = find_summary(folder)
    except SourceError:
        return False
    if summary is None:
        return False
    with closing(open_source(model_dir())) as source:
        nbytes = sum(info.nbytes for info in source.tensors.values())
        embedded = len(source.tensors), nbytes
    return (summary.ledger.source_tensors, summary.ledger.bytes_before) == embedded


def demonstrate(
    source: Path, out: Path, *, text: str | None = None, sampling: Sampling = SAMPLING
) -> DemoResult:
    """Compare the checkpoint in `source` with its quantized output in `out`.

    Args:
        source: The folder of the embedded model.
        out: The folder of the output.
        text: The text to measure both models on; by default the held-out text.
        sampling: How each model continues the prompt.
    """
    with closing(open_decoded(out)) as checkpoint:
        simulated, kv_cache = bool(checkpoint.input_roundings), checkpoint.kv_cache
        simulates = is_rounded(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(source)
    with quiet(), _one_thread():
        reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        quantized = load(out, dtype=torch.float32, simulate_activations=simulates)
        texts = [
            text_after(tokenizer, PROMPT, continue_prompt(model, tokenizer, PROMPT, sampling))
            for model in (reference, quantized)
        ]
        token_ids = torch.tensor(tokenizer(text or heldout_text())["input_ids"])
        comparison = compare(reference, quantized, token_ids, WINDOW)
    before, after = (PROMPT + text for text in texts)
    return DemoResult(PROMPT, before, after, comparison, simulated, sampling.temperature, kv_cache)


@contextmanager
def _one_thread() -> Iterator[None]:
    # A model this small gains nothing from threads, and loses tenfold if cores are shared.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
