# SPDX-License-Identifier: Apache-2.0
"""Proves that lm-eval takes what `fourfold.load` gives, with the lines of docs/evaluation.md: its
log-likelihoods are those of the model, rounded activations included. Offline, on a task of our own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from .checkpoints import write_outputs

pytest.importorskip("lm_eval", reason='needs pip install "fourfold[lm-eval]"')
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets' own

PAGE = Path(__file__).parents[2] / "docs/evaluation.md"

TASK = """
task: bytes
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""

DOCS = [
    {"prompt": "import o", "choices": ["s\n", "zq"], "answer": 0},
    {"prompt": "def f(x):\n    retur", "choices": ["###", "n x"], "answer": 1},
    {"prompt": "class A:\n    def __init__(sel", "choices": ["f):", "99 "], "answer": 0},
]


def test_a_quantized_model_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, DOCS)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "bytes.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    _, out = write_outputs(tmp_path)
    [code] = re.findall(r"```python\n(import lm_eval.*?)```", PAGE.read_text(), re.DOTALL)
    code = code.replace('"out"', repr(str(out))).replace('"hellaswag"', '"bytes"')
    code = code.replace("simple_evaluate(", f"simple_evaluate(task_manager={manager(tasks)}, ")
    code = code.replace("=True)", "=True, dtype=torch.float32)")
    space: dict[str, Any] = {"torch": torch}
    exec(code, space)
    results, model = space["results"], space["model"]
    assert results["results"]["bytes"]["acc,none"] == 1.0
    assert model.fourfold_simulation.calls
    for sample, doc in zip(results["samples"]["bytes"], DOCS, strict=True):
        for choice, [[found, _]] in zip(doc["choices"], sample["resps"], strict=True):
            assert found == pytest.approx(log_likelihood(model, doc["prompt"], choice), abs=1e-4)


def manager(tasks: Path) -> str:
    return f"lm_eval.tasks.TaskManager(include_path={str(tasks)!r}, include_defaults=False)"


def log_likelihood(model: Any, prompt: str, choice: str) -> float:
    ids = torch.tensor([[*prompt.encode(), *choice.encode()]])
    with torch.no_grad():
        logp = model(ids).logits[0].float().log_softmax(-1)
    following = ids[0, len(prompt) :]
    return float(logp[len(prompt) - 1 : -1].gather(-1, following[:, None]).sum())
