"""`--model`: from a Hub id, a folder or a config.json to an architecture. No weights are read."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field

from autofit.errors import InputError, nearest
from autofit.sources.attention import usual_attention
from autofit.sources.checkpoints import stored_dtype
from autofit.sources.config_sizes import refuse_impossible_sizes
from autofit.spec.job import Model, Origin


class Published(Struct, frozen=True, kw_only=True):
    """The number of parameters as somebody printed it."""

    figure: str
    """An exact count, or a rounded one such as `13B`."""
    source: str
    more_than_params: int = 0
    """Stored elements that the figure counts and the model does not train: buffers, second copies, unused heads."""
    because: str = ""
    """What those elements are."""


class Entry(Struct, frozen=True, kw_only=True):
    """A model of the catalogue."""

    id: str
    variants: tuple[str, ...]
    """Other Hub ids with the same shapes: instruction-tuned versions, mirrors."""
    num_params: int | None
    """None where only a rounded figure is published."""
    published: Published
    config: dict[str, Any]
    packed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Hub ids of the same shapes with packed weights, and the `quantization_config` of each: as on its model card, and
    as many bytes as published runs on it held."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Every Hub id that means these shapes."""
        return (self.id, *self.variants, *self.packed)

    def config_of(self, name: str) -> dict[str, Any]:
        """Return the content of one id's config.json, as the caller's own: transformers writes into nested values."""
        declared = self.packed.get(name)
        return copy.deepcopy(self.config if declared is None else {**self.config, "quantization_config": declared})


class ModelCatalogue(Struct, frozen=True, kw_only=True):
    """Every model whose config.json ships with autofit."""

    models: tuple[Entry, ...]
    config_source: str
    """Where each config was published, with `{id}` for the Hub id."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Every Hub id in the catalogue."""
        return tuple(name for entry in self.models for name in entry.ids)

    def called(self, text: str) -> tuple[tuple[str, Entry], ...]:
        """Return the ids a text may mean, in any case, with or without the organisation; the whole id goes first."""
        name = text.strip().casefold()
        ids = [(known, entry) for entry in self.models for known in entry.ids]
        whole = tuple(pair for pair in ids if pair[0].casefold() == name)
        return whole or tuple(pair for pair in ids if pair[0].casefold().rpartition("/")[2] == name)


@cache
def model_catalogue() -> ModelCatalogue:
    """Read the catalogue that ships with autofit."""
    text = resources.files("autofit.sources").joinpath("data/models.json").read_bytes()
    return msgspec.json.decode(text, type=ModelCatalogue)


def resolve_model(text: str, *, allow_hub: bool = False, environment: Mapping[str, str] | None = None) -> Model:
    """Return the architecture that `--model` names.

    Looked for, in this order: a folder or file of that name, the catalogue, the Hub's cache on this machine, the Hub.

    Args:
        text: a path, or a Hub id.
        allow_hub: whether config.json may be downloaded.
        environment: where the Hub's cache is looked up; the process's own by default.

    Raises:
        InputError: nothing of that name is found, or what is found does not describe a model.
    """
    if path := _existing(text):
        return _from_path(path)
    if _is_path(text):
        raise InputError(
            f"there is no {text!r}.", to_fix="give a folder with a config.json, a config.json, or a Hub id"
        )
    if found := _from_catalogue(text):
        return found
    if cached := _cached_config(text, os.environ if environment is None else environment):
        return _from_file(cached, name=text, origin="hub", source=f"the Hub's cache on this machine: {cached}")
    if allow_hub:
        return _from_hub(text)
    raise InputError(
        f"{text!r} is neither a path nor in the catalogue of {len(model_catalogue().ids)} models.",
        to_fix=f"the nearest known are {nearest(text, model_catalogue().ids)}; or give a folder or a config.json",
        hint=f"--allow-hub fetches the config.json of {text!r} from the Hugging Face Hub",
    )


def model_from_config(
    config: Mapping[str, Any], *, name: str, origin: Origin, source: str, folder: Path | None = None
) -> Model:
    """Return the model that a config.json's content describes, which lies in a folder if it is on this machine.

    Raises:
        InputError: it names no `model_type`, no class to build, or sizes that no model has.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InputError(
            f"{source} has no model_type.", to_fix="give the config.json of a transformers model, with its model_type"
        )
    refuse_impossible_sizes(config, source)
    if config.get("architectures"):
        attention = usual_attention(config)
        return Model(
            name=name,
            config=dict(config),
            origin=origin,
            source=source,
            usual_attention=attention,
            stored_dtype=stored_dtype(config, folder),
        )
    architecture = _usual_architecture(model_type)
    if architecture is None:
        raise InputError(
            f"{source} names no architectures, so the class to build is not known.",
            to_fix='add it, for instance "architectures": ["LlamaForCausalLM"]',
        )
    return Model(
        name=name,
        config={**config, "architectures": [architecture]},
        usual_attention=usual_attention({**config, "architectures": [architecture]}),
        origin=origin,
        stored_dtype=stored_dtype(config, folder),
        source=f"{source} (names no architectures: taken as {architecture}, as every {model_type} in the catalogue)",
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json.

    Raises:
        InputError: it cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r}: {error.strerror}", to_fix="give a readable config.json"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not text.", to_fix="give a config.json, not a file of weights") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}", to_fix="correct the file") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} is not a JSON object.", to_fix="give the config.json of a transformers model")
    return content


def _from_path(path: Path) -> Model:
    if path.is_file():
        return _from_file(path, name=str(path), origin="config file", source=repr(str(path)))
    config = path / "config.json"
    if config.exists():
        return _from_file(config, name=str(path), origin="folder", source=repr(str(config)))
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        raise InputError(
            f"{str(path)!r} has {ggufs[0].name!r} but no config.json beside it.",
            to_fix="write one beside it: AutoConfig.from_pretrained(folder, gguf_file=name).save_pretrained(folder); "
            "or let autofit read it from the training script: autofit launch SCRIPT",
        )
    raise InputError(f"the folder {str(path)!r} has no config.json.", to_fix="give a folder that a model was saved in")


def _from_file(path: Path, *, name: str, origin: Origin, source: str) -> Model:
    return model_from_config(read_config(path), name=name, origin=origin, source=source, folder=path.parent)


def _from_catalogue(text: str) -> Model | None:
    """Return the one model of the catalogue that is meant, None where there is none."""
    known = model_catalogue()
    found = known.called(text)
    if not found:
        return None
    if len({entry.id for _, entry in found}) > 1:
        raise InputError(f"{text!r} means several models.", to_fix=f"say which: {', '.join(name for name, _ in found)}")
    name, entry = found[0]
    same = "" if name == entry.id else f", whose shapes {name} has"
    return Model(
        name=name,
        config=entry.config_of(name),
        origin="catalogue",
        num_params=entry.num_params,
        usual_attention=usual_attention(entry.config),
        stored_dtype=stored_dtype(entry.config),
        source=known.config_source.format(id=entry.id) + same,
    )


def _from_hub(text: str) -> Model:
    """Download config.json, and nothing else."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import GatedRepoError, HFValidationError
    except ImportError as error:
        raise InputError(
            "--allow-hub needs huggingface_hub, which is not installed.", to_fix="pip install huggingface_hub"
        ) from error
    try:
        path = hf_hub_download(text, "config.json")
    except GatedRepoError as error:
        raise InputError(
            f"{text!r} is gated on the Hub.", to_fix="accept its terms there and log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise InputError(f"{text!r} is not a Hub id: {error}", to_fix="write organisation/name") from error
    except Exception as error:  # every transport has its own exceptions, and each means: not fetched
        raise InputError(
            f"the config.json of {text!r} could not be fetched from the Hub: {_first_line(error)}",
            to_fix="check the name and the connection, or give a folder or a config.json",
        ) from error
    return _from_file(
        Path(path), name=text, origin="hub", source=f"https://huggingface.co/{text}/blob/main/config.json"
    )


def _cached_config(text: str, environment: Mapping[str, str]) -> Path | None:
    """Return config.json of the Hub's cache, where an earlier download left it.

    Source: huggingface_hub, guide "Understand caching".
    """
    home = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache_folder = Path(environment.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    folder = cache_folder / f"models--{text.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    config = folder / "snapshots" / revision / "config.json"
    return config if config.is_file() else None


def _usual_architecture(model_type: str) -> str | None:
    """Return the class that all the catalogue's models of a type have, None where there is none or they differ."""
    classes = {name for entry in _of_type(model_type) for name in entry.config["architectures"]}
    return classes.pop() if len(classes) == 1 else None


def _of_type(model_type: str) -> Iterator[Entry]:
    return (entry for entry in model_catalogue().models if entry.config["model_type"] == model_type)


def _existing(text: str) -> Path | None:
    """Return the path a text is, None where it is none that exists or could exist."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _is_path(text: str) -> bool:
    """Whether a text that names nothing on disk was meant as a path: a Hub id has at most one slash inside."""
    return (
        text.startswith((".", "/", "~")) or text.endswith((".json", ".gguf")) or text.count("/") > 1 or not text.strip()
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
