# SPDX-License-Identifier: Apache-2.0
"""Files beside the weights: what running the model needs is copied, and nothing that misleads."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.errors import SourceError
from fourfold.storage.fingerprints import Stamps
from fourfold.storage.side_files import LeftOut, SideFiles, describe, find_side_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 11422654\n"


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def side_files(folder: Path) -> SideFiles:
    return find_side_files(folder, {folder / "model.safetensors"}, Stamps())


def copied(folder: Path) -> list[str]:
    return [path.as_posix() for path in side_files(folder).copied]


def left_out(folder: Path) -> dict[str, LeftOut]:
    return {path.as_posix(): why for path, why in side_files(folder).left_out}


def test_what_running_the_model_needs_is_copied(tmp_path: Path) -> None:
    needed: dict[str, str | bytes] = {
        "LICENSE": "MIT",
        "README.md": "# A model",
        "additional_chat_templates/tools.jinja": "{{ messages }}",
        "chat_template.jinja": "{{ messages }}",
        "encoding/encode.py": "pass",
        "generation_config.json": "{}",
        "merges.txt": "a b\n" * (1 << 20),
        "modeling_own.py": "pass",
        "preprocessor_config.json": "{}",
        "qwen.tiktoken": b"\0\1\2",
        "tokenizer.json": "{}" + " " * (1 << 21),
        "tokenizer.model": b"\n\0\1\2",
        "tokenizer_config.json": "{}",
    }
    write(tmp_path, {**needed, "model.safetensors": b"", "config.json": "{}"})
    assert copied(tmp_path) == sorted(needed)
    assert left_out(tmp_path) == {}
    assert side_files(tmp_path).has_tokenizer


def test_a_trainers_folder(tmp_path: Path) -> None:
    expected = {
        "adapter_config.json": LeftOut.ADAPTER,
        "adapter_model.safetensors": LeftOut.ADAPTER,
        "checkpoint-10/config.json": LeftOut.TRAINING,
        "checkpoint-10/model.safetensors": LeftOut.TRAINING,
        "consolidated.safetensors": LeftOut.WEIGHTS,
        "data.npz": LeftOut.DATA,
        "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": LeftOut.TRAINING,
        "long.log": LeftOut.DATA,
        "model-00001-of-00002.safetensors.incomplete": LeftOut.UNFINISHED,
        "model.Q4_K_M.gguf": LeftOut.WEIGHTS,
        "optimizer.bin": LeftOut.TRAINING,
        "original/params.json": LeftOut.WEIGHTS,
        "original/consolidated.00.pth": LeftOut.WEIGHTS,
        "pytorch_model.bin.index.json": LeftOut.WEIGHTS,
        "pytorch_model_fsdp_0/__0_0.distcp": LeftOut.TRAINING,
        "rng_state_0.pth": LeftOut.TRAINING,
        "runs/events.out.tfevents.17": LeftOut.TRAINING,
        "scheduler.pt": LeftOut.TRAINING,
        "trainer_state.json": LeftOut.TRAINING,
        "training_args.bin": LeftOut.TRAINING,
        "weights.zip": LeftOut.DATA,
    }
    write(tmp_path, dict.fromkeys(expected, b"PK\0\0"))
    write(tmp_path, {"long.log": "step\n" * (1 << 20), "model.safetensors": b""})
    write(tmp_path, {name: "{}" for name in expected if name.endswith(".json")})
    assert left_out(tmp_path) == expected
    assert copied(tmp_path) == []
    assert not side_files(tmp_path).has_tokenizer


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "chat_template.jinja"])
def test_a_pointer_in_place_of_what_the_model_needs(name: str, tmp_path: Path) -> None:
    write(tmp_path, {name: POINTER})
    with pytest.raises(SourceError, match=f"{name}: a Git LFS pointer.*git lfs pull"):
        side_files(tmp_path)


def test_a_pointer_in_place_of_a_picture(tmp_path: Path) -> None:
    write(tmp_path, {"figures/plot.png": POINTER})
    assert left_out(tmp_path) == {"figures/plot.png": LeftOut.POINTER}


def test_a_folder_of_links(tmp_path: Path) -> None:
    """Files of the same name are followed, as in a mirror; others might be anybody's."""
    mirror, model = tmp_path / "mirror", tmp_path / "model"
    write(mirror, {"tokenizer.json": "{}", "modeling.py": "pass", "secret": "mine"})
    model.mkdir()
    for name in ("tokenizer.json", "modeling.py"):
        (model / name).symlink_to(mirror / name)
    (model / "LICENSE").symlink_to(mirror / "secret")
    (model / "vocab.json").symlink_to(mirror / "nothing")
    assert copied(model) == ["modeling.py", "tokenizer.json"]
    assert left_out(model) == {"LICENSE": LeftOut.LINK, "vocab.json": LeftOut.NOT_A_FILE}


def test_reasons_are_given_with_names() -> None:
    names = [Path(f"optimizer_{n}.bin") for n in range(5)]
    text = describe([(name, LeftOut.TRAINING) for name in names] + [(Path("x.zip"), LeftOut.DATA)])
    assert text == (
        "training state (optimizer_0.bin, optimizer_1.bin, optimizer_2.bin and 2 more); "
        "not needed to run the model (x.zip)"
    )
