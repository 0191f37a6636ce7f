# SPDX-License-Identifier: Apache-2.0
"""A live model that is calibrated by its owner's loop gives the streamed run's bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fourfold
from families import FAMILIES, Truth, quiet, read_back
from fourfold.calibration.data import Batch, load_calibration
from fourfold.config import CalibrationConfig, Runtime
from jobs import flat
from ranks import leave_together, run_on_ranks

Written = Callable[[str], tuple[Path, Truth]]
RECIPE = "nvfp4_default_mse-fp8_kv"
LIVE = ["qwen3_moe", "qwen3_5_moe_text", "qwen3_5_moe_vl", "mixtral", "gpt_oss"]
SIZES = {"calib_size": 12, "calib_seq": 24, "batch_size": 3}


def ids_file(folder: Path) -> Path:
    file = folder / "ids.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 90, (20, 30), generator=generator).tolist()
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return file


def batches_of(model_folder: Path, ids: Path) -> tuple[Batch, ...]:
    options = CalibrationConfig(ids, calib_size=12, calib_seq=24, batch_size=3)
    return load_calibration(model_folder, options, vocab_size=96).batches


def loop_over(batches: tuple[Batch, ...]) -> Callable[[Any], None]:
    def loop(model: Any) -> None:
        for batch in batches:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    return loop


@pytest.fixture(scope="module")
def streamed(
    written: Written, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path, tuple[Batch, ...]]]:
    """A family's model folder, its streamed output, and the batches that it was calibrated on."""
    made: dict[str, tuple[Path, Path, tuple[Batch, ...]]] = {}

    def make(name: str) -> tuple[Path, Path, tuple[Batch, ...]]:
        if name not in made:
            folder, base = written(name)[0], tmp_path_factory.mktemp(name)
            ids = ids_file(base)
            out = base / "out"
            assert fourfold.quantize(
                folder, out, RECIPE, **flat(calib=[ids], threads=1, **SIZES)
            ).clean
            made[name] = folder, out, batches_of(folder, ids)
        return made[name]

    return make


def differences(one: Path, other: Path) -> list[str]:
    """Files that differ; but for what names the data's origin and the model's folder."""
    own = {"quant_summary.json", "report.html", "calibration.safetensors", "README.md"}
    names = {path.name for folder in (one, other) for path in folder.iterdir()} - own
    return [
        name
        for name in sorted(names)
        if not (one / name).exists()
        or not (other / name).exists()
        or (one / name).read_bytes() != (other / name).read_bytes()
    ]


@pytest.mark.parametrize("name", LIVE)
def test_the_streamed_bytes(name: str, streamed, tmp_path: Path) -> None:
    folder, out, batches = streamed(name)
    model, _ = read_back(FAMILIES[name], folder)
    model.train()
    before = {path: module.__dict__.keys() for path, module in model.named_modules()}
    result = fourfold.quantize(
        model, tmp_path / "out", RECIPE, forward_loop=loop_over(batches), runtime=Runtime(threads=1)
    )
    assert result.clean, str(result.report)
    assert differences(out, tmp_path / "out") == []
    assert model.training
    assert before == {path: module.__dict__.keys() for path, module in model.named_modules()}
    assert not any(module._forward_pre_hooks for module in model.modules())
    streamed_digest = fourfold.Statistics.load(out / "calibration.safetensors").data.digest
    assert result.statistics.data.digest == streamed_digest


def test_calibration_data_serve_instead_of_a_loop(streamed, tmp_path: Path) -> None:
    folder, out, _ = streamed("qwen3_moe")
    model, _ = read_back(FAMILIES["qwen3_moe"], folder)
    ids = ids_file(tmp_path)
    result = fourfold.quantize(
        model, tmp_path / "out", RECIPE, **flat(calib=[ids], threads=1, **SIZES)
    )
    assert result.clean
    assert differences(out, tmp_path / "out") == []


def test_a_loop_that_generates(streamed, tmp_path: Path) -> None:
    """The model's own cache is seen, too, and the text that it goes on with."""
    folder, _, batches = streamed("qwen3_moe")
    model, _ = read_back(FAMILIES["qwen3_moe"], folder)

    def loop(model: Any) -> None:
        model.generate(batches[0].input_ids, max_new_tokens=4, do_sample=False, pad_token_id=0)

    result = fourfold.quantize(
        model, tmp_path / "out", RECIPE, forward_loop=loop, runtime=Runtime(threads=1)
    )
    assert result.clean, str(result.report)
    assert result.statistics.data.tokens == batches[0].input_ids.numel() + 3 * 3
    assert len(result.statistics.kv) == 3


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
def test_a_loop_that_fails(error: type[BaseException], streamed, tmp_path: Path) -> None:
    folder, out, batches = streamed("mixtral")
    model, _ = read_back(FAMILIES["mixtral"], folder)

    def loop(model: Any) -> None:
        loop_over(batches[:1])(model)
        raise error("enough")

    with pytest.raises(error, match="enough"):
        fourfold.quantize(
            model, tmp_path / "out", RECIPE, forward_loop=loop, runtime=Runtime(threads=1)
        )
    assert not (tmp_path / "out").exists()
    assert not any(module._forward_pre_hooks for module in model.modules())
    loop_again = loop_over(batches)
    assert fourfold.quantize(
        model, tmp_path / "out", RECIPE, forward_loop=loop_again, runtime=Runtime(threads=1)
    ).clean
    assert differences(out, tmp_path / "out") == []


def test_what_does_not_go_together(streamed, tmp_path: Path) -> None:
    folder, _, batches = streamed("qwen3_moe")
    model, _ = read_back(FAMILIES["qwen3_moe"], folder)
    loop, to = loop_over(batches), tmp_path / "out"
    with pytest.raises(fourfold.UsageError, match="only for a transformers model in memory"):
        fourfold.quantize(folder, to, RECIPE, forward_loop=loop)
    with pytest.raises(fourfold.UsageError, match="quantizes no activations"):
        fourfold.quantize(model, to, "w4a16_nvfp4_experts_only", forward_loop=loop)
    with pytest.raises(fourfold.UsageError, match="not both"):
        fourfold.quantize(model, to, RECIPE, forward_loop=loop, calibration=["x.jsonl"])
    with pytest.raises(fourfold.ObservationError, match="never called"):
        fourfold.quantize(model, to, RECIPE, forward_loop=lambda model: None)
    assert not to.exists()


def test_offloaded_to_disk_by_accelerate(streamed, tmp_path: Path) -> None:
    folder, out, batches = streamed("gpt_oss")
    model = offloaded("gpt_oss", folder, tmp_path)
    result = fourfold.quantize(
        model, tmp_path / "out", RECIPE, forward_loop=loop_over(batches), runtime=Runtime(threads=2)
    )
    assert result.clean, str(result.report)
    assert differences(out, tmp_path / "out") == []


def test_offloaded_undecorated_experts(written: Written, tmp_path: Path) -> None:
    folder = written("llama4")[0]
    ids = ids_file(tmp_path)
    assert fourfold.quantize(
        folder, tmp_path / "a", RECIPE, **flat(calib=[ids], threads=1, **SIZES)
    ).clean
    model = offloaded("llama4", folder, tmp_path)
    loop = loop_over(batches_of(folder, ids))
    assert fourfold.quantize(
        model, tmp_path / "b", RECIPE, forward_loop=loop, runtime=Runtime(threads=1)
    ).clean
    assert differences(tmp_path / "a", tmp_path / "b") == []


def offloaded(name: str, folder: Path, tmp_path: Path) -> Any:
    import transformers

    model_class = getattr(transformers, FAMILIES[name].model_class)
    with quiet():
        model = model_class.from_pretrained(
            folder, dtype=torch.bfloat16, device_map={"": "disk"}, offload_folder=tmp_path / "off"
        )
    assert all(parameter.is_meta for parameter in model.parameters())
    return model.eval()


def test_a_loop_that_goes_on_from_its_own_cache(streamed, tmp_path: Path) -> None:
    """Half a text, then the other half with the keys of the first: as if it were one."""
    folder, _, batches = streamed("qwen3_moe")
    ids = batches[0].input_ids

    def whole(model: Any) -> None:
        model(input_ids=ids)

    def halves(model: Any) -> None:
        first = model(ids[:, :12], use_cache=True)
        model(input_ids=ids[:, 12:], past_key_values=first.past_key_values)

    found = {}
    for name, loop in (("whole", whole), ("halves", halves)):
        model, _ = read_back(FAMILIES["qwen3_moe"], folder, dtype=torch.float32)
        result = fourfold.quantize(
            model, tmp_path / name, RECIPE, forward_loop=loop, runtime=Runtime(threads=1)
        )
        assert result.clean
        found[name] = result.statistics
    assert found["halves"].data.tokens == found["whole"].data.tokens
    for path, experts in found["whole"].experts.items():
        assert torch.equal(experts.tokens, found["halves"].experts[path].tokens)
    near = pytest.approx(found["whole"].kv["model.layers.2"], rel=1e-4)  # sums of another order
    assert found["halves"].kv["model.layers.2"] == near


def test_masks_that_are_given_by_position(streamed, tmp_path: Path) -> None:
    folder, _, batches = streamed("qwen3_moe")
    ids, mask = batches[0].input_ids, torch.ones_like(batches[0].input_ids)
    mask[:, 10:] = 0
    found = []
    for number, loop in enumerate(
        (
            lambda model: model(ids, mask),
            lambda model: model(input_ids=ids, attention_mask=mask),
        )
    ):
        model, _ = read_back(FAMILIES["qwen3_moe"], folder)
        result = fourfold.quantize(
            model, tmp_path / str(number), RECIPE, forward_loop=loop, runtime=Runtime(threads=1)
        )
        found.append(result.statistics.to_bytes())
        assert result.statistics.data.tokens == int(mask.sum())
    assert found[0] == found[1]


def test_pads_without_a_mask_are_no_tokens(streamed, tmp_path: Path) -> None:
    """Where the end of text serves as pad, and the loop gives no mask."""
    folder, _, batches = streamed("qwen3_moe")
    ids, mask = batches[0].input_ids.clone(), torch.ones_like(batches[0].input_ids)
    ids[:, 10:], mask[:, 10:] = 95, 0
    summaries = []
    for number, arguments in enumerate(({}, {"attention_mask": mask})):
        model, _ = read_back(FAMILIES["qwen3_moe"], folder)
        model.generation_config.eos_token_id = 95

        def loop(model: Any, arguments: dict[str, Any] = arguments) -> None:
            model(input_ids=ids, **arguments)

        result = fourfold.quantize(
            model, tmp_path / str(number), RECIPE, forward_loop=loop, runtime=Runtime(threads=1)
        )
        summaries.append((result.statistics.data, result.unreached_experts))
    assert summaries[0] == summaries[1]
    assert summaries[0][0].tokens == ids[:, :10].numel()


@pytest.mark.parametrize(
    ("loop", "words"),
    [
        (lambda model: model(torch.ones(1, 8).long(), torch.ones(1, 1, 8, 8)), "attention_mask"),
        (lambda model: model.model(torch.ones(1, 8).long()), "not a part of it"),
        (lambda model: model(inputs_embeds=torch.zeros(1, 8, 64).bfloat16()), "input_ids"),
    ],
)
def test_loops_that_hide_the_text(loop: Any, words: str, streamed, tmp_path: Path) -> None:
    model, _ = read_back(FAMILIES["qwen3_moe"], streamed("qwen3_moe")[0])
    with pytest.raises(fourfold.ObservationError, match=words):
        fourfold.quantize(model, tmp_path / "out", RECIPE, forward_loop=loop)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", [pytest.param("qwen3_omni_moe", marks=pytest.mark.slow), "switch_transformers"]
)
def test_calibration_data_for_models_that_are_called_otherwise(
    name: str, written: Written, tmp_path: Path
) -> None:
    folder, ids = written(name)[0], ids_file(tmp_path)
    recipe = "nvfp4_experts_only"
    options = {"calib": [ids], "threads": 1, **SIZES}
    assert fourfold.quantize(folder, tmp_path / "a", recipe, **flat(**options)).clean
    model, _ = read_back(FAMILIES[name], folder)
    assert fourfold.quantize(model, tmp_path / "b", recipe, **flat(**options)).clean
    assert differences(tmp_path / "a", tmp_path / "b") == []
    one, other = (tmp_path / x / "calibration.safetensors" for x in "ab")
    assert one.read_bytes() == other.read_bytes()


SLOW = ("nan", "sync", "plan")
FAILURES = ["loop", *(pytest.param(failure, marks=pytest.mark.slow) for failure in SLOW)]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_rank_that_fails_takes_the_others_with_it(failure: str, streamed, tmp_path: Path) -> None:
    """With its error, which no rank has from a time-out, and nothing is left of OUT."""
    folder, _, batches = streamed("qwen3_moe")
    torch.save([(each.input_ids, each.attention_mask) for each in batches], tmp_path / "batches")
    run_on_ranks(2, run_failing, failure, folder, tmp_path)
    texts = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert all(FAILURE_WORDS[failure] in text for text in texts), texts
    assert not (tmp_path / "out").exists()


FAILURE_WORDS = {"loop": "enough", "nan": "NaN or Inf", "sync": "disk", "plan": "no such"}


def run_failing(rank: int, failure: str, folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=2
    )
    try:
        failing(rank, failure, folder, tmp_path)
    except Exception as error:
        (tmp_path / f"rank{rank}").write_text(str(error))
    leave_together(2, tmp_path)


def failing(rank: int, failure: str, folder: Path, tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    from fourfold.run import preflight
    from fourfold.storage.shard_file import ShardFile

    model, _ = read_back(FAMILIES["qwen3_moe"], folder)
    fully_shard(model)
    batches = [Batch(*pair) for pair in torch.load(tmp_path / "batches")]

    def loop(model: Any) -> None:
        loop_over(tuple(batches[rank::2]))(model)
        if failure == "loop" and rank == 1:
            raise RuntimeError("enough")

    def broken(*_: Any, **__: Any) -> None:
        raise fourfold.OutputError("disk: no such luck")

    if failure == "sync" and rank == 0:
        ShardFile.finish = broken  # type: ignore[method-assign]
    if failure == "plan" and rank == 1:
        preflight.check_room = broken
    if failure == "nan" and rank == 1:
        norm = next(x for path, x in model.named_modules() if path.endswith("1.input_layernorm"))
        norm.register_forward_hook(lambda _, __, output: output * torch.inf)
    fourfold.quantize(
        model, tmp_path / "out", RECIPE, forward_loop=loop, runtime=Runtime(threads=1)
    )


def test_sharded_by_fsdp2_over_two_ranks(streamed, tmp_path: Path) -> None:
    folder, out, batches = streamed("qwen3_moe")
    torch.save([(each.input_ids, each.attention_mask) for each in batches], tmp_path / "batches")
    run_on_ranks(2, run_rank, "qwen3_moe", folder, tmp_path)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["", ""]
    assert differences(out, tmp_path / "out") == []


def run_rank(rank: int, name: str, folder: Path, tmp_path: Path) -> None:
    """One of two ranks; what went wrong goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=2
    )
    (tmp_path / f"rank{rank}").write_text(sharded(rank, name, folder, tmp_path))
    leave_together(2, tmp_path)


def sharded(rank: int, name: str, folder: Path, tmp_path: Path) -> str:
    from torch.distributed.fsdp import fully_shard

    model, _ = read_back(FAMILIES[name], folder)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    mine = [Batch(*pair) for pair in torch.load(tmp_path / "batches")][rank::2]
    result = fourfold.quantize(
        model,
        tmp_path / "out",
        RECIPE,
        forward_loop=loop_over(tuple(mine)),
        runtime=Runtime(threads=1),
    )
    if rank == 0 and not (result.clean and result.statistics.data.samples == 12):
        return str(result)
    try:
        fourfold.quantize(model, tmp_path / "out", RECIPE, forward_loop=loop_over(tuple(mine)))
    except fourfold.OutputError:
        return ""
    return "a second run was not refused"
