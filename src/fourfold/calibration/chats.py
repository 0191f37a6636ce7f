# SPDX-License-Identifier: Apache-2.0
"""Chats: the forms in which records hold them, and whether a template has rendered all of one.

    record ──▶ Chat ──▶ presentations ──▶ the model's chat template ──▶ left_out
               one form   ways to hand it over, until a template shows all of it

**One form.** Messages have a role, and content as one string; the text parts of a list are joined
by line breaks, as engines do for templates that take strings. Arguments of tool calls are objects.

**Presentations.** Templates differ in what they read: content as a string or as parts, null or an
empty string beside tool calls, and arguments as an object or as JSON. What a template does not read
it prints as nothing, or as Python prints it, without an error.

**Left out.** Contents, reasoning, and names and arguments of tool calls must all be in the rendered
text, each as often as the chat has it. Space does not count, and strings may be escaped as in JSON.
Many templates show the reasoning of the last turn alone, as the model sees it in use: the reasoning
of an earlier turn may be missing if it is shown where the chat ends with that turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from fourfold.calibration.readers import Record
from fourfold.errors import CalibrationError

TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
"""The types of content parts that hold text."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The keys under which templates look for the reasoning of a message."""

THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>", re.DOTALL)
"""Reasoning within the content, which templates know how to take apart."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
"""ShareGPT's names of roles, and OpenAI's older name of the role `tool`."""

PRINTED_PARTS = "[{'type': 'text', 'text': "
"""How Python prints a list of parts."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """Messages in one form, and the tools that they may call."""

    messages: list[Message]
    """Each with `role`, and a string or None as `content`."""
    tools: list[Any] | None

    @property
    def is_blank(self) -> bool:
        """True if no message says anything."""
        return not any(text.strip() for i in range(len(self.messages)) for _, text in self.texts(i))

    def texts(self, number: int) -> list[tuple[str, str]]:
        """Return the content and the reasoning of a message, each with its name."""
        message = self.messages[number]
        content = message["content"] or ""
        thought = THOUGHT.match(content)
        named = [("content", content[thought.end() :] if thought else content)]
        named += [("reasoning", thought[1])] if thought else []
        named += [("reasoning", _reasoning(message))]
        named += [(f"tool call {_name(call)}", _name(call)) for call in _calls(message)]
        return [(name, text) for name, text in named if isinstance(text, str)]


# --- the forms of a record ----------------------------------------------------------------


def is_trl(content: Mapping[str, Any]) -> bool:
    """True if `prompt` and `completion` of a record are lists of messages, as TRL has them."""
    return isinstance(content.get("prompt"), list) and isinstance(content.get("completion"), list)


def holds_chat(content: Mapping[str, Any]) -> bool:
    """True if a record has `messages`, `conversations`, or TRL's lists of messages."""
    return is_trl(content) or bool(content.keys() & {"messages", "conversations"})


def read_chat(record: Record) -> Chat:
    """Return the chat of a record in one form.

    Raises:
        CalibrationError: It is not a list of messages, or has a part that is not text.
    """
    content = record.content
    key = next((k for k in ("messages", "conversations") if k in content), "prompt")
    messages = _parsed(content[key])
    if key == "prompt":
        messages = messages + content["completion"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise _not_messages(record, key)
    chat = [_message(record, key, n, message) for n, message in enumerate(messages, start=1)]
    system = content.get("system")
    if key == "conversations" and isinstance(system, str) and system.strip():
        chat.insert(0, {"role": "system", "content": system})
    return Chat(chat, _tools(record))


def _not_messages(record: Record, key: str) -> CalibrationError:
    return CalibrationError(
        f"{record.where}: {key} is not a list of objects with role and content. "
        'Write [{"role": "user", "content": "…"}, …].'
    )


def _parsed(value: Any) -> Any:
    """Return what a string of JSON holds; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _message(record: Record, key: str, number: int, raw: Message) -> Message:
    where = f"{record.where}: message {number}"
    message = {k: value for k, value in raw.items() if value is not None}
    if "role" not in message and "from" in message:
        message = {"role": message.pop("from"), "content": message.pop("value", None)} | message
    role = message.get("role")
    if not isinstance(role, str):
        raise _not_messages(record, key)
    message["role"] = ROLES.get(role, role) if "from" in raw or role == "function" else role
    content = _content(where, message)
    calls = message.pop("tool_calls", None) or []
    if role == "function_call":  # ShareGPT's turn that is nothing but a call
        message["role"], calls, content = "assistant", [_parsed(content)], None
    if "function_call" in message:  # OpenAI's older form
        calls = [message.pop("function_call")]
    if calls:
        message["tool_calls"] = _tool_calls(where, calls)
    elif content is None and not message.keys() & set(REASONING):
        raise CalibrationError(
            f"{where}: has neither content nor tool_calls. Write them, or leave the message out."
        )
    return message | {"content": content}


def _content(where: str, message: Message) -> str | None:
    content = message.get("content")
    if isinstance(content, dict):
        if message["role"] == "tool":
            return json.dumps(content, ensure_ascii=False)
        content = [content]
    if isinstance(content, list):
        return "\n".join(_part_text(where, part) for part in content)
    if content is None or isinstance(content, str):
        return content
    kind = type(content).__name__
    raise CalibrationError(f"{where}: its content has the type {kind}. Write a string.")


def _part_text(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") or "text" if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if kind in TEXT_PARTS else None
    if not isinstance(text, str):
        raise CalibrationError(
            f"{where}: has a part of type {kind}, and calibration reads text only. Leave the part "
            'out, or write {"type": "text", "text": "…"}.'
        )
    return text


def _tool_calls(where: str, calls: Any) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(c, dict) and _name(c) for c in calls):
        raise CalibrationError(
            f"{where}: tool_calls is not a list of objects with a function's name. "
            'Write [{"type": "function", "function": {"name": "…", "arguments": {}}}].'
        )
    calls = [call if "function" in call else {"function": call} for call in calls]
    return [
        {"type": "function"}
        | call
        | {"function": call["function"] | {"arguments": _arguments(call["function"])}}
        for call in calls
    ]


def _arguments(function: Mapping[str, Any]) -> Any:
    """Return the arguments as an object, unless they are no string of JSON that holds one."""
    arguments = function.get("arguments") or {}
    parsed = _parsed(arguments)
    return parsed if isinstance(parsed, dict) else arguments


def _calls(message: Message) -> list[Any]:
    calls: list[Any] = message.get("tool_calls", [])
    return calls


def _reasoning(message: Message) -> Any:
    return next((message[key] for key in REASONING if key in message), None)


def _name(tool: Any) -> str:
    """Return the name of a tool or of a tool call; an empty string if it has none."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _tools(record: Record) -> list[Any] | None:
    tools = _parsed(record.content.get("tools"))
    tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else tools
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise CalibrationError(
            f"{record.where}: tools is not a list of objects. Correct it, or leave it out."
        )
    return tools or None


# --- presentations ------------------------------------------------------------------------


def presentations(chat: Chat) -> Iterator[list[Message]]:
    """Yield the messages in the ways that templates want them, the usual one first."""

    def choices(is_a_choice: bool) -> tuple[bool, ...]:
        return (False, True) if is_a_choice else (False,)

    calls = [call for message in chat.messages for call in _calls(message)]
    for as_parts, keeps_null, as_json in product(
        (False, True),
        choices(any(message["content"] is None for message in chat.messages)),
        choices(any(isinstance(call["function"]["arguments"], dict) for call in calls)),
    ):
        yield [_presented(message, as_parts, keeps_null, as_json) for message in chat.messages]


def _presented(message: Message, as_parts: bool, keeps_null: bool, as_json: bool) -> Message:
    content = message["content"]
    if content is None and not keeps_null:
        content = ""
    if as_parts and content is not None:
        content = [{"type": "text", "text": content}] if content else []
    presented = message | {"content": content} | dict.fromkeys(REASONING, _reasoning(message))
    if as_json and "tool_calls" in message:
        presented["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": _as_json(call["function"])}}
            for call in message["tool_calls"]
        ]
    return {key: value for key, value in presented.items() if value is not None or key == "content"}


def _as_json(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


# --- what a template has left out ---------------------------------------------------------


@dataclass(frozen=True)
class Omission:
    """Something that is not in the rendered text."""

    what: str
    """For instance "the content of message 2 (user)"."""
    turn: int | None = None
    """The position from 0 of its message, if templates may show it in the last turn alone."""


def left_out(chat: Chat, rendered: str) -> list[Omission]:
    """Return what a chat has and its rendered text has not, or has as Python prints it.

    Each piece is looked for in what the longer ones have left, so that equal ones are counted.
    """
    pieces: list[tuple[str, Omission]] = []
    omissions = [Omission("all but lists of parts")] if PRINTED_PARTS in rendered else []
    for number, message in enumerate(chat.messages):
        of = f"of message {number + 1} ({message['role']})"
        for name, text in chat.texts(number):
            # gpt-oss takes what is said beside a call for reasoning.
            is_of_turn = name == "reasoning" or (name == "content" and bool(_calls(message)))
            pieces.append((text, Omission(f"the {name} {of}", number if is_of_turn else None)))
        for call in _calls(message):
            omission = Omission(f"arguments of the tool call {_name(call)} {of}")
            arguments = call["function"]["arguments"]
            pieces += [(leaf, omission) for leaf in _leaves(arguments)]
            if any(_is_printed_by_python(value, rendered) for value in _containers(arguments)):
                omissions.append(omission)
    pieces += [(_name(tool), Omission(f"the tool {_name(tool)}")) for tool in chat.tools or ()]
    missing = _missing([text for text, _ in pieces], rendered)
    return omissions + [pieces[index][1] for index in missing]


def _missing(texts: list[str], rendered: str) -> list[int]:
    """Return the positions of the texts that are not in the rendered one."""
    remaining = _squeezed(rendered)
    missing = []
    for index in sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True):
        form = next((form for form in _forms(texts[index]) if form in remaining), None)
        if form is None:
            missing.append(index)
        elif form:
            remaining = remaining.replace(form, "\0", 1)
    return sorted(missing)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _forms(text: str) -> Iterator[str]:
    """Yield the forms in which a template may print a string."""
    yield _squeezed(text)
    yield _squeezed(json.dumps(text, ensure_ascii=False)[1:-1])
    yield _squeezed(json.dumps(text)[1:-1])
    if text in ("true", "false"):
        yield text.capitalize()


def _leaves(value: Any) -> Iterator[str]:
    """Yield the keys and values of arguments as they are in JSON, but for null."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield str(key)
            yield from _leaves(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _leaves(entry)
    elif value is not None:
        yield value if isinstance(value, str) else json.dumps(value)


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _containers(entry)


def _is_printed_by_python(value: Any, rendered: str) -> bool:
    printed = repr(value)
    return printed in rendered and printed != json.dumps(value, ensure_ascii=False)
