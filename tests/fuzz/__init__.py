# SPDX-License-Identifier: Apache-2.0
"""A seeded mutation fuzz: whatever is broken, a command ends clean and writes nowhere else.

    PYTHONPATH=tests python -m fuzz 1234          one case again, with its traceback; files are kept
    PYTHONPATH=tests python -m fuzz 1000 5000     a range of cases

A case is its seed: which checkpoint, what is run on it, and the one to three mutations before.

    values.py      odd values, and JSON-aware mutations of a document
    mutations.py   mutations of files: bytes, JSON, safetensors, recipes, what stands in a folder
    bases.py       the small checkpoints, and what a run made of them, before anything is broken
    cases.py       what a seed does, and the promise that it is held to
"""

from .bases import Bases, make_bases
from .cases import Broken, run_case

__all__ = ["Bases", "Broken", "make_bases", "run_case"]
