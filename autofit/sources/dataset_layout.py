"""From a row's columns to the one sequence that a trainer makes of it, as trl's SFTTrainer does.

Source: trl/trainer/sft_trainer.py 1.16, SFTTrainer._prepare_dataset. For conversations and instructions, the formats
sharegpt and alpaca of LLaMA-Factory: a human is a user and gpt an assistant (trl keeps these words); a prompt is the
instruction, a line break and the input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.sources.dataset_rows import Row

CHAT_ROLES = {"human": "user", "gpt": "assistant"}
"""What the roles of conversations are called in chat templates."""
_TO_NAME = "name the column that holds the whole text, the messages or the token ids: --text-column NAME"


class Text(Struct, frozen=True, kw_only=True):
    """What is left to be tokenised of a row."""

    text: str
    adds_special_tokens: bool
    """Whether the tokenizer puts its own tokens around it; a chat template has written them already."""


class Renderer(Protocol):
    """What a layout needs of a tokenizer."""

    @property
    def end_of_sequence(self) -> str:
        """The token that ends a sequence; empty where there is none."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be written as text."""
        ...

    def render(self, messages: Sequence[Mapping[str, Any]], tools: object) -> str:
        """Write messages as text.

        Raises:
            InputError: the template does not take them.
        """
        ...


Read = Callable[[Row, Renderer | None], Text | int]


class Layout(Struct, frozen=True, kw_only=True):
    """How the sequence of a row is found."""

    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Columns that are read where a row has them."""
    words: str
    """How the columns become a sequence."""
    read: Read
    """Returns a row's text, or its number of tokens. Raises InputError, which does not say which row it was."""
    needs_tokenizer: bool = True
    needs_chat_template: bool = False
    list_column: str | None = None
    """The column whose lists are the sequences, if lengths are all there is to read."""

    def present(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Return those of its columns that a data set has."""
        return (*self.columns, *(name for name in self.optional if name in columns))


def find_layout(columns: Sequence[str], named: Sequence[str], first_row: Row) -> Layout:
    """Choose the layout that a data set's columns have, or that the user names.

    Args:
        columns: what there is.
        named: `--text-column`; several are joined.
        first_row: shows what a named column holds.

    Raises:
        InputError: no layout has these columns, or several have.
    """
    if named:
        return _named(columns, tuple(named), first_row)
    known = [each for each in LAYOUTS if set(each.columns) <= set(columns)]
    if TOKENS in known:
        return TOKENS
    if len(known) > 1:
        ways = "; or ".join(f"{' and '.join(each.columns)} ({each.words})" for each in known)
        raise InputError(f"the data can be read in several ways: {ways}.", to_fix="say which: --text-column NAME")
    if not known and "length" in columns:
        return LENGTH
    if not known:
        raise InputError(
            f"the data has the columns {', '.join(columns)}, which no trainer's layout has.",
            to_fix=f"{_TO_NAME}; known are {', or '.join(' with '.join(each.columns) for each in (*LAYOUTS, LENGTH))}",
        )
    layout = known[0]
    if layout is PROMPT and not isinstance(first_row.get("prompt"), str):
        return PROMPT_MESSAGES
    return layout


def _named(columns: Sequence[str], named: tuple[str, ...], first_row: Row) -> Layout:
    for name in named:
        if name not in columns:
            raise InputError(f"the data has no column {name!r}: {', '.join(columns)}.", to_fix="name one that is there")
    if len(named) > 1:
        return Layout(
            columns=named,
            words=f"{', '.join(named)}, joined by line breaks",
            read=lambda row, renderer: _ended("\n".join(_text(row, name) for name in named), renderer),
        )
    (name,) = named
    value = first_row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return _of_length(name)
    if isinstance(value, (list, tuple)):
        holds_messages = bool(value) and isinstance(value[0], dict)
        return _of_messages(name) if holds_messages else _of_tokens(name)
    return _of_text(name)


def _of_text(name: str) -> Layout:
    return Layout(columns=(name,), words=f"column {name}", read=lambda row, of: _ended(_text(row, name), of))


def _of_tokens(name: str) -> Layout:
    return Layout(
        columns=(name,),
        words=f"column {name}, tokenised already",
        read=lambda row, _: len(_tokens(row, name)),
        needs_tokenizer=False,
        list_column=name,
    )


def _of_length(name: str) -> Layout:
    return Layout(
        columns=(name,),
        words=f"column {name}, which says how many tokens a sequence has",
        read=lambda row, _: _length(row, name),
        needs_tokenizer=False,
    )


def _of_messages(name: str) -> Layout:
    return Layout(
        columns=(name,),
        optional=("tools",),
        words=f"column {name}, through the chat template",
        read=lambda row, renderer: _chat(_messages(row, name), row, renderer),
        needs_chat_template=True,
    )


TOKENS, LENGTH = _of_tokens("input_ids"), _of_length("length")
PROMPT = Layout(
    columns=("prompt", "completion"),
    words="prompt and completion, one after the other",
    read=lambda row, renderer: _ended(_text(row, "prompt") + _text(row, "completion"), renderer),
)
PROMPT_MESSAGES = replace(
    PROMPT,
    optional=("tools",),
    words="prompt and completion, through the chat template",
    read=lambda row, of: _chat([*_messages(row, "prompt"), *_messages(row, "completion")], row, of),
    needs_chat_template=True,
)
INSTRUCTION = Layout(
    columns=("instruction", "output"),
    optional=("input", "system", "history"),
    words="instruction, input and output, through the chat template",
    read=lambda row, renderer: _chat(_instruction(row), row, renderer),
    needs_chat_template=True,
)
LAYOUTS = (TOKENS, _of_messages("messages"), _of_messages("conversations"), PROMPT, INSTRUCTION, _of_text("text"))


def _ended(text: str, renderer: Renderer | None) -> Text:
    """End a text as trainers do, unless it ends so already."""
    end = renderer.end_of_sequence if renderer else ""
    return Text(text=text if end and text.endswith(end) else text + end, adds_special_tokens=True)


def _chat(messages: Sequence[Mapping[str, Any]], row: Row, renderer: Renderer | None) -> Text:
    assert renderer is not None, "a layout that needs a tokenizer is read with one"
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    except ValueError as error:
        raise InputError(f"column tools is no JSON: {error}") from error
    return Text(text=renderer.render(messages, tools or None), adds_special_tokens=False)


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if isinstance(value, str):
        return value
    raise InputError(f"column {name} {_holds(row, name)}, not text")


def _tokens(row: Row, name: str) -> Sequence[int]:
    value = row.get(name)
    if isinstance(value, list) and (not value or isinstance(value[0], int)):
        return value
    raise InputError(f"column {name} {_holds(row, name)}, not token ids")


def _length(row: Row, name: str) -> int:
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise InputError(f"column {name} {_holds(row, name)}, not a number of tokens")


def _messages(row: Row, name: str) -> list[dict[str, Any]]:
    """Return a row's messages in the words of chat templates, without the keys that a table fills with nulls."""
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise InputError(f"column {name} {_holds(row, name)}, not a list of messages")
    return [_message({key: inner for key, inner in each.items() if inner is not None}, name) for each in value]


def _message(message: dict[str, Any], name: str) -> dict[str, Any]:
    if "from" in message and "value" in message:
        return {"role": CHAT_ROLES.get(message["from"], message["from"]), "content": message["value"]}
    if not isinstance(message.get("role"), str):
        raise InputError(f"column {name} holds a message without a role")
    if not message.keys() - {"role"}:
        raise InputError(f"column {name} holds a message of {message['role']!r} without content")
    return message


def _instruction(row: Row) -> list[dict[str, Any]]:
    given = row.get("input")
    prompt = _text(row, "instruction") + (f"\n{_text(row, 'input')}" if given else "")
    turns = [(prompt, _text(row, "output"))]
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(each, list) and len(each) == 2 for each in history):
        raise InputError(f"column history {_holds(row, 'history')}, not pairs of a question and an answer")
    said = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    for question, answer in (*history, *turns):
        said += [{"role": "user", "content": str(question)}, {"role": "assistant", "content": str(answer)}]
    return said


def _holds(row: Row, name: str) -> str:
    """Say what a column holds instead of what it should."""
    if name not in row:
        return f"is missing (there are {', '.join(row) or 'no columns'}), so it holds nothing"
    value = row[name]
    return "holds null" if value is None else f"holds {type(value).__name__} {str(value)[:40]!r}"
