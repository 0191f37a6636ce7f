"""Build the mixed text that calibrates when no `--calib` is given.

    python scripts/build_calibration_text.py unpack FOLDER     # every document as a file
    python scripts/build_calibration_text.py library FOLDER    # add excerpts of Python's library
    python scripts/build_calibration_text.py pack FOLDER       # write calibration.jsonl.gz

`calibration.jsonl.gz` is the only place where the documents lie. To change one: unpack, edit,
pack. A document's name is its kind and its file, `languages/ko.txt`; what ends in `.json` under
`dialogues/` is a chat. The documents were written for fourfold, but for `library/`: excerpts of
CPython (PSF-2.0), never of a file that the embedded model's held-out text is chosen from.

`pack` gives the same bytes for the same documents, with the same zlib.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sysconfig
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from train_embedded import read_corpus

PACKAGE_FOLDER = Path(__file__).resolve().parents[1] / "src" / "fourfold" / "embedded"
TEXT = PACKAGE_FOLDER / "calibration.jsonl.gz"

EXCERPT_CHARACTERS = 2_400

# Which file, and how far into it the excerpt begins.
MODULES = {
    "argparse.py": 0.3,
    "asyncio/queues.py": 0.1,
    "asyncio/timeouts.py": 0.0,
    "base64.py": 0.3,
    "bisect.py": 0.0,
    "calendar.py": 0.4,
    "contextlib.py": 0.4,
    "csv.py": 0.2,
    "dataclasses.py": 0.5,
    "difflib.py": 0.1,
    "fractions.py": 0.2,
    "graphlib.py": 0.1,
    "heapq.py": 0.2,
    "html/parser.py": 0.3,
    "http/client.py": 0.3,
    "inspect.py": 0.6,
    "json/decoder.py": 0.3,
    "mailbox.py": 0.4,
    "pathlib.py": 0.5,
    "random.py": 0.3,
    "shutil.py": 0.3,
    "sqlite3/dump.py": 0.1,
    "statistics.py": 0.5,
    "string.py": 0.3,
    "unittest/case.py": 0.4,
    "urllib/parse.py": 0.4,
}
HELP = "idlelib/help.html"  # its notice says: PSF licence
OTHER_FILES = {
    "idlelib/NEWS.txt": 0.4,
    HELP: 0.5,
    "test/math_testcases.txt": 0.3,
    "test/exception_hierarchy.txt": 0.0,
    "venv/scripts/common/Activate.ps1": 0.5,
    "venv/scripts/common/activate": 0.1,
}
HEADERS = {
    "abstract.h": 0.2,
    "cpython/listobject.h": 0.0,
    "cpython/unicodeobject.h": 0.3,
    "datetime.h": 0.3,
    "object.h": 0.2,
    "pyport.h": 0.4,
}
TOPICS = (
    "assignment", "binary", "class", "comparisons", "context-managers", "debugger", "exceptions",
    "formatstrings", "import", "numeric-types", "try", "typesmethods",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=["unpack", "library", "pack"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"unpack": unpack, "library": add_library, "pack": pack}[arguments.verb](arguments.folder)


def unpack(folder: Path) -> None:
    """Write every document to its file."""
    for line in gzip.decompress(TEXT.read_bytes()).decode("utf-8").splitlines():
        document = json.loads(line)
        _write(folder / document["name"], _as_file(document))


def pack(folder: Path) -> None:
    """Write all files below `folder` as documents, in the order of their names."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    documents = [_as_document(name, paths[name]) for name in sorted(paths) if paths[name].is_file()]
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    TEXT.write_bytes(gzip.compress(lines.encode("utf-8"), compresslevel=9, mtime=0))
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document["name"].partition("/")[0]] += len(_as_file(document).encode("utf-8"))
    for kind, size in sorted(sizes.items()):
        print(f"{kind:12} {size:8,} bytes")
    print(f"{'all':12} {sizes.total():8,} bytes in {len(documents)} documents")


def _as_file(document: dict[str, Any]) -> str:
    if "messages" in document:
        return json.dumps(document["messages"], ensure_ascii=False, indent=1) + "\n"
    return str(document["text"])


def _as_document(name: str, path: Path) -> dict[str, Any]:
    text = path.read_text("utf-8")
    if name.startswith("dialogues/"):
        return {"name": name, "messages": json.loads(text)}
    return {"name": name, "text": text}


def add_library(folder: Path) -> None:
    """Write excerpts of the standard library, the headers and the language reference."""
    paths = sysconfig.get_paths()
    library, headers = Path(paths["stdlib"]), Path(paths["include"])
    training = read_corpus(library).train  # without the files that are held out
    texts = {name: training[name].decode("utf-8") for name in MODULES}
    texts |= {name: (library / name).read_text("utf-8") for name in OTHER_FILES}
    texts |= {name: (headers / name).read_text("utf-8") for name in HEADERS}
    for name, at in (MODULES | OTHER_FILES | HEADERS).items():
        if name != HELP and ("opyright" in texts[name] or "icense" in texts[name]):
            raise SystemExit(f"{name}: has a notice of its own. Choose another file.")
        _write(folder / "library" / name, excerpt(texts[name], at))
    for name in TOPICS:
        _write(folder / "library" / "topics" / f"{name}.txt", excerpt(topics[name], 0.0))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def excerpt(text: str, at: float) -> str:
    """About `EXCERPT_CHARACTERS`, whole lines, from the first paragraph beyond `at` of the text."""
    start = 0 if at == 0 else text.index("\n\n", int(len(text) * at)) + 2
    stop = text.find("\n", start + EXCERPT_CHARACTERS) + 1
    return text[start : stop or len(text)]


if __name__ == "__main__":
    main()
