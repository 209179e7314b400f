"""Keeps a script that is only looked at from leaving anything behind: folders, uploads, tracker runs, connections."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from autofit.runtime.discover.observed import NotUnderstood, Observed

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "")  # noqa: S104 - compared with, nothing listens


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stand in for what would write files."""


def watch_files(observed: Observed) -> None:
    """Note every folder that is made and every file that is made in one of them, to take them back.

    A file in a folder that was there before may be anyone's, and stays.
    Source: Python's audit events, `os.mkdir` and `open`.
    """

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.mkdir" and isinstance(args[0], (str, os.PathLike)):
            path = Path(args[0]).absolute()  # the working directory may have changed by the end
            if not path.exists():
                observed.folders.append(path)
        if event == "open" and observed.folders and isinstance(args[0], (str, os.PathLike)) and args[2] & os.O_CREAT:
            path = Path(args[0]).absolute()
            if any(folder in path.parents for folder in observed.folders):
                observed.files.append(path)

    sys.addaudithook(hear)


def forbid_network() -> None:
    """Let no connection leave this machine. Source: Python's audit events, `socket.connect`, `socket.getaddrinfo`."""

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo" and str(args[0] or "").strip("'") not in LOCAL_HOSTS:
            raise _no_network(args[0])
        if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in LOCAL_HOSTS:
            raise _no_network(args[1][0])

    sys.addaudithook(hear)


def _no_network(host: object) -> OSError:
    return ConnectionError(f"autofit: {host} is not asked while the script is only looked at: offline (--allow-hub)")


HUB_WRITES = (
    "create_branch", "create_commit", "create_pull_request", "create_tag", "delete_file", "delete_folder",
    "delete_repo", "move_repo", "super_squash_history", "update_repo_settings", "upload_file", "upload_folder",
    "upload_large_folder",
)  # fmt: skip
"""What changes a repository of the Hub. Source: huggingface_hub/hf_api.py 1.x, `HfApi`."""


def hook_hub(observed: Observed, module: ModuleType) -> None:
    """Let a script that pushes by the Hub's own client make no repository and upload nothing, allowed online or not."""

    def create_repo(_self: Any, repo_id: str, *_args: Any, **_kwargs: Any) -> Any:
        return module.RepoUrl(f"{module.constants.ENDPOINT}/{repo_id if '/' in repo_id else f'user/{repo_id}'}")

    kinds = {"create_repo": create_repo, **dict.fromkeys(HUB_WRITES, nothing)}
    for name, kind in kinds.items():
        if hasattr(module.HfApi, name):
            setattr(module.HfApi, name, kind)
        if hasattr(module, name):  # bound to a client when the module was made
            setattr(module, name, kind.__get__(module.api))


def hook_tokenizers(observed: Observed, module: ModuleType) -> None:
    """Let tokenizers save nothing."""
    module.PreTrainedTokenizerBase.save_pretrained = nothing
    module.PreTrainedTokenizerBase.push_to_hub = nothing


def hook_trackers(observed: Observed, module: ModuleType) -> None:
    """Let a tracker start no run."""
    for name in ("init", "start_run", "log", "finish"):
        if hasattr(module, name):
            setattr(module, name, nothing)


def hook_process_groups(observed: Observed, module: ModuleType) -> None:
    """Say what a script that starts its own processes' group would run into: a launcher has started one already."""
    original: Callable[..., Any] = module.init_process_group

    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        if observed.inside_library or "fake" in (kwargs.get("backend"), *args[:1]):
            return original(*args, **kwargs)
        observed.mark("init_process_group")
        raise NotUnderstood(
            f"starts its own process group ({observed.where.get('init_process_group', 'torch.distributed')})",
            "leave that, and wrapping the model in DistributedDataParallel, to Accelerator.prepare or to a Trainer",
        )

    vars(module)["init_process_group"] = init_process_group
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and hasattr(distributed, "init_process_group"):
        vars(distributed)["init_process_group"] = init_process_group
