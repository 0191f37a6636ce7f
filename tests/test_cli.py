# SPDX-License-Identifier: Apache-2.0
"""The command line as users meet it: options, output, exit codes, every error they can cause."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import Truth
from jobs import Script, start_command

Written = Callable[[str], tuple[Path, Truth]]


def fourfold(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fourfold", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,  # type: ignore[call-overload]
    )


def in_process(monkeypatch: pytest.MonkeyPatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """As `fourfold`, without the price of a new interpreter."""
    from fourfold.cli.app import main

    monkeypatch.setattr(sys, "argv", ["fourfold", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as caught:
        code = int(caught.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., tuple[int, str, str]]:
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


def test_help_imports_little_and_cuts_nothing_short() -> None:
    code = (
        "import sys; sys.argv = ['fourfold', '--help']\n"
        "from fourfold.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = 'torch transformers numpy numba pydantic jinja2 yaml psutil rich markdown_it'\n"
        "assert not (loaded := set(heavy.split()) & set(sys.modules)), loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = "quantize plan verify convert eval inspect summary recipes demo"
    assert all(command in done.stdout for command in commands.split())
    assert "..." not in done.stdout.partition("Commands:")[2]


def options_of(command: str) -> set[str]:
    from typer.main import get_command

    from fourfold.cli.app import app

    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    return {name for parameter in found.params for name in parameter.opts}


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "quantize",
            "model out --recipe -r --hf-config --calib --calib-size --calib-seq --batch-size "
            "--packing --seed --calibration --device --device-memory --activation-memory --dtype "
            "--threads --shards --overwrite --no-verify --reference --strict --trust-remote-code "
            "--verbose -q --quiet --log-file --json --show-data --keep-source "
            "--preview",
        ),
        ("plan", "model --recipe -r --hf-config --dtype --time --trust-remote-code --json"),
        (
            "verify",
            "out --source -s --reference --hf-config --threads --trust-remote-code --quiet -q "
            "--log-file --dtype --json",
        ),
        (
            "convert",
            "model out --hf-config --layout --threads --shards --overwrite --trust-remote-code "
            "--quiet -q --dtype --log-file --json",
        ),
        ("inspect", "folder --json"),
        ("summary", "out --role --layer --all --worst --json"),
        ("recipes", "name --guide --json"),
        ("demo", "out --recipe -r --overwrite --quiet -q --log-file --json"),
    ],
)
def test_options(command: str, options: str) -> None:
    assert options_of(command) == set(options.split())


def test_the_whole_job(run, written: Written, tmp_path: Path) -> None:
    model, out = written("qwen3_moe")[0], tmp_path / "out"
    code, text, _ = run("quantize", model, out, "--recipe", "w4a16_nvfp4_experts_only_mse")
    assert code == 0
    assert "24 / 24 linear weights quantized · 0 zero scales of 4,608 · " in text
    assert text.splitlines()[-3].endswith("· verified")
    assert text.splitlines()[-1].startswith(f"serve it: vllm serve {out} ")
    assert run("verify", out, "--source", model)[0] == 0
    code, text, _ = run("inspect", out)
    assert code == 0
    assert "W4A16_NVFP4" in text
    assert "model.layers.*.mlp.experts.*.gate_proj.weight_scale" in text
    summary = json.loads((out / "quant_summary.json").read_text())
    assert summary["ledger"]["linear_weights_quantized"] == len(summary["linears"]) == 24
    assert all(0 < entry["relative_error"] < 0.2 for entry in summary["linears"])


def test_json_is_one_document(run, written: Written, tmp_path: Path) -> None:
    model, out = written("qwen3_moe")[0], tmp_path / "out"
    for arguments in (
        ["plan", model],
        ["quantize", model, out],
        ["verify", out, "--source", model],
        ["inspect", out],
        ["recipes"],
        ["recipes", "w4a16_nvfp4_default"],
    ):
        code, text, err = run(*arguments, "--json")
        assert code == 0, err
        assert isinstance(json.loads(text), dict)
        assert err == ""


def test_verbose_says_which_kernels_and_why(run, written: Written, tmp_path: Path) -> None:
    model = written("qwen3_moe")[0]
    arguments = ["--threads", 3, "--device", "cpu", "--verbose"]
    code, text, err = run("quantize", model, tmp_path / "out", *arguments)
    assert code == 0
    assert err.splitlines() == [
        "numba kernels: tensors are in CPU memory",
        "weights are quantized on the CPU, by 3 threads",
    ]
    code, text, err = run("quantize", model, tmp_path / "json", *arguments, "--json")
    assert err.startswith("numba kernels: ")
    assert json.loads(text)["kernels"] == "numba kernels: tensors are in CPU memory"


@pytest.mark.parametrize("verbose", [[], ["--verbose"], ["--json"]])
def test_slower_kernels_are_told_once(
    verbose: list[str], run, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fourfold.formats.dispatch import Choice, Kernel

    found = Choice(Kernel.NUMBA, "on the CPU, since triton is not installed", is_fallback=True)
    monkeypatch.setattr("fourfold.formats.dispatch.choice_for_weights", lambda _: found)
    out = tmp_path / "out"
    code, _, err = run("quantize", written("qwen3_moe")[0], out, "--threads", 1, *verbose)
    assert code == 0
    warning = "warning: numba kernels: on the CPU, since triton is not installed"
    more = ["weights are quantized on the CPU, by 1 threads"] if "--verbose" in verbose else []
    assert sorted(err.splitlines()) == sorted([warning, *more])


def test_device_memory(
    run, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = ("quantize", written("qwen3_moe")[0], tmp_path / "out", "--device", "cpu")
    check_error(run(*quantize, "--device-memory", "0"), 2, "--device-memory 0: give a whole number")
    check_error(run(*quantize, "--device-memory=-1"), 2, "--device-memory -1.0: give a number")
    check_error(run(*quantize, "--device-memory", "nan"), 2, "--device-memory nan: give a number")
    check_error(run(*quantize, "--device-memory", "much"), 2, "Invalid value")
    check_error(run(*quantize, "--device-memory", "4"), 2, "no memory of cpu is taken")
    check_error(run(*quantize, "--device", "cuda:99"), 2, "this machine has")
    check_error(run(*quantize, "--device", "tpu"), 2, "give cpu, cuda, cuda:N or auto")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("fourfold.execution.backend.uses_device", lambda _: True)
    code, _, err = run(*quantize, "--device-memory", "0.0001", "--verbose", "--threads", 1)
    assert code == 0
    assert err.splitlines()[-1].startswith("weights are quantized on cpu, 2 batches at a time of ")


def test_quiet_without_a_terminal(written: Written, tmp_path: Path) -> None:
    done = fourfold("quantize", written("qwen3_moe")[0], tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout


def test_recipes(run) -> None:
    code, text, _ = run("recipes")
    assert code == 0
    assert "w4a16_nvfp4_mlp_only_mse" in text
    code, text, _ = run("recipes", "w4a16_nvfp4_mlp_only_mse")
    assert code == 0
    assert "scale: mse" in text


def test_version(run) -> None:
    import fourfold

    assert run("--version")[1].strip() == f"fourfold {fourfold.__version__}"


def check_error(result: tuple[int, str, str], code: int, *words: str) -> None:
    found, _, err = result
    assert found == code, err
    assert err.startswith("error: ") or "Usage:" in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2 or "Usage:" in err
    for word in words:
        assert word in err, err


def edited(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_wrong_usage(run) -> None:
    check_error(run("quantize"), 2, "Missing argument")
    check_error(run("plan", "x", "--recipes", "y"), 2, "No such option")
    check_error(run("nonsense"), 2, "nonsense")
    check_error(run("plan", ".", "--recipe", "w4a16_nvfp4_expert"), 2, "did you mean")
    check_error(run("recipes", "w4a16"), 2, "no such recipe")


def test_no_checkpoint(run, tmp_path: Path) -> None:
    check_error(run("plan", tmp_path), 1, "no config.json", "it is empty")
    check_error(run("plan", tmp_path / "x"), 1, "no such folder")
    check_error(run("verify", tmp_path), 2, "no config.json")
    check_error(run("inspect", tmp_path), 1, "no config.json")


def test_verify_a_checkpoint_that_is_not_quantized(run, written: Written) -> None:
    check_error(run("verify", written("qwen3_moe")[0]), 2, "quantization_config")


def test_verify_finds(run, written: Written, tmp_path: Path) -> None:
    model, out = written("qwen3_moe")[0], tmp_path / "out"
    assert run("quantize", model, out, "--no-verify")[0] == 0
    name = "model.layers.1.mlp.experts.2.gate_proj.weight_scale"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    file = out / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name].view(torch.uint8)[0, 0] = 0
    save_file(tensors, file)
    code, text, _ = run("verify", out)
    assert code == 1
    assert "block-scale-zero" in text
    assert name.removesuffix(".weight_scale") in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("recipe", ["w4a16_nvfp4_experts_only", "w4a16_nvfp4_experts_only_mse"])
def test_weight_that_is_not_finite(
    run, value: float, recipe: str, written: Written, tmp_path: Path
) -> None:
    key = "model.layers.1.mlp.experts.3.down_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][5, 7] = value

    model = edited(written("qwen3_moe")[0], tmp_path / "model", spoil)
    result = run("quantize", model, tmp_path / "out", "-r", recipe)
    check_error(result, 1, key, "[5, 7]", str(value).lstrip("-"), "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_out_inside_model(run, written: Written, tmp_path: Path) -> None:
    model = Path(shutil.copytree(written("qwen3_moe")[0], tmp_path / "model"))
    before = sorted(tmp_path.rglob("*"))
    check_error(run("quantize", model, model / "out"), 1, "lies inside the model's folder")
    check_error(run("quantize", model, model, "--overwrite"), 1, "lies inside the model's folder")
    check_error(run("quantize", model, tmp_path, "--overwrite"), 1, "the model lies inside it")
    assert sorted(tmp_path.rglob("*")) == before


def test_out_not_empty(run, written: Written, tmp_path: Path) -> None:
    model, out = written("qwen3_moe")[0], tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    check_error(run("quantize", model, out), 1, "not empty (precious", "--overwrite")
    check_error(run("quantize", model, out / "precious"), 1, "is a file")
    check_error(run("quantize", model, out, "--overwrite"), 1, "no checkpoint that fourfold wrote")
    check_error(run("demo", out), 1, "not empty (precious")
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_overwrite_replaces_what_we_wrote_and_nothing_else(
    run, written: Written, tmp_path: Path
) -> None:
    first = Path(shutil.copytree(written("qwen3_moe")[0], tmp_path / "first"))
    (first / "chat_template.jinja").write_text("old")
    out = tmp_path / "out"
    assert run("quantize", first, out)[0] == 0
    (out / "adapter_model.safetensors").write_bytes(b"mine")
    (out / "sub").mkdir()
    (out / "sub" / "notes").write_text("mine")
    code, _, err = run("quantize", written("mixtral")[0], out, "--overwrite")
    assert code == 0, err
    assert not (out / "chat_template.jinja").exists()
    assert (out / "adapter_model.safetensors").read_bytes() == b"mine"
    assert (out / "sub" / "notes").read_text() == "mine"
    assert len(list(out.glob("model-*.safetensors"))) == 4
    (tmp_path / "elsewhere").write_text("mine")
    (out / "LICENSE").symlink_to(tmp_path / "elsewhere")
    (first / "LICENSE").write_text("theirs")
    check_error(run("quantize", first, out, "--overwrite"), 1, "LICENSE: is in the way")
    assert run("verify", out)[0] == 0  # refused before anything was removed
    (out / "LICENSE").unlink()
    (out / "LICENSE").mkdir()
    check_error(run("quantize", first, out, "--overwrite"), 1, "LICENSE: is in the way")
    assert run("verify", out)[0] == 0
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_links_do_not_lead_out_of_the_model(run, written: Written, tmp_path: Path) -> None:
    model = Path(shutil.copytree(written("qwen3_moe")[0], tmp_path / "model"))
    (tmp_path / "secret").write_text("x")
    (model / "secret.txt").symlink_to(tmp_path / "secret")
    (model / "loop").symlink_to(model)
    (model / "dangling.json").symlink_to(model / "nothing")
    (model / "inside.json").symlink_to("config.json")
    os.mkfifo(model / "pipe")
    code, text, err = run("quantize", model, tmp_path / "out")
    assert code == 0, err
    assert "4 files are not copied" in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "inside.json" in names
    assert not names & {"secret.txt", "loop", "dangling.json", "pipe"}


def test_a_hub_cache_is_a_folder_like_any_other(run, written: Written, tmp_path: Path) -> None:
    """snapshots/<commit>/ holds links into blobs/."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (snapshot / "tokenizer.json").symlink_to("../../blobs/t")
    (blobs / "t").write_text("{}")
    for path in written("qwen3_moe")[0].iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert run("quantize", snapshot, tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_failed_overwrite_leaves_no_checkpoint(run, written: Written, tmp_path: Path) -> None:
    good, out = written("qwen3_moe")[0], tmp_path / "out"
    assert run("quantize", good, out)[0] == 0

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.experts.0.up_proj.weight"][0, 0] = float("nan")

    bad = edited(good, tmp_path / "bad", spoil)
    check_error(run("quantize", bad, out, "--overwrite"), 1, "nan")
    assert not list(out.glob("*.safetensors"))
    assert not (out / "config.json").exists()


def test_read_only_out(run, written: Written, tmp_path: Path, monkeypatch) -> None:
    model = written("qwen3_moe")[0]

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    result = run("quantize", model, tmp_path / "out")
    check_error(result, 1, "out", "cannot be written", "choose another")


@pytest.mark.parametrize("after", [0, 1, 3, 40])
def test_disk_full(
    after: int, run, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    pwrite = os.pwrite

    def full(*arguments: object) -> int:
        calls.append(1)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return pwrite(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", full)
    result = run("quantize", written("qwen3_moe")[0], tmp_path / "out")
    check_error(result, 1, "model-0000" if after else "out", "The disk is full")
    if after < 40:
        assert not (tmp_path / "out").exists()  # no shard was finished
        return
    assert "the same command resumes" in result[2]
    assert not list((tmp_path / "out").glob("*.json"))
    monkeypatch.undo()
    code, out, _ = run("quantize", written("qwen3_moe")[0], tmp_path / "out")
    assert (code, "resuming an unfinished run" in out) == (0, True)


@contextmanager
def file_system(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own, mounted with `options`."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_disk_too_small_for_the_plan(run, written: Written, tmp_path: Path) -> None:
    with file_system(tmp_path / "small", "size=64k") as small:
        result = run("quantize", written("qwen3_moe")[0], small / "out")
        check_error(result, 1, "are needed", "are free", "Free some room")
        assert not (small / "out").exists()


def test_disk_that_fills_up_meanwhile(run, written: Written, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fourfold.storage.disk.free_bytes", lambda _: 10**12)
    with file_system(tmp_path / "small", "size=96k") as small:
        result = run("quantize", written("qwen3_moe")[0], small / "out")
        check_error(result, 1, "model-0000", "The disk is full")
        # One shard fits: whether it is finished before another one fails depends on the threads.
        resumes = "the same command resumes" in result[2]
        assert resumes == (small / "out").exists()
        assert not list((small / "out").glob("*.json"))


def test_read_only_file_system(run, written: Written, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fourfold.storage.disk.free_bytes", lambda _: 10**12)
    with file_system(tmp_path / "fixed", "ro") as fixed:
        result = run("quantize", written("qwen3_moe")[0], fixed / "out")
        check_error(result, 1, "out", "cannot be written", "choose another")


def test_too_little_memory(run, written: Written, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fourfold.run.preflight.memory_available", lambda: 1000)
    result = run("quantize", written("qwen3_moe")[0], tmp_path / "out")
    check_error(result, 1, "of memory are needed", "--threads")


def test_a_defect_shows_no_traceback(run, written: Written, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("fourfold.api.make_plan", broken)
    check_error(run("plan", written("qwen3_moe")[0]), 1, "oops", "--debug")
    code, _, err = run("--debug", "plan", written("qwen3_moe")[0])
    assert code == 1
    assert "ZeroDivisionError" in err


@pytest.mark.slow
def test_early_errors_end_in_order(written: Written, tmp_path: Path) -> None:
    """No thread may be compiling while the interpreter ends."""
    model = Path(shutil.copytree(written("qwen3_moe")[0], tmp_path / "model"))
    (model / "config.json").write_text('{"model_type": "nonsense"}')
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for arguments in ([model, model / "x"], [model, tmp_path / "out"]):
        done = fourfold("quantize", *arguments, env=environment)
        check_error((done.returncode, done.stdout, done.stderr), 1, "model")


@pytest.mark.slow
def test_terminals_that_know_ascii_alone(written: Written, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = fourfold("quantize", written("qwen3_moe")[0], tmp_path / "out", env=environment)
    assert done.returncode == 0, done.stderr
    done = fourfold("plan", tmp_path / "nö", env=environment)
    check_error((done.returncode, done.stdout, done.stderr), 1, "no such folder")


def test_closed_stdout(written: Written, tmp_path: Path) -> None:
    """As Python starts where a shell has closed it: `fourfold … >&-`."""
    closed = "import os, sys\nos.close(1)\nsys.stdout = None\n"
    with start_command(
        "quantize", written("qwen3_moe")[0], tmp_path / "out", before=closed
    ) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err


def test_empty_out(run, written: Written) -> None:
    check_error(run("quantize", written("qwen3_moe")[0], ""), 2, "OUT is empty")


SLOW_WRITE = (
    "import os, time\n"
    "pwrite = os.pwrite\n"
    "def slow(*a):\n"
    "    time.sleep(0.01)\n"
    "    return pwrite(*a)\n"
    "os.pwrite = slow\n"
)


def start_slowly(model: Path, out: Path) -> Script:
    return start_command("quantize", model, out, "--no-verify", before=SLOW_WRITE)


def wait_for_shards(out: Path, process: Script) -> None:
    while process.poll() is None:
        if out.exists() and list(out.glob("model-*.safetensors")):
            return
        time.sleep(0.01)
    raise AssertionError(f"no shard was written: {process.communicate()}")


def test_a_killed_run_leaves_nothing_that_loads(run, written: Written, tmp_path: Path) -> None:
    model, out = written("qwen3_5_moe_vl")[0], tmp_path / "out"
    with start_slowly(model, out) as process:
        wait_for_shards(out, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    names = {path.name for path in out.iterdir()}
    assert not names & {"config.json", "model.safetensors.index.json"}
    check_error(run("verify", out), 2, "config.json")
    assert run("quantize", model, out, "--overwrite")[0] == 0
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_what_is_finished(
    number: int, code: int, written: Written, tmp_path: Path
) -> None:
    model, out = written("qwen3_5_moe_vl")[0], tmp_path / "out"
    with start_slowly(model, out) as process:
        wait_for_shards(out, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.startswith("error: stopped by SIG")
    assert re.search(rf"{out} keeps [1-9] of \d shards .*the same command resumes", err)
    assert "Traceback" not in err
    assert not list(out.glob("*.json"))
    assert not list(out.glob(".*.partial"))
