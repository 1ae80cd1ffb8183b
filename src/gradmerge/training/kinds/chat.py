"""Conversations in the tokenizer's chat template, with a loss on what the assistant says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.training.kinds.base import Split
from gradmerge.training.kinds.causal import AbstractCausal, Marked, asking, joined

# As transformers looks for the block by which a template marks what the model generates.
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Names of roles in the format of ShareGPT, whose messages are `{from: ..., value: ...}`.
_ROLES = {"human": "user", "gpt": "assistant"}

Message = dict[str, Any]


class Chat(AbstractCausal):
    """A list of messages `{role, content}`; the assistant's turns have a loss.

    Which tokens those are is told by the template's `{% generation %}` block. For a template
    without one, a turn is what the conversation up to it adds to the conversation before it with a
    generation prompt; both must be prefixes of the whole, token by token.
    """

    roles: ClassVar = {"messages": ("messages", "conversations", "conversation")}
    optional: ClassVar = {"tools": ("tools",)}

    @override
    def marked(self, split: Split, index: int, row: Mapping[str, Any]) -> Marked:
        return conversation(
            split, index, self._messages(split, index, row), self._tools(split, row)
        )

    @override
    def question(self, split: Split, index: int, row: Mapping[str, Any]) -> tuple[list[int], str]:
        messages = self._messages(split, index, row)
        last = _assistant(messages, "last")
        if not last:
            raise ConfigError(
                f"{split.where}, row {index}: expected a message of the assistant, with which a "
                "generated answer can be compared, got none. Remove the row."
            )
        render = _renderer(split, self._tools(split, row))
        asked = render(messages[: last[0]], add_generation_prompt=True)
        return asked, str(messages[last[0]].get("content") or "")

    def _messages(self, split: Split, index: int, row: Mapping[str, Any]) -> list[Message]:
        given = split.get(row, "messages")
        given = json.loads(given) if isinstance(given, str) else given
        if not isinstance(given, (list, tuple)) or not given:
            raise ConfigError(
                f"{split.where}, row {index}: expected a list of messages in column "
                f"{split.columns['messages']!r}, got {given!r:.40}. Remove the row."
            )
        return [_message(each, f"{split.where}, row {index}") for each in given]

    @staticmethod
    def _tools(split: Split, row: Mapping[str, Any]) -> Any:
        given = split.get(row, "tools")
        return (json.loads(given) if isinstance(given, str) else given) or None


class Instruction(AbstractCausal):
    """An instruction, an optional input, and the output, which has a loss (the Alpaca columns).

    With a chat template, instruction and input are the user's turn and the output the assistant's;
    without one they are put into the text of Alpaca (Taori et al., 2023).
    """

    roles: ClassVar = {"instruction": ("instruction",), "output": ("output", "response")}
    optional: ClassVar = {"input": ("input", "context")}

    @override
    def marked(self, split: Split, index: int, row: Mapping[str, Any]) -> Marked:
        asked, answer = self._texts(split, index, row)
        if not split.processor.chat_template:
            return joined(split, _alpaca(*asked), answer)
        return conversation(split, index, [_user(*asked), _says("assistant", answer)])

    @override
    def question(self, split: Split, index: int, row: Mapping[str, Any]) -> tuple[list[int], str]:
        asked, answer = self._texts(split, index, row)
        if not split.processor.chat_template:
            return asking(split, _alpaca(*asked)), answer
        return _renderer(split)([_user(*asked)], add_generation_prompt=True), answer

    @staticmethod
    def _texts(split: Split, index: int, row: Mapping[str, Any]) -> tuple[tuple[str, str], str]:
        more = split.text(row, "input", index) if split.get(row, "input") else ""
        return (split.text(row, "instruction", index), more), split.text(row, "output", index)


def _alpaca(instruction: str, more: str) -> str:
    begin = "Below is an instruction that describes a task"
    end = "Write a response that appropriately completes the request."
    if not more:
        return f"{begin}. {end}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    return (
        f"{begin}, paired with an input that provides further context. {end}\n\n### Instruction:\n"
        f"{instruction}\n\n### Input:\n{more}\n\n### Response:\n"
    )


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _user(instruction: str, more: str) -> Message:
    return _says("user", f"{instruction}\n\n{more}" if more else instruction)


def _message(given: Any, where: str) -> Message:
    if isinstance(given, Mapping):
        found = {key: value for key, value in given.items() if value is not None}
        if "from" in found and "value" in found:
            return _says(_ROLES.get(found["from"], found["from"]), found["value"])
        if "role" in found:
            return found
    raise ConfigError(
        f"{where}: expected messages with `role` and `content` (or `from` and `value`), got "
        f"{given!r:.60}. Remove the row, or name another column (`columns`)."
    )


def _assistant(messages: Sequence[Message], turns: str) -> list[int]:
    """Return the positions of the assistant's messages, or of the last of them."""
    found = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return found[-1:] if turns == "last" else found


def _renderer(split: Split, tools: Any = None) -> Any:
    """Return a function from messages to tokens in the chat template."""
    if not split.processor.chat_template:
        raise ConfigError(
            f"{split.where}: expected a tokenizer with a chat template, got one without. Set "
            "data.processor to the folder of an instruct model, or use kind: completion."
        )

    def render(messages: Sequence[Message], **options: Any) -> list[int]:
        found = split.processor.apply_chat_template(
            list(messages), tools=tools, tokenize=True, return_dict=False, **options
        )
        return list(found)

    return render


def conversation(
    split: Split, index: int, messages: Sequence[Message], tools: Any = None
) -> Marked:
    """Return the tokens of a conversation, and which of them the assistant says.

    Raises:
        ConfigError: the template does not tell them reliably; the message names the row.
    """
    render = _renderer(split, tools)
    turns = _assistant(messages, split.data.turns)
    if _MARKS.search(str(split.processor.get_chat_template(tools=tools))):
        ids, loss = _marked_by_template(split, messages, tools)
        if turns and not any(loss):
            raise _unreliable(split, index, "its {% generation %} block marks no token")
        return ids, loss if split.data.turns == "all" else _last_run(loss)
    whole = render(messages)
    loss = [False] * len(whole)
    for turn in turns:
        before = render(messages[:turn], add_generation_prompt=True) if turn else []
        after = _up_to_end(render(messages[: turn + 1]), len(before), split.processor.eos_token_id)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise _unreliable(split, index, f"message {turn} is rendered in another way later on")
        loss[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, loss


def _marked_by_template(split: Split, messages: Sequence[Message], tools: Any) -> Marked:
    found = split.processor.apply_chat_template(
        list(messages),
        tools=tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]


def _last_run(loss: Sequence[bool]) -> list[bool]:
    """Keep only the last run of true values."""
    end = max((i + 1 for i, marked in enumerate(loss) if marked), default=0)
    start = end
    while start and loss[start - 1]:
        start -= 1
    return [start <= i < end for i in range(len(loss))]


def _up_to_end(ids: list[int], start: int, end_token: int | None) -> list[int]:
    """Cut what a template puts after the last end-of-turn token of a turn (a line break)."""
    ends = [i for i in range(start, len(ids)) if ids[i] == end_token]
    return ids[: ends[-1] + 1] if ends else ids


def _unreliable(split: Split, index: int, why: str) -> ConfigError:
    return ConfigError(
        f"{split.where}, row {index}: expected a chat template that tells which tokens the "
        f"assistant says, got one that does not: {why}.\nSet turns: last, mark the assistant's "
        "text in the template with {% generation %}, or use kind: completion."
    )
