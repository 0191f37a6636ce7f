"""Train the model that ships inside the package: a byte-level Qwen3-MoE on Python's own library.

    python scripts/train_embedded.py [--out DIR] [--steps N]

The text is the standard library of the interpreter that runs this script: one document a file,
in the order of their paths, the end-of-text token after each. One file in twenty, chosen by a
hash of its path, is held out; a part of those is shipped beside the model as `heldout.txt`.

Training is plain next-byte prediction in fp32 (AdamW, warm-up, cosine), with Switch's
load-balancing loss (arXiv 2101.03961, eq. 4-6) taken in each layer on its own: transformers'
version pools the layers, so that a layer may starve an expert that another layer feeds.
The weights are then rounded to bf16, and every figure in the card is measured on those.

The result depends on the seed, the Python version (the text) and the torch build (the sums);
nothing else. One thread, so that it is the same on a busy machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

PACKAGE_FOLDER = Path(__file__).resolve().parents[1] / "src" / "fourfold" / "embedded"

END_OF_TEXT = 256  # token ids 0..255 are the bytes themselves
END_OF_TEXT_TOKEN = "<|endoftext|>"
VOCAB_SIZE = 320  # 257 used, padded to a multiple of 64, as engines do

# Tables and generated files: text that is not code, and build paths of one machine.
EXCLUDED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")

HELD_OUT_ONE_IN = 20
HELD_OUT_TEXT_BYTES = 96_000
HELD_OUT_FILE_BYTES = 8_000
EVALUATION_WINDOW = 512


@dataclass(frozen=True)
class Training:
    """How the model is trained. Tokens seen = steps × batch × crop."""

    seed: int = 20
    steps: int = 7000
    batch: int = 4
    crop: int = 512
    peak_lr: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.1
    balance: float = 0.01
    clip: float = 1.0


def model_config(**changes: Any) -> Qwen3MoeConfig:
    """The architecture: every dimension a multiple of 32, hidden and vocabulary of 64."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.04,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "eos_token_id": END_OF_TEXT,
    }
    return Qwen3MoeConfig(**(settings | changes))


# --- text ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Documents by path relative to the standard library, in order."""

    train: dict[str, bytes]
    held_out: dict[str, bytes]


def library_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """(relative path, content) of every module of the standard library, in the order of paths."""
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(paths):
        parts = name.split("/")
        if EXCLUDED_FOLDERS.intersection(parts) or name.startswith(EXCLUDED_PREFIXES):
            continue
        content = paths[name].read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if content:
            yield name, content


def read_corpus(root: Path) -> Corpus:
    """Split the library by file: a hash of the path decides, so that no order or seed does."""
    train, held_out = {}, {}
    for name, content in library_files(root):
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        (held_out if digest % HELD_OUT_ONE_IN == 0 else train)[name] = content
    return Corpus(train, held_out)


def held_out_text(corpus: Corpus) -> tuple[str, list[str]]:
    """The text that is shipped: the head of each held-out file, and the names of those files.

    Files with a notice of their own are left out: what remains is under Python's licence alone.
    """
    excerpts, names, size = [], [], 0
    for name, content in corpus.held_out.items():
        if b"opyright" in content or b"icense" in content:
            continue
        excerpt = content[:HELD_OUT_FILE_BYTES]
        excerpt = excerpt[: excerpt.rfind(b"\n") + 1]
        if size + len(excerpt) > HELD_OUT_TEXT_BYTES:
            break
        excerpts.append(excerpt)
        names.append(name)
        size += len(excerpt)
    return b"".join(excerpts).decode("utf-8"), names


def to_stream(documents: dict[str, bytes]) -> Tensor:
    """All documents as one row of token ids [tokens], end-of-text after each."""
    tokens: list[int] = []
    for content in documents.values():
        tokens.extend(content)
        tokens.append(END_OF_TEXT)
    return torch.tensor(tokens, dtype=torch.int16)


# --- training -----------------------------------------------------------------------------


def learning_rate(step: int, training: Training) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < training.warmup:
        return training.peak_lr * (step + 1) / training.warmup
    progress = (step - training.warmup) / max(1, training.steps - training.warmup)
    return training.peak_lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Mean over the layers of E · Σ_e f_e · p_e; 1 where the experts are evenly used."""
    losses = []
    for logits_TE in router_logits:
        experts = logits_TE.shape[-1]
        chosen_TK = logits_TE.topk(top_k, dim=-1).indices
        fraction_E = torch.bincount(chosen_TK.flatten(), minlength=experts) / chosen_TK.numel()
        losses.append(experts * (fraction_E * logits_TE.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def make_optimizer(model: torch.nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.peak_lr, betas=(0.9, 0.95), fused=True)


def train(config: Qwen3MoeConfig, stream: Tensor, training: Training) -> Qwen3MoeForCausalLM:
    """Train from nothing on random crops of the stream."""
    torch.manual_seed(training.seed)
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    optimizer = make_optimizer(model, training)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(stream):,} training tokens", flush=True)
    started = time.monotonic()
    recent = 0.0
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        starts = torch.randint(len(stream) - training.crop - 1, (training.batch,))
        crops = torch.stack([stream[s : s + training.crop + 1] for s in starts.tolist()]).long()
        output = model(crops[:, :-1], output_router_logits=True, use_cache=False)
        text_loss = F.cross_entropy(output.logits.flatten(0, 1), crops[:, 1:].flatten())
        balance = balance_loss(output.router_logits, config.num_experts_per_tok)
        (text_loss + training.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        optimizer.zero_grad()
        recent += text_loss.item() / math.log(2)
        if (step + 1) % 100 == 0:
            speed = (step + 1) * training.batch * training.crop / (time.monotonic() - started)
            line = f"step {step + 1:5d}  train {recent / 100:.3f} bits/byte"
            print(f"{line}  balance {balance.item():.3f}  {speed:,.0f} tokens/s", flush=True)
            recent = 0.0
    return model


# --- the checkpoint -----------------------------------------------------------------------


CONFIG_KEYS = (
    "attention_bias",
    "attention_dropout",
    "decoder_sparse_step",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "output_router_logits",
    "rms_norm_eps",
    "router_aux_loss_coef",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
)


def upstream_config(config: Qwen3MoeConfig) -> dict[str, Any]:
    """config.json as Qwen writes it for its own Qwen3-MoE models, the same keys."""
    written = {name: getattr(config, name) for name in CONFIG_KEYS}
    written |= {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "rope_scaling": None,
        "rope_theta": config.rope_parameters["rope_theta"],
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    }
    return dict(sorted(written.items()))


def byte_symbols() -> list[str]:
    """The printable symbol of each byte in byte-level BPE (GPT-2's table), by byte value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in symbols)
    symbols |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def tokenizer_json() -> dict[str, Any]:
    """Byte-level BPE without a merge: token id = byte."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    end_of_text = {
        "id": END_OF_TEXT,
        "content": END_OF_TEXT_TOKEN,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {symbol: byte for byte, symbol in enumerate(byte_symbols())},
            "merges": [],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """`split_special_tokens`: text never turns into the end-of-text token, only its id does."""
    return {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT_TOKEN,
        "pad_token": END_OF_TEXT_TOKEN,
        "split_special_tokens": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(model: Qwen3MoeForCausalLM, folder: Path) -> None:
    """A Hugging Face folder in upstream's layout: one key for each projection of each expert."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    fused = [
        name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    ]
    assert not fused, f"save_pretrained kept fused experts: {fused}"
    save_file(dict(sorted(tensors.items())), weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    write_json(folder / "config.json", upstream_config(model.config))
    generation = {"do_sample": False, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "tokenizer.json", tokenizer_json())
    write_json(folder / "tokenizer_config.json", tokenizer_config())


# --- figures ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Measured on the bf16 weights as they were written, computed in fp32."""

    bits_per_byte: float
    expert_share: tuple[float, float]  # least and most used expert of any layer, even = 1/E
    sample: str


@torch.no_grad()
def measure(folder: Path, text: str, prompt: str) -> Figures:
    """Held-out bits per byte in windows of 512 bytes, use of the experts, and a sample."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor(list(text.encode("utf-8")))
    bits, count = 0.0, 0
    used_LE = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for window in tokens.split(EVALUATION_WINDOW):
        output = model(window[None], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(output.logits[0, :-1], window[1:], reduction="sum")
        bits += loss.item() / math.log(2)
        count += len(window) - 1
        for layer, logits_TE in enumerate(output.router_logits):
            chosen = logits_TE.topk(model.config.num_experts_per_tok, dim=-1).indices
            used_LE[layer] += torch.bincount(chosen.flatten(), minlength=used_LE.shape[1])
    share_LE = used_LE / used_LE.sum(1, keepdim=True)
    torch.manual_seed(0)
    generated = model.generate(
        torch.tensor([list(prompt.encode())]),
        max_new_tokens=400,
        do_sample=True,
        temperature=0.6,
        top_k=0,
        pad_token_id=END_OF_TEXT,
    )
    ids = [token for token in generated[0].tolist() if token < END_OF_TEXT]
    sample = bytes(ids).decode("utf-8", errors="replace")
    return Figures(bits / count, (share_LE.min().item(), share_LE.max().item()), sample)


def processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, default=PACKAGE_FOLDER, help="the package's folder")
    parser.add_argument("--steps", type=int, default=Training.steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    training = Training(steps=arguments.steps)
    folder = arguments.out / "model"

    library = Path(sysconfig.get_paths()["stdlib"])
    corpus = read_corpus(library)
    text, names = held_out_text(corpus)
    print(f"{len(corpus.train)} files to train on, {len(corpus.held_out)} held out")

    started = time.monotonic()
    model = train(model_config(), to_stream(corpus.train), training)
    minutes = (time.monotonic() - started) / 60
    write_checkpoint(model, folder)
    (arguments.out / "heldout.txt").write_bytes(text.encode("utf-8"))
    shutil.copyfile(library / "LICENSE.txt", arguments.out / "LICENSE.PSF.txt")
    figures = measure(folder, text, "class Queue")

    print(f"held-out text: {len(text.encode()):,} bytes of {len(names)} files: {', '.join(names)}")
    print(f"held-out {figures.bits_per_byte:.4f} bits/byte (bf16 weights, windows of 512 bytes)")
    least, most = figures.expert_share
    print(f"expert use in a layer: least {least:.1%}, most {most:.1%}")
    print(f"{minutes:.1f} minutes on one thread of {processor()}, torch {torch.__version__}")
    print(figures.sample)


if __name__ == "__main__":
    main()
