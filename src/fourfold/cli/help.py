# SPDX-License-Identifier: Apache-2.0
"""The help pages: options in groups, and examples. Without rich, which would cost their speed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

CALIBRATION, MACHINE, OUTPUT = "Calibration", "Machine", "Output"
"""Groups of options, as `rich_help_panel` of an option names them. Others are under `Options`."""

_EXAMPLES: Mapping[str, Sequence[str]] = {
    "fourfold": (
        "fourfold demo",
        "fourfold recipes --guide",
        "fourfold quantize MODEL OUT",
    ),
    "quantize": (
        "fourfold quantize Qwen3.6-35B-A3B Qwen3.6-35B-A3B-NVFP4",
        "fourfold quantize MODEL OUT --recipe nvfp4_experts_only_mse --calib data.jsonl",
        "torchrun --nproc-per-node 2 -m fourfold quantize MODEL OUT",
    ),
    "plan": (
        "fourfold plan MODEL --recipe w4a16_nvfp4_default_mse",
        "fourfold plan MODEL --json --time > plan.json",
    ),
    "verify": ("fourfold verify OUT", "fourfold verify OUT --source MODEL"),
    "convert": ("fourfold convert MEGATRON OUT --hf-config FOLDER",),
    "merge": ("fourfold merge NODE0 NODE1 OUT", "fourfold merge OUT RESHARDED --shards 2"),
    "inspect": ("fourfold inspect OUT",),
    "summary": ("fourfold summary OUT --worst 10", "fourfold summary OUT --role experts --layer 0"),
    "report": ("fourfold report OUT --output page.html",),
    "recipes": (
        "fourfold recipes --guide",
        "fourfold recipes nvfp4_experts_only_mse > mine.yaml",
    ),
    "schema": ("fourfold schema quantization",),
    "demo": ("fourfold demo demo-out --recipe nvfp4_default_mse-fp8_kv",),
    "eval": (
        "fourfold eval MODEL OUT --text wiki.test.raw",
        "fourfold eval MODEL OUT OUT2 --text chats.jsonl --length 4096 --windows 64",
    ),
    "sensitivity": (
        "fourfold sensitivity MODEL --text wiki.test.raw",
        "fourfold sensitivity MODEL -t chats.jsonl --candidates w4a16,fp8 --tokens 4096",
    ),
    "generate": ('fourfold generate OUT --prompt "import os" --source MODEL',),
}
"""By command."""


class Command(TyperCommand):
    """A command whose help has its options in groups, and examples."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take a bare `--preview`, whose prompt is optional, for one with an empty prompt."""
        pairs = zip(args, [*args[1:], "-"], strict=False)
        args = [
            f"{argument}=" if argument == "--preview" and following.startswith("-") else argument
            for argument, following in pairs
        ]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for arguments, for each group of options, and for examples."""
        _write_options(self, ctx, formatter)
        _write_examples(self.name, formatter)


class Commands(TyperGroup):
    """All commands, with examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for options, for commands, and for examples."""
        _write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)
        _write_examples(self.name, formatter)


def _write_options(command: TyperCommand | TyperGroup, ctx: Any, formatter: Any) -> None:
    groups = defaultdict[str, list[Any]](list)
    for parameter in command.get_params(ctx):
        if (record := parameter.get_help_record(ctx)) is not None:
            is_option = parameter.param_type_name == "option"
            group = getattr(parameter, "rich_help_panel", None) or "Options"
            groups[group if is_option else "Arguments"].append(record)
    for name in sorted(groups, key=lambda name: name != "Arguments"):
        with formatter.section(name):
            formatter.write_dl(groups[name])


def _write_examples(name: str | None, formatter: Any) -> None:
    if examples := _EXAMPLES.get(name or ""):
        with formatter.section("Examples"):
            for example in examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")
