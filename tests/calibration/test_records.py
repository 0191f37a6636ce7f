# SPDX-License-Identifier: Apache-2.0
"""Proves that the forms of records that people have reach the model whole, or end in an error.

Chats in every known form give what their plain form gives. What a chat template does not show is
handed over in another way, or the record is refused with its file and line. Files may be
compressed, JSON may be an array, and a file in another encoding is named as such before a plan is
made.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

import fourfold
from fourfold.calibration.data import load_calibration
from fourfold.cli.progress import CommandDisplay
from fourfold.config import CalibrationConfig
from fourfold.embedded import model_dir
from fourfold.errors import CalibrationError
from fourfold.events import DataLoaded, Event

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
STRINGS_ONLY = (  # as Qwen3's: what is no string is nothing
    "{% for m in messages %}<{{ m.role }}>{{ m.content if m.content is string else '' }}"
    "{% endfor %}"
)
PARTS_ONLY = (  # as of some multimodal models: what is no list of parts is nothing
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}"
    "{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)
CALLS = (
    "{% for t in tools or () %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content }}{% for c in m.tool_calls or () %}[{{ c.function.name }}"
    "{% for k, v in c.function.arguments | items %} {{ k }}={{ v }}{% endfor %}]"
    "{% endfor %}{% endfor %}"
)
JSON_CALLS = (  # as DeepSeek's: arguments are a string, and content beside a call is null
    "{% for m in messages %}<{{ m.role }}>{% if m.content is none %}{% for c in m.tool_calls %}"
    "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}"
)
LAST_REASONING = (  # as Qwen3's: the reasoning of the last turn alone
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.reasoning_content %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
)

USER = {"role": "user", "content": "What is 2 × 3?"}
ANSWER = {"role": "assistant", "content": "It is 6."}
CHAT = "<user>What is 2 × 3?<assistant>It is 6."


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "mul", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]} | more


@pytest.fixture
def rendered(tmp_path: Path) -> Callable[..., str]:
    """Template and record -> the text that the model reads, by the embedded byte tokenizer."""

    def render(template: str, record: dict[str, Any], suffix: str = "jsonl") -> str:
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model_dir() / file, tmp_path)
        (tmp_path / "chat_template.jinja").write_text(template)
        path = tmp_path / f"data.{suffix}"
        if suffix == "parquet":
            parquet.write_table(pa.Table.from_pylist([record]), path)
        else:
            path.write_text(json.dumps(record))
        return read(tmp_path, path)

    return render


def read(folder: Path, path: Path) -> str:
    """The text of the first document, whole."""
    config = CalibrationConfig(path, calib_seq=4096, packing="padded")
    batch = load_calibration(folder, config, vocab_size=320).batches[0]
    return bytes(batch.input_ids[0][batch.attention_mask[0].bool()].tolist()).decode()


# --- forms of chats -----------------------------------------------------------------------

PART = {"type": "text", "text": "What is 2 × 3?"}
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "messages in a string": {"messages": json.dumps([USER, ANSWER])},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "What is 2 × 3?"},
            {"from": "gpt", "value": "It is 6."},
        ]
    },
    "ShareGPT under another key": {
        "messages": [{"from": "user", "value": "What is 2 × 3?"}, ANSWER]
    },
    "conversations with roles": {"conversations": [USER, ANSWER]},
    "TRL": {"prompt": [USER], "completion": [ANSWER]},
    "parts": {"messages": [{"role": "user", "content": [PART]}, ANSWER]},
    "a part alone": {"messages": [{"role": "user", "content": PART}, ANSWER]},
    "parts of the responses API": {
        "messages": [{"role": "user", "content": [PART | {"type": "input_text"}]}, ANSWER]
    },
    "null keys": {"messages": [USER | {"tool_calls": None, "name": None}, ANSWER], "tools": None},
    "empty keys": {"messages": [USER | {"tool_calls": []}, ANSWER], "tools": []},
}


MIXED = {"ShareGPT under another key", *(form for form in FORMS if "part" in form)}
"""Forms whose objects differ in type, which a column of Parquet cannot hold."""


@pytest.mark.parametrize(
    ("form", "suffix"),
    [(form, "jsonl") for form in FORMS]
    + [(form, "parquet") for form in FORMS if form not in MIXED],
)
def test_every_form_of_a_chat_gives_the_same(form: str, suffix: str, rendered) -> None:
    assert rendered(PLAIN, FORMS[form], suffix) == CHAT


def test_parts_in_parquet(rendered) -> None:
    parts = [{"type": "text", "text": "one", "image_url": None}]
    record = {"messages": [{"role": "user", "content": parts}]}
    assert rendered(STRINGS_ONLY, record, "parquet") == "<user>one"


@pytest.mark.parametrize("form", ["messages", "parts", "ShareGPT"])
@pytest.mark.parametrize("template", [PLAIN, STRINGS_ONLY, PARTS_ONLY])
def test_content_is_handed_over_as_the_template_takes_it(
    template: str, form: str, rendered
) -> None:
    assert rendered(template, FORMS[form]) == CHAT


def test_parts_are_joined_by_line_breaks(rendered) -> None:
    parts = [{"type": "text", "text": "one"}, "two"]
    assert rendered(STRINGS_ONLY, {"messages": [{"role": "user", "content": parts}]}) == (
        "<user>one\ntwo"
    )


def test_a_system_prompt_beside_conversations_comes_first(rendered) -> None:
    record = FORMS["ShareGPT"] | {"system": "Be brief."}
    assert rendered(PLAIN, record) == "<system>Be brief." + CHAT


@pytest.mark.parametrize(
    "message",
    [
        call({"a": 2, "b": "x"}),
        call('{"a": 2, "b": "x"}'),
        call('{"a": 2, "b": "x"}', content=None),
        {"role": "assistant", "function_call": {"name": "mul", "arguments": '{"a": 2, "b": "x"}'}},
        {"from": "function_call", "value": '{"name": "mul", "arguments": {"a": 2, "b": "x"}}'},
    ],
)
def test_arguments_of_a_call_are_handed_over_as_the_template_takes_them(
    message: dict[str, Any], rendered
) -> None:
    record = {"messages": [USER, message]}
    assert rendered(CALLS, record) == "<user>What is 2 × 3?<assistant>[mul a=2 b=x]"
    assert rendered(JSON_CALLS, record) == ('<user>What is 2 × 3?<assistant>mul {"a": 2, "b": "x"}')


def test_tools_may_be_a_string(rendered) -> None:
    tool = {"type": "function", "function": {"name": "mul"}}
    for tools in (tool, json.dumps(tool)):
        for value in ([tools], json.dumps([tools])):
            record = {"messages": [USER], "tools": value}
            assert rendered(CALLS, record) == json.dumps(tool) + "<user>What is 2 × 3?"


def test_rows_of_parquet_have_none_of_the_keys_of_others(rendered) -> None:
    """One struct type for all arguments gives every call the keys of all calls."""
    record = {"messages": [call({"a": 2, "b": None}, content="x"), call({"b": 3}, content="y")]}
    record = {"messages": [m | {"extra": None} for m in record["messages"]]}
    text = rendered(CALLS, record, "parquet")
    assert text == "<assistant>x[mul a=2]<assistant>y[mul b=3]"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_found_under_any_name(key: str, rendered) -> None:
    record = {"messages": [USER, ANSWER | {key: "2 and 2 and 2"}]}
    assert rendered(LAST_REASONING, record) == (
        "<user>What is 2 × 3?<assistant><think>2 and 2 and 2</think>It is 6."
    )


def test_reasoning_of_earlier_turns_may_be_left_out_as_in_use(rendered) -> None:
    first = ANSWER | {"reasoning_content": "2 and 2 and 2"}
    record = {"messages": [USER, first, {"role": "user", "content": "Sure?"}, ANSWER]}
    assert rendered(LAST_REASONING, record) == CHAT + "<user>Sure?<assistant>It is 6."


def test_what_is_said_beside_an_earlier_call_may_be_left_out_as_in_use(rendered) -> None:
    template = (  # as gpt-oss's: it is reasoning
        "{% for m in messages %}{{ m.content if loop.last or not m.tool_calls }}"
        "{% for c in m.tool_calls or () %}[{{ c.function.name }}]{% endfor %}{% endfor %}"
    )
    record = {"messages": [USER, call({}, content="Let me see."), ANSWER]}
    assert rendered(template, record) == "What is 2 × 3?[mul]It is 6."
    with pytest.raises(CalibrationError, match=r"leaves out the content of message 2"):
        rendered(template.replace("loop.last or ", ""), record)


# --- what is refused ----------------------------------------------------------------------

REFUSED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "a role that the template has no branch for": (
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}",
        [USER, {"role": "tool", "content": "6"}],
        r"leaves out the content of message 2 \(tool\)\. Remove it from the record, or give",
    ),
    "a turn that repeats another": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        [USER, USER | {"role": "assistant"}],
        r"leaves out the content of message \d",
    ),
    "only the first message": ("{{ messages[0].content }}", [USER, ANSWER], "message 2"),
    "tool calls": (PLAIN, [USER, call({"a": 2}, content="x")], "leaves out the tool call mul of"),
    "arguments": (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or () %}"
        "{{ c.function.name }}{% endfor %}{% endfor %}",
        [USER, call({"factor": 7})],
        r"leaves out arguments of the tool call mul of message 2",
    ),
    "nested arguments, printed as Python prints them": (
        CALLS, [USER, call({"a": {"b": "c"}})], "leaves out arguments of the tool call mul",
    ),
    "reasoning": (
        PLAIN, [USER, ANSWER | {"reasoning": "because"}], r"leaves out the reasoning of message 2",
    ),
    "reasoning within the content": (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
        [USER, ANSWER | {"content": "<think>because</think>It is 6."}],
        r"leaves out the reasoning of message 2",
    ),
    "an image": (
        PLAIN,
        [{"role": "user", "content": [PART, {"type": "image_url", "image_url": {"url": "x"}}]}],
        r"message 1: has a part of type image_url, and calibration reads text only",
    ),
    "content that is a number": (PLAIN, [USER | {"content": 6}], "its content has the type int"),
    "null content": (PLAIN, [USER | {"content": None}], "message 1: has neither content nor"),
    "a call that half of the presentations break on": (
        JSON_CALLS.replace("c.function.name + ' ' + ", ""), [USER, call({"a": 2})],
        "leaves out the tool call mul of message 2",
    ),
    "a call without a name": (
        PLAIN, [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}],
        "message 2: tool_calls is not a list of objects with a function's name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_template_would_swallow_is_refused(what: str, rendered) -> None:
    template, messages, message = REFUSED[what]
    with pytest.raises(CalibrationError, match=message) as caught:
        rendered(template, {"messages": messages})
    assert str(caught.value).startswith("data.jsonl, line 1: ")
    assert "because" not in str(caught.value)  # none of the user's text


def test_tools_that_a_template_does_not_show_are_refused(rendered) -> None:
    with pytest.raises(CalibrationError, match=r"line 1: .* leaves out the tool mul\."):
        rendered(PLAIN, {"messages": [USER], "tools": '[{"function": {"name": "mul"}}]'})


def test_turns_that_say_nothing_are_no_text(rendered) -> None:
    with pytest.raises(CalibrationError, match="contains no text"):
        rendered(PLAIN, {"messages": [USER | {"content": " "}]})


def test_a_mixed_prompt_is_no_text(rendered) -> None:
    with pytest.raises(CalibrationError, match="line 1: prompt has the type list"):
        rendered(PLAIN, {"prompt": [USER], "completion": "It is 6."})
    with pytest.raises(CalibrationError, match="line 1: text has the type list"):
        rendered(PLAIN, {"text": ["It is 6."]})


# --- files --------------------------------------------------------------------------------

TEXT = "Eine Zeile über 日本. " * 8
LINES = [{"text": TEXT}, {"text": "zwei"}]
ARRAYS = {
    "compact": json.dumps(LINES),
    "pretty": "\n " + json.dumps(LINES, indent=2, ensure_ascii=False) + "\n\n",
    "of strings": json.dumps([TEXT, "zwei"]),
    "marked": "\ufeff" + json.dumps(LINES),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_a_json_array_is_read_item_by_item(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.json"
    path.write_text(ARRAYS[what], "utf-8")
    config = CalibrationConfig(path, calib_seq=4096, packing="padded")
    assert load_calibration(model_dir(), config, vocab_size=320).samples == 2


def test_a_long_array_is_read_in_pieces(tmp_path: Path) -> None:
    """Items lie across the ends of pieces, and no more is read than is needed."""
    items = [{"text": f"{n} " + "x" * (n * 997 % 5000)} for n in range(200)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(items)[:-1] + ",\n oh no")
    config = CalibrationConfig(path, calib_size=40, calib_seq=8192, packing="padded")
    data = load_calibration(model_dir(), config, vocab_size=320)
    assert data.samples == 40
    with pytest.raises(CalibrationError, match=r"data\.json, item 201, line 2: is not JSON"):
        load_calibration(
            model_dir(),
            CalibrationConfig(path, calib_size=60, packing="padded", calib_seq=64),
            vocab_size=320,
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}', r"item 1, line 1: is not JSON \(Expecting '\]'"),
        ('[{"text": "a"},]', r"item 2, line 1: is not JSON"),
        ('[{"text": "a"}\n{"text": "b"}]', r"is not JSON \(Expecting '\]'"),
        ('[{"text": "a"}]\n{"text": "b"}', r"line 2: is not the end, although its JSON array"),
        ('[{"text": "a"},\n5]', r"item 2, line 2: contains a JSON int"),
        ('[{"text": "a"},\n\n{"question": 1}]', r"item 2, line 3: has question\. Give text"),
        ("[" * 100_000, r"line 1: is not JSON"),
    ],
)
def test_a_broken_array_is_named_by_item_and_line(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        read(model_dir(), path)


def _zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a"])
@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", _zstd)],
)
def test_compressed_files_are_read_as_what_they_hold(
    name: str, suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    content = {"a.jsonl": json.dumps(LINES[0]), "a.json": ARRAYS["compact"]}.get(name, TEXT)
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(compress(content.encode()))
    assert read(model_dir(), path) in (TEXT, "zwei")
    path.write_bytes(compress(TEXT.encode() * 10_000)[:-20])
    with pytest.raises(CalibrationError, match=r"cannot be (decompressed|read) \("):
        read(model_dir(), path)


ENCODINGS = {
    "Latin-1": (TEXT.replace("日本", "").encode("latin-1"), "probably Latin-1 or Windows-1252"),
    "Latin-1, late": (b"x" * 5000 + b"\xfcber", "probably Latin-1 or Windows-1252"),
    "UTF-16": (TEXT.encode("utf-16"), "probably UTF-16"),
    "UTF-16, unmarked": (b"plain".decode().encode("utf-16-le") * 9, "probably UTF-16"),
    "UTF-32": (TEXT.encode("utf-32"), "probably UTF-32"),
    "GB18030": ("日本語の文章です。".encode("gb18030") * 9, "probably GB18030, Shift-JIS"),
    "binary": (b"\x93NUMPY\x01\x00" + bytes(range(7, 250)), r"is not text \(it contains zero"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("what", ENCODINGS)
def test_another_encoding_is_named(what: str, name: str, tmp_path: Path) -> None:
    content, message = ENCODINGS[what]
    if name.startswith("a.json"):
        content = content if what not in ("Latin-1", "GB18030") else b'{"text": "' + content
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(CalibrationError, match=message):
        read(model_dir(), path)


# --- before the plan, and what is printed -------------------------------------------------

BROKEN = {
    "missing": ("nowhere.jsonl", None, "no such file"),
    "Latin-1": ("a.txt", b"\xfcber", "Latin-1"),
    "no known key": ("a.jsonl", b'{"question": 1}', "a.jsonl, line 1: has question"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_calibration_data_is_looked_at_before_the_plan(what: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[what]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    events: list[Event] = []
    out = tmp_path / "out"
    for calibration in (
        CalibrationConfig(tmp_path / name),
        CalibrationConfig(statistics=tmp_path / "nowhere.safetensors"),
    ):
        with pytest.raises(CalibrationError, match=f"{message}|nowhere.safetensors: no such"):
            fourfold.quantize(
                model_dir(),
                out,
                "nvfp4_experts_only",
                calibration=calibration,
                on_event=events.append,
            )
    assert events == []
    assert not out.exists()


def test_the_users_text_is_printed_only_if_wished(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = DataLoaded(8, 32, 250, "mine.txt", is_embedded=False, beginning="a secret")
    with CommandDisplay("heading", quiet=False) as display:
        display(loaded)
    printed = capsys.readouterr().out
    assert "calibrating on 8 samples of 32 tokens from mine.txt" in printed
    assert "secret" not in printed
    with CommandDisplay("heading", quiet=False, show_data=True) as display:
        display(loaded)
    assert "the first begins: a secret …" in capsys.readouterr().out
