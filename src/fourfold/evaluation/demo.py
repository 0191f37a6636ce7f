"""What quantization did to a model, measured and shown: `fourfold demo` prints this.

    KL    mean over positions of Σ_v P_ref(v) · ln(P_ref(v) / P_q(v)), in nats
    top-1 share of positions where both models rank the same token first
    bits  mean of −log₂ P(next token); for the embedded model, a token is a byte

An NVFP4 checkpoint becomes the ordinary transformers model of its dequantized weights; where it is
W4A4, activations are rounded as well. The KV cache stays in full precision. No engine or GPU is
needed. Models that fit in memory.

Shapes: T tokens, N windows, W window, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fourfold.embedded import heldout_text, model_dir
from fourfold.errors import UsageError
from fourfold.evaluation.generation import continue_prompt
from fourfold.evaluation.loading import load
from fourfold.models.internals import quiet
from fourfold.sources.decoded import open_decoded
from fourfold.sources.safetensors import open_source
from fourfold.storage.names import SUMMARY

PROMPT = "import os\nimport sys\n\ndef main():\n    "
NEW_TOKENS = 200
SEED, TEMPERATURE = 1, 0.7
WINDOW = 512


@dataclass(frozen=True)
class Comparison:
    """A quantized model beside its reference, on the same text."""

    kl: float
    """Mean KL(P_ref ‖ P_q), nats per token."""
    top1_agreement: float
    """Share of positions, 0 to 1."""
    reference_bits: float
    """Bits per token of the reference."""
    quantized_bits: float
    """Bits per token of the quantized model."""
    positions: int
    """Over how many positions KL and agreement were taken."""


@dataclass(frozen=True)
class DemoResult:
    """What `fourfold demo` prints after the job."""

    prompt: str
    reference_text: str
    quantized_text: str
    comparison: Comparison
    simulated: bool
    """Whether the quantized model's activations were rounded, too (W4A4)."""

    def __str__(self) -> str:
        found = self.comparison
        source = "dequantized weights" + (", rounded activations" if self.simulated else "")
        return (
            f"--- before, drawn at temperature {TEMPERATURE}:\n{self.reference_text}\n"
            f"--- after, from the {source} and the same seed:\n{self.quantized_text}\n"
            f"--- on {found.positions:,} bytes of held-out text: KL {found.kl:.2e} nats a byte, "
            f"top-1 agreement {found.top1_agreement:.1%}, "
            f"{found.reference_bits:.4f} -> {found.quantized_bits:.4f} bits a byte"
        )


def is_demo_output(out_dir: Path) -> bool:
    """Whether `out_dir` holds the embedded model, quantized, and nothing else of value."""
    try:
        ledger = json.loads((out_dir / SUMMARY).read_bytes())["ledger"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    tensors = open_source(model_dir()).tensors
    nbytes = sum(info.nbytes for info in tensors.values())
    return (ledger.get("source_tensors"), ledger.get("bytes_before")) == (len(tensors), nbytes)


def demonstrate(source_dir: Path, out_dir: Path) -> DemoResult:
    """Compare a checkpoint with its NVFP4 output: on held-out text, and by what they write."""
    tokenizer = AutoTokenizer.from_pretrained(source_dir)
    simulated = _quantizes_activations(out_dir)
    with quiet(), _one_thread():
        reference = AutoModelForCausalLM.from_pretrained(source_dir, dtype=torch.float32)
        quantized = load(out_dir, dtype=torch.float32, simulate_activations=simulated)
        tokens_T = torch.tensor(tokenizer(heldout_text())["input_ids"])
        return DemoResult(
            prompt=PROMPT,
            reference_text=generate(reference, tokenizer, PROMPT, NEW_TOKENS, SEED, TEMPERATURE),
            quantized_text=generate(quantized, tokenizer, PROMPT, NEW_TOKENS, SEED, TEMPERATURE),
            comparison=compare(reference, quantized, tokens_T, WINDOW),
            simulated=simulated,
        )


def _quantizes_activations(out_dir: Path) -> bool:
    checkpoint = open_decoded(out_dir)
    try:
        return bool(checkpoint.input_scales)
    finally:
        checkpoint.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from threads, and loses tenfold where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    reference: PreTrainedModel, quantized: PreTrainedModel, token_ids: Tensor, window: int
) -> Comparison:
    """Measure both models on `token_ids` [T], in windows that do not overlap.

    The remainder that fills no window is left out. Raises UsageError if no window is filled.
    """
    count = len(token_ids) // window if window > 1 else 0
    if count == 0:
        raise UsageError(
            f"{len(token_ids)} tokens in windows of {window}: nothing to compare. "
            "Give a longer text, or a window of at least 2 tokens that fits into it."
        )
    kl = agreed = reference_nats = quantized_nats = 0.0
    for tokens_W in token_ids[: count * window].view(count, window):
        logp_WV, logq_WV = _log_probs(reference, tokens_W), _log_probs(quantized, tokens_W)
        kl += float((logp_WV.exp() * (logp_WV - logq_WV)).sum())
        agreed += int((logp_WV.argmax(-1) == logq_WV.argmax(-1)).sum())
        reference_nats += float(F.nll_loss(logp_WV[:-1], tokens_W[1:], reduction="sum"))
        quantized_nats += float(F.nll_loss(logq_WV[:-1], tokens_W[1:], reduction="sum"))
    positions = count * window
    predicted_bits = count * (window - 1) * math.log(2)
    return Comparison(
        kl=kl / positions,
        top1_agreement=agreed / positions,
        reference_bits=reference_nats / predicted_bits,
        quantized_bits=quantized_nats / predicted_bits,
        positions=positions,
    )


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    seed: int = 0,
    temperature: float = 0.0,
) -> str:
    """The prompt and what the model makes of it: greedy, or sampled from `seed`."""
    new_ids = continue_prompt(model, tokenizer, prompt, max_new_tokens, seed, temperature)
    ids = [*tokenizer(prompt)["input_ids"], *new_ids]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@torch.no_grad()
def _log_probs(model: PreTrainedModel, tokens_W: Tensor) -> Tensor:
    """ln P(next token) at each position: [W, V], fp32."""
    logits_WV = model(input_ids=tokens_W[None], use_cache=False).logits[0]
    return F.log_softmax(logits_WV.float(), dim=-1)
