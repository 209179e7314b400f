"""`--tokenizer`: how many tokens texts have. The one module beside the tracer that imports transformers.

Its tokenizers import no torch, but for those made of a GGUF file (transformers 5.23).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from autofit.errors import InputError
from autofit.spec.job import Model


class TextTokenizer(Struct, frozen=True):
    """A fast tokenizer of transformers, neither truncating nor padding."""

    name: str
    tokenizer: Any

    @property
    def end_of_sequence(self) -> str:
        """The token that ends a sequence; empty where there is none."""
        return str(self.tokenizer.eos_token or "")

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be written as text."""
        return bool(self.tokenizer.chat_template)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: object) -> str:
        """Write messages as text.

        Raises:
            InputError: the template does not take them.
        """
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False))
        except Exception as error:  # templates raise what they like
            raise InputError(f"the chat template of {self.name} refuses the messages: {_first_line(error)}") from error

    def count(self, texts: Sequence[str], *, adds_special_tokens: bool) -> list[int]:
        """Return the number of tokens of each text, as calling the tokenizer would give them.

        The tokens themselves are not copied out of the library, which would take as long again.
        """
        backend = self.tokenizer.backend_tokenizer
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=adds_special_tokens)
        return [len(each) for each in encoded]


def load_tokenizer(text: str | None, model: Model | None, *, allow_hub: bool = False) -> TextTokenizer:
    """Load a tokenizer: the one that is named, or the model's own.

    Args:
        text: `--tokenizer`: a folder, a tokenizer.json, a GGUF file, or a Hub id; None: the model's folder or id.
        model: whose tokenizer it is.
        allow_hub: whether it may be downloaded.

    Raises:
        InputError: it is not on this machine, is no fast tokenizer, or transformers is not installed.
    """
    name = text or (None if model is None else model.name)
    if name is None:
        raise InputError("no tokenizer is named.", to_fix="give --tokenizer, or --model with its tokenizer beside it")
    try:
        import transformers
    except ImportError as error:
        raise InputError("tokenising needs transformers.", to_fix="pip install transformers") from error
    where, options = _place(name)
    try:
        loaded = transformers.PreTrainedTokenizerFast.from_pretrained(where, local_files_only=not allow_hub, **options)
    except Exception as error:  # every kind of file and every transport has its own exceptions
        raise InputError(
            f"the tokenizer of {name!r} could not be loaded: {_first_line(error)}",
            to_fix="give --tokenizer: a folder with a tokenizer.json, or a Hub id that was downloaded before",
            hint=None if allow_hub else "--allow-hub fetches it from the Hugging Face Hub",
        ) from error
    loaded.backend_tokenizer.no_truncation()
    loaded.backend_tokenizer.no_padding()
    return TextTokenizer(name, loaded)


def _place(name: str) -> tuple[str, dict[str, str]]:
    """Return what to load from: a folder, with the file in it where transformers has to be told, or a Hub id."""
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError):
        return name, {}
    if is_file:
        return str(path.parent), {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    ggufs = sorted(each.name for each in path.glob("*.gguf")) if is_folder else []
    if ggufs and not (path / "tokenizer.json").is_file():
        return str(path), {"gguf_file": ggufs[0]}
    return str(path) if is_folder else name, {}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
