"""Records as token ids, by the tokenizer in the model's folder.

A text begins and ends as the tokenizer has it begin and end. `close` adds the end-of-text token,
where the tokenizer has one and has not put it there, so that documents can be joined. A chat
template closes its turns itself, and ids that are given are taken as they are.

Every id is checked against the embedding: an id without a row is an error here, with its record,
and not an access out of bounds in the first layer.
"""

from __future__ import annotations

from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

from fourfold.calibration.readers import Record
from fourfold.errors import CalibrationError, SourceError
from fourfold.models import tokenizer

TODAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    "|replace('%Y', '2026')|replace('%y', '26')|replace('%m', '01')|replace('%d', '01')"
    "|replace('%B', 'January')|replace('%b', 'Jan')|replace('%A', 'Thursday')"
    "|replace('%a', 'Thu')|replace('%H', '12')|replace('%M', '00')|replace('%S', '00')"
    " }}{%- endmacro -%}"
)
"""What chat templates that print the date are told: the same data on every day."""


NEEDS_NONE = "JSONL with input_ids needs none."


class Encoder:
    """Makes ids of records. Loads the tokenizer with the first record that needs one."""

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        trust_remote_code: bool = False,
        no_tokenizer: str | None = None,
    ) -> None:
        self._folder = folder
        self._no_tokenizer = no_tokenizer
        self._vocab_size = vocab_size
        self._trust_remote_code = trust_remote_code

    def encode(self, record: Record, close: bool) -> list[int]:
        """The ids of a record, each with a row in the embedding; empty for an empty text.

        A record with several forms is read by the first of `input_ids`, `messages`, `prompt` with
        `completion`, `text`; without a chat template, `messages` only where there is no other.
        """
        if "input_ids" in record.content:
            ids = _given_ids(record)
        elif "messages" in record.content and not self._plain_must_do(record):
            ids = self._chat(record)
        else:
            ids = self._text(record, close)
        self._check(record, ids)
        return ids

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the model's folder."""
        if self._no_tokenizer is not None:
            raise CalibrationError(f"{self._no_tokenizer} {NEEDS_NONE}")
        return load_tokenizer(self._folder, self._trust_remote_code)

    @property
    def loaded(self) -> Any:
        """The tokenizer, if a record needed it; else None."""
        return self.__dict__.get("tokenizer")

    @property
    def first(self) -> list[int]:
        """The token with which the tokenizer begins every text: one, or none."""
        if not self._has_tokenizer:
            return []
        begin = self.tokenizer.bos_token_id
        starts = begin is not None and _tokenize(self.tokenizer, "")[:1] == [begin]
        return [begin] if starts else []

    @property
    def pad(self) -> int:
        """The id to fill up with: pad, end of text or 0, the first that the embedding has."""
        known: list[int | None] = []
        if self._has_tokenizer:
            known = [self.tokenizer.pad_token_id, self.tokenizer.eos_token_id]
        return next((each for each in known if each is not None and each < self._vocab_size), 0)

    @property
    def _has_tokenizer(self) -> bool:
        return "tokenizer" in self.__dict__

    def _plain_must_do(self, record: Record) -> bool:
        return plain_text(record) is not None and not self.tokenizer.chat_template

    def _text(self, record: Record, close: bool) -> list[int]:
        text = plain_text(record)
        assert text is not None, "the readers let no other record through"
        if not text.strip():
            return []
        ids = _tokenize(self.tokenizer, text)
        end = self.tokenizer.eos_token_id
        if close and end is not None and ids[-1:] != [end]:
            ids.append(end)
        return ids

    def _chat(self, record: Record) -> list[int]:
        if record.content["messages"] == []:
            return []
        if not self.tokenizer.chat_template:
            raise CalibrationError(
                f"{record.where}: has messages, but the tokenizer in {self._folder} has no chat "
                "template. Give text, prompt and completion, or input_ids."
            )
        return _tokenize(self.tokenizer, self._rendered(record), add_special_tokens=False)

    def _rendered(self, record: Record) -> str:
        messages, tools = _chat_of(record)
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=TODAY + self.tokenizer.get_chat_template(tools=tools),
                tokenize=False,
            )
            text.encode()
        except Exception as error:  # a template is a program: it can fail in any way
            cause = " ".join(str(error).split())[:200] or type(error).__name__
            raise CalibrationError(
                f"{record.where}: the model's chat template does not take the messages: {cause}"
            ) from error
        return text

    def _check(self, record: Record, ids: list[int]) -> None:
        if not ids or (min(ids) >= 0 and max(ids) < self._vocab_size):
            return
        wrong = next(each for each in ids if not 0 <= each < self._vocab_size)
        given = "input_ids" in record.content
        cause = "The ids are" if given else f"The tokenizer in {self._folder} is"
        raise CalibrationError(
            f"{record.where}: token id {wrong} is outside the model's vocabulary (0 to "
            f"{self._vocab_size - 1}). {cause} another model's: use this model's own tokenizer."
        )


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder. `CalibrationError` where there is none that works."""
    try:
        return tokenizer.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except SourceError as error:
        raise CalibrationError(f"{error} {NEEDS_NONE}") from error


def plain_text(record: Record) -> str | None:
    """`prompt` and `completion`, one after the other, or `text`; None where it has neither."""
    for keys in (("prompt", "completion"), ("text",)):
        if record.content.keys() >= set(keys):
            return "".join(_string(record, key) for key in keys)
    return None


def _string(record: Record, key: str) -> str:
    value = record.content[key]
    if not isinstance(value, str):
        raise CalibrationError(
            f"{record.where}: {key} is a {type(value).__name__}, not a string. Write text there."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{record.where}: {key} is not Unicode ({error.reason} at character {error.start}). "
            "Take that character out."
        ) from None
    return value


def _chat_of(record: Record) -> tuple[list[Any], list[Any] | None]:
    """`messages` and `tools`. A template would print a missing role or content as nothing."""
    messages, tools = record.content["messages"], record.content.get("tools")
    fit = isinstance(messages, list) and all(
        isinstance(each, dict) and "role" in each and each.keys() & {"content", "tool_calls"}
        for each in messages
    )
    if not fit:
        raise CalibrationError(
            f"{record.where}: messages is not a list of objects with role and content. "
            'Write [{"role": "user", "content": "…"}, …].'
        )
    if tools is not None and not isinstance(tools, list):
        raise CalibrationError(
            f"{record.where}: tools is not a list of objects. Correct it, or leave it out."
        )
    return messages, tools


def _given_ids(record: Record) -> list[int]:
    """`input_ids`, without those that `attention_mask` masks."""
    ids = record.content["input_ids"]
    if not isinstance(ids, list) or any(type(each) is not int for each in ids):
        raise CalibrationError(
            f"{record.where}: input_ids is not a list of integers. Write the ids as one flat list."
        )
    mask = record.content.get("attention_mask", [1] * len(ids))
    if not isinstance(mask, list) or len(mask) != len(ids) or any(e not in (0, 1) for e in mask):
        raise CalibrationError(
            f"{record.where}: attention_mask is not a 0 or 1 for each of {len(ids)} input_ids. "
            "Correct it, or leave it out."
        )
    return list(compress(ids, mask))


def _tokenize(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Without the warning that a text is longer than the model: it will be cut."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    return list(encoded["input_ids"])
