"""What quantization did to a model, measured and shown: `fourfold demo` prints this.

    KL    mean over positions of Σ_v P_ref(v) · ln(P_ref(v) / P_q(v)), in nats
    top-1 share of positions where both models rank the same token first
    bits  mean of −log₂ P(next token); for the embedded model, a token is a byte

An NVFP4 checkpoint is read back the plain way: each weight is dequantized and goes into the
ordinary transformers model. Activations and the KV cache stay in full precision, so the figures
are those of the weights alone (W4A16), and no engine or GPU is needed. Models that fit in memory.

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
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from fourfold.checkpoints.source import SafetensorsFolder, open_source
from fourfold.checkpoints.writer import SUMMARY
from fourfold.embedded import heldout_text, model_dir
from fourfold.errors import ModelError, UsageError
from fourfold.numerics.nvfp4 import NVFP4Tensor

PROMPT = "import os\nimport sys\n\ndef main():\n    "
NEW_TOKENS = 200
SEED, TEMPERATURE = 1, 0.7
WINDOW = 512

LINEAR_SCALES = {"weight_scale", "weight_scale_2", "input_scale"}
KV_SCALES = {"k_scale", "v_scale"}


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

    def __str__(self) -> str:
        found = self.comparison
        return (
            f"--- before, drawn at temperature {TEMPERATURE}:\n{self.reference_text}\n"
            f"--- after, from the dequantized weights and the same seed:\n{self.quantized_text}\n"
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
    with _quiet(), _one_thread():
        reference = AutoModelForCausalLM.from_pretrained(source_dir, dtype=torch.float32)
        quantized = load_dequantized(out_dir)
        tokens_T = torch.tensor(tokenizer(heldout_text())["input_ids"])
        return DemoResult(
            prompt=PROMPT,
            reference_text=generate(reference, tokenizer, PROMPT, NEW_TOKENS, SEED, TEMPERATURE),
            quantized_text=generate(quantized, tokenizer, PROMPT, NEW_TOKENS, SEED, TEMPERATURE),
            comparison=compare(reference, quantized, tokens_T, WINDOW),
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from threads, and loses tenfold where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_dequantized(out_dir: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The transformers model of an NVFP4 checkpoint in the ModelOpt layout, dequantized.

    Raises ModelError if a key of the checkpoint has no place in the model, or the other way round;
    SourceError if the checkpoint cannot be read.
    """
    source = open_source(out_dir)
    try:
        state = {name: tensor.to(dtype) for name, tensor in _dequantized(source)}
    finally:
        source.close()
    config = AutoConfig.from_pretrained(out_dir, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{out_dir}: {config.model_type} is not a text model of transformers")
    with _quiet():
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    _check_loaded(out_dir, info)
    return model


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
    inputs = tokenizer(prompt, return_tensors="pt")
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **options,
        )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def _dequantized(source: SafetensorsFolder) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the checkpoint by its upstream name; scales are folded in."""
    ending = ".weight_scale_2"
    linears = {key.removesuffix(ending) for key in source.tensors if key.endswith(ending)}
    for linear in sorted(linears):
        yield f"{linear}.weight", _dequantize(source, f"{linear}.weight")
    for key in source.tensors:
        module, _, leaf = key.rpartition(".")
        of_linear = module in linears and leaf in LINEAR_SCALES | {"weight"}
        if not of_linear and leaf not in KV_SCALES:
            yield key, _read(source, key)


def _dequantize(source: SafetensorsFolder, key: str) -> Tensor:
    for needed in (key, f"{key}_scale"):
        if needed not in source.tensors:
            raise ModelError(
                f"{needed}: missing, while {key}_scale_2 is there. "
                "The checkpoint is incomplete: quantize the model again."
            )
    return NVFP4Tensor(
        codes=_read(source, key),
        block_scale=_read(source, f"{key}_scale"),
        global_scale=_read(source, f"{key}_scale_2"),
    ).dequantize(torch.float32)


def _read(source: SafetensorsFolder, key: str) -> Tensor:
    shape = source.tensors[key].shape
    return source.slab(key, 0, shape[0] if shape else 1)


def _check_loaded(out_dir: Path, info: dict[str, Any]) -> None:
    """`info` as transformers returns it: sets of keys, and messages."""
    kinds = {
        "missing_keys": "the model needs it, the checkpoint lacks it",
        "unexpected_keys": "the checkpoint holds it, the model has no place for it",
        "mismatched_keys": "it does not have the shape that the model needs",
    }
    for kind, meaning in kinds.items():
        names = sorted(str(name) for name in info[kind])
        if names:
            more = f" ({len(names)} such: {', '.join(names[1:4])}, …)" if len(names) > 1 else ""
            raise ModelError(f"{out_dir}: {names[0]}: {meaning}{more}")
    if info["error_msgs"]:
        raise ModelError(f"{out_dir}: transformers cannot load it: {info['error_msgs'][0]}")


@torch.no_grad()
def _log_probs(model: PreTrainedModel, tokens_W: Tensor) -> Tensor:
    """ln P(next token) at each position: [W, V], fp32."""
    logits_WV = model(input_ids=tokens_W[None], use_cache=False).logits[0]
    return F.log_softmax(logits_WV.float(), dim=-1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and load report: what matters is raised."""
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
