"""Hub ids beside paths: ``Qwen/Qwen3-8B-Base``, ``openai/gsm8k:main/test``, ``owner/name@revision``.

In: a config, or one of its places. Out: the same with local folders, of what was fetched before. A run looks nothing up: an id
becomes a folder of Hugging Face's own cache once, before anything starts, and the folder's name holds the revision.

    fetch("Qwen/Qwen3-8B-Base", "model")      downloads, with the token and the cache that huggingface_hub uses
    resolved(config)                          replaces the ids that are on this machine
    revisions(config)                         {field: id and revision}, for the run folder
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from megatron_distill.config import RunConfig
from megatron_distill.errors import ConfigError

Kind = Literal["model", "dataset"]
_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.-]+))?(?P<rest>(?::[\w./-]+)?(?:\[\d*:\d*\])?)"
)
_FILE = re.compile(r"\.(jsonl?|csv|parquet|py)$")
_SNAPSHOT = re.compile(r"/(?:models|datasets)--(?P<id>[^/]+)/snapshots/(?P<revision>[0-9a-f]{7,64})(?=$|[/:\[])")
_OF_MODELS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # no other weights, no training states


def hub_id(text: str) -> re.Match[str] | None:
    """The parts of a place that is a hub id: ``id``, ``revision``, and the ``rest`` (a split, rows); None for a path."""
    found = _ID.fullmatch(text)
    if found is None or os.path.exists(text) or os.path.exists(found["id"]) or _FILE.search(found["id"]):
        return None
    return found


def local_place(text: str, kind: Kind) -> str:
    """A place with its hub id replaced by the folder that was fetched; as it is if it is a path, or was not fetched."""
    found = hub_id(text)
    if found is None:
        return text
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            found["id"],
            repo_type=kind,
            revision=found["revision"],
            local_files_only=True,
            allow_patterns=_patterns(kind),
        )
    except (OSError, ValueError):  # not there, or not all of it; preflight tells what to type
        return text
    return f"{folder}{found['rest']}"


def resolved(config: RunConfig) -> RunConfig:
    """A config in which every hub id that was fetched is a local folder."""
    return _with_places(config, lambda where, text, kind: local_place(text, kind))


def unresolved_remedy(text: str) -> str:
    """What to type for a place that is not on this machine, if it may be a hub id; else empty."""
    return f" If it is a hub id, type: megatron-distill fetch {text}" if hub_id(text) else ""


def places(config: RunConfig) -> dict[str, tuple[str, Kind]]:
    """``{field: (place, kind)}`` of everything that a config takes from a path or the hub."""
    found: dict[str, tuple[str, Kind]] = {}

    def note(where: str, text: str, kind: Kind) -> str:
        found[where] = (text, kind)
        return text

    _with_places(config, note)
    return {where: place for where, place in found.items() if place[0]}


def revisions(config: RunConfig) -> dict[str, dict[str, str]]:
    """The hub ids and revisions behind a resolved config's folders, by field."""
    found = {}
    for where, (text, _) in places(config).items():
        if snapshot := _SNAPSHOT.search(os.path.abspath(text)):
            found[where] = {"id": snapshot["id"].replace("--", "/"), "revision": snapshot["revision"]}
    return found


def fetch(text: str, kind: Kind) -> Path:
    """Bring what a hub id names onto this machine, or find it there.

    Args:
        text: ``owner/name``, with ``@revision`` if not the latest.
        kind: of repository.

    Returns:
        The local folder.

    Raises:
        ConfigError: it is no id, the hub does not know it or cannot be reached, or asks for a token.
    """
    found = hub_id(text)
    if found is None:
        raise ConfigError(
            f"fetch = {text!r}: no hub id. It reads owner/name, with @revision if you want a certain one."
        )
    from huggingface_hub import constants, errors, snapshot_download

    where = f"{kind} {found['id']}" + (f" at revision {found['revision']}" if found["revision"] else "")
    try:
        folder = snapshot_download(
            found["id"], repo_type=kind, revision=found["revision"], allow_patterns=_patterns(kind)
        )
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{where}: its owner asks for consent. Give it on https://huggingface.co/{found['id']}, then type: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{where}: the hub knows no such revision. Name a branch, a tag or a commit.") from error
    except errors.RepositoryNotFoundError as error:
        other = "without --dataset" if kind == "dataset" else "with --dataset if it is a data set"
        raise ConfigError(
            f"{where}: the hub knows none, or hides it. Check the spelling; try {other}; for a private one type: hf auth login"
        ) from error
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.IncompleteSnapshotError,
        OSError,
    ) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else str(error).splitlines()[0][:160]
        raise ConfigError(
            f"{where}: not on this machine, and the hub cannot be reached ({reason}). Fetch it where "
            "there is a network, into a cache that this machine sees (HF_HOME), or copy the directory and name its path."
        ) from error
    return Path(folder)


def _patterns(kind: Kind) -> list[str] | None:
    return list(_OF_MODELS) if kind == "model" else None


def _with_places(config: RunConfig, change: Callable[[str, str, Kind], str]) -> RunConfig:
    """The config with each of its places changed by a function of (field, place, kind)."""

    def changed(where: str, section: Any, name: str, kind: Kind) -> Any:
        text = getattr(section, name)
        return replace(section, **{name: change(f"{where}.{name}", text, kind)})

    data = config.data
    for name in ("train_path", "heldout_path"):
        data = changed("data", data, name, "dataset")
    sources = tuple(
        changed(f"data.sources[{number}]", source, "path", "dataset") for number, source in enumerate(data.sources)
    )
    return replace(
        config,
        student=changed("student", config.student, "path", "model"),
        teacher=changed("teacher", config.teacher, "path", "model"),
        data=replace(data, sources=sources),
    )
