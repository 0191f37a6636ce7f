# SPDX-License-Identifier: Apache-2.0
"""Turns records into token ids, with the tokenizer in the model's folder.

The tokenizer decides how a text begins and ends. `close` adds the end-of-text token, unless the
tokenizer has none or has added it itself, so that documents can be joined. Chat templates close
their turns themselves, and `input_ids` are not changed.

Every id is compared with the size of the embedding, so that an id without a row is an error that
names the record, and not an access out of bounds in the first layer.
"""

from __future__ import annotations

from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from fourfold.calibration.chats import (
    Chat,
    Message,
    Omission,
    holds_chat,
    is_trl,
    left_out,
    presentations,
    read_chat,
)
from fourfold.calibration.padding import text_mask
from fourfold.calibration.readers import Record
from fourfold.errors import CalibrationError, SourceError
from fourfold.models.tokenizer import load_tokenizer

TODAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    "|replace('%Y', '2026')|replace('%y', '26')|replace('%m', '01')|replace('%d', '01')"
    "|replace('%B', 'January')|replace('%b', 'Jan')|replace('%A', 'Thursday')"
    "|replace('%a', 'Thu')|replace('%H', '12')|replace('%M', '00')|replace('%S', '00')"
    " }}{%- endmacro -%}"
)
"""A fixed date for chat templates that print it, so that the data is the same on every day."""

NEEDS_NONE = "JSONL with input_ids needs none."


class Encoder:
    """Encodes records. The tokenizer is loaded with the first record that needs one."""

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        trust_remote_code: bool = False,
        tokenizer_hint: str | None = None,
        pads: frozenset[int] = frozenset(),
    ) -> None:
        """Describe the model, as `load_calibration` does; nothing is loaded yet."""
        self._pads = pads
        self._folder, self._vocab_size = folder, vocab_size
        self._trust_remote_code, self._tokenizer_hint = trust_remote_code, tokenizer_hint
        self.loaded: Any = None
        """The tokenizer; None as long as no record has needed it."""

    @cached_property
    def optional(self) -> Any:
        """The tokenizer in the model's folder, also where no record needs it; None if there is
        none. It decides nothing but what a pad is."""
        try:
            return self.loaded or load_tokenizer(
                self._folder, trust_remote_code=self._trust_remote_code
            )
        except SourceError:
            return None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer in the model's folder. Raises `CalibrationError` if there is none."""
        if self._tokenizer_hint is not None:
            raise CalibrationError(f"{self._tokenizer_hint} {NEEDS_NONE}")
        if self.loaded is None:
            try:
                self.loaded = load_tokenizer(
                    self._folder, trust_remote_code=self._trust_remote_code
                )
            except SourceError as error:
                raise CalibrationError(f"{error} {NEEDS_NONE}") from error
        return self.loaded

    @property
    def first(self) -> list[int]:
        """The token with which the tokenizer begins every text, if it does so and was loaded."""
        if self.loaded is None:
            return []
        bos = self.loaded.bos_token_id
        is_added = bos is not None and _tokenize(self.loaded, "")[:1] == [bos]
        return [bos] if is_added else []

    @property
    def pad(self) -> int:
        """The id for padding: the first of pad, end of text and 0 that the embedding has."""
        names = ("pad_token_id", "eos_token_id")
        candidates: list[int | None] = [getattr(self.loaded, name, None) for name in names]
        valid = (token for token in candidates if token is not None and token < self._vocab_size)
        return next(valid, 0)

    def encode(self, record: Record, close: bool) -> list[int]:
        """Return the ids of a record; none for an empty document.

        If a record has several forms, the first of `input_ids`, a chat, `prompt` with `completion`
        and `text` is used. Without a chat template, a chat is used only if there is no other form.

        Args:
            record: One document.
            close: True if the end-of-text token shall follow plain text.

        Raises:
            CalibrationError: The record cannot be encoded for this model.
        """
        content = record.content
        if "input_ids" in content:
            ids = self._input_ids(record)
        elif holds_chat(content) and (_plain_text(record) is None or self._has_template):
            ids = self._encode_chat(record)
        else:
            ids = self._encode_text(record, close)
        self._check(record, ids)
        return ids

    def _input_ids(self, record: Record) -> list[int]:
        """Return `input_ids` without those that `attention_mask` masks, or else without pads."""
        ids, mask = record.content["input_ids"], record.content.get("attention_mask")
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            raise CalibrationError(
                f"{record.where}: input_ids is not a list of integers. Write the ids as one flat "
                "list."
            )
        if mask is None:
            self._check(record, ids)
            mask = text_mask(torch.tensor(ids), self._pads | _special_ids(self.optional)).tolist()
        if (
            not isinstance(mask, list)
            or len(mask) != len(ids)
            or any(x not in (0, 1) for x in mask)
        ):
            raise CalibrationError(
                f"{record.where}: attention_mask does not have a 0 or 1 for each of {len(ids)} "
                "input_ids. Correct it, or leave it out."
            )
        return list(compress(ids, mask))

    @property
    def _has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def _encode_text(self, record: Record, close: bool) -> list[int]:
        text = _plain_text(record) or ""
        if not text.strip():
            return []
        ids = _tokenize(self.tokenizer, text, record.where)
        end = self.tokenizer.eos_token_id
        if close and end is not None and ids[-1:] != [end]:
            ids.append(end)
        return ids

    def _encode_chat(self, record: Record) -> list[int]:
        chat = read_chat(record)
        if chat.is_blank:
            return []
        if not self._has_template:
            raise CalibrationError(
                f"{record.where}: has messages, but the tokenizer in {self._folder} has no chat "
                "template. Give text, prompt and completion, or input_ids."
            )
        text = self._render_all(record, chat)
        return _tokenize(self.tokenizer, text, record.where, add_special_tokens=False)

    def _render_all(self, record: Record, chat: Chat) -> str:
        """Render a chat in the first presentation of which the template leaves out nothing."""
        rejection: CalibrationError | None = None
        fewest: list[Omission] = []
        for messages in presentations(chat):
            try:
                text = self._render(record, messages, chat.tools)
            except CalibrationError as error:
                rejection = rejection or error
                continue
            omissions = [
                omission
                for omission in left_out(chat, text)
                if not self._is_of_earlier_turn(record, chat, messages, omission)
            ]
            if not omissions:
                return text
            fewest = min(fewest or omissions, omissions, key=len)
        if rejection is not None and not fewest:
            raise rejection
        raise CalibrationError(
            f"{record.where}: the model's chat template leaves out {fewest[0].what}. "
            "Remove it from the record, or give the whole chat as text."
        )

    def _is_of_earlier_turn(
        self, record: Record, chat: Chat, messages: list[Message], omission: Omission
    ) -> bool:
        """True if the template shows it where the chat ends with its message."""
        if omission.turn is None or omission.turn == len(messages) - 1:
            return False
        end = omission.turn + 1
        try:
            text = self._render(record, messages[:end], chat.tools)
        except CalibrationError:
            return False
        return omission not in left_out(Chat(chat.messages[:end], chat.tools), text)

    def _render(self, record: Record, messages: list[Message], tools: list[Any] | None) -> str:
        """Apply the chat template to messages."""
        try:
            template = TODAY + self.tokenizer.get_chat_template(tools=tools)
            if any(message["content"] is None for message in messages):
                return _render_with_null(self.tokenizer, messages, tools, template)
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, tokenize=False
            )
        except Exception as error:  # a template is a program, which can fail in any way
            cause = " ".join(str(error).split())[:200] or type(error).__name__
            raise CalibrationError(
                f"{record.where}: the model's chat template rejects the messages ({cause}). "
                "Change them, or give text."
            ) from error
        return text

    def _check(self, record: Record, ids: list[int]) -> None:
        """Raise `CalibrationError` if an id has no row in the embedding."""
        if not ids or (min(ids) >= 0 and max(ids) < self._vocab_size):
            return
        wrong = next(token for token in ids if not 0 <= token < self._vocab_size)
        is_tokenized = "input_ids" in record.content
        culprit = "The ids are" if is_tokenized else f"The tokenizer in {self._folder} is"
        raise CalibrationError(
            f"{record.where}: token id {wrong} is outside the model's vocabulary (0 to "
            f"{self._vocab_size - 1}). {culprit} for another model. Use this model's own tokenizer."
        )


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of a tokenizer that may serve as pads."""
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return frozenset(token for token in ids if token is not None)


def _render_with_null(
    tokenizer: Any, messages: list[Message], tools: list[Any] | None, template: str
) -> str:
    """Render messages with null content, which `apply_chat_template` would drop."""
    from transformers.utils.chat_template_utils import render_jinja_template

    special = tokenizer.special_tokens_map
    texts, _ = render_jinja_template([messages], tools=tools, chat_template=template, **special)
    return str(texts[0])


def _plain_text(record: Record) -> str | None:
    """Return `prompt` and `completion` joined, or `text`; None if the record has neither."""
    if record.content.keys() >= {"prompt", "completion"} and not is_trl(record.content):
        return _string(record, "prompt") + _string(record, "completion")
    return _string(record, "text") if "text" in record.content else None


def _string(record: Record, key: str) -> str:
    value = record.content[key]
    if not isinstance(value, str):
        kind = type(value).__name__
        raise CalibrationError(f"{record.where}: {key} has the type {kind}. Write a string.")
    return value


def _tokenize(
    tokenizer: Any, text: str, where: str = "", add_special_tokens: bool = True
) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise CalibrationError(
            f"{where}: its text is not Unicode ({error.reason} at character {error.start}). "
            "Remove that character."
        ) from None
    # Not verbose: a text may be longer than the model takes, because it is cut afterwards.
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    return list(encoded["input_ids"])
