"""Fingerprints of pretrained models: with what a result was computed.

The identity of a model is the digest of its files (`identify`): the content of the weights, and of the settings and the
tokenizer as far as they change results. It is stored in studies, checkpoints and exports, and compared before a
checkpoint is used again. Reading all weights takes seconds for each gigabyte, so the sha256 of a large file is kept in
the user's cache folder, under the file's path, size and times; where that cannot be written, each process reads the
weights once. Nothing of this imports torch.

`model_digest` is a hash of the tensors as torch holds them. Keys of the feature cache contain it, and stay valid. It is
derived from the identity: computed once for each (`derived_digest`), and kept beside it.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, TypeAdapter

from data.atomic import write_file
from data.errors import UnavailableError, UserError
from data.user_cache import user_cache
from model.checkpoints.base_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ModelFiles,
    Part,
    base_models,
    check_model,
    download,
)
from model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

# Settings that change no number.
IGNORED = {"_name_or_path", "transformers_version", "architectures", "dtype"}
IGNORED_IN_FILES = IGNORED | {"_model_name_or_path", "name_or_path", "torch_dtype", "processor_class"}
# Files that trained weights are read from, in the folders that may hold them.
START_FILES = (
    "checkpoint.pt",
    "labels.json",
    "speech.safetensors",
    *(f"{folder}{name}" for folder in ("", "lora/") for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)),
)
LARGE = 2**20  # bytes: the digests of smaller files are not worth a file of their own
READERS = 4  # files that are read at the same time
ALLOW = "--allow-other-base"
_digests: dict[tuple[object, ...], str] = {}  # of files that this process has read


class OtherBaseError(UserError):
    """A pretrained model is not the one that earlier results were computed with."""

    common = True
    outside = True
    reason = "bad data"


class BaseIdentity(BaseModel):
    """A pretrained model, as it was when something was computed with it."""

    model_config = ConfigDict(frozen=True)
    path: str  # Hugging Face id or folder
    digest: str  # of its files
    revision: str | None = None  # commit of a Hugging Face id

    def __str__(self) -> str:
        return self.digest if self.revision is None else f"{self.digest} (revision {self.revision[:12]})"


Bases = Mapping[str, BaseIdentity]  # by setting, as model.llm.path
BASES = TypeAdapter(dict[str, BaseIdentity])


def identify(setting: str, path: str, part: Part, *, fetch: bool = False) -> BaseIdentity | None:
    """Return what identifies a pretrained model; equal digests mean equal results.

    Args:
        setting: key of the configuration, for messages.
        path: Hugging Face id or local folder.
        part: what it is used as: the tokenizer of an encoder, for example, changes nothing.
        fetch: download the files of an id that are missing.

    Returns:
        The identity; None for an id that is not completely downloaded, without `fetch`.

    Raises:
        UnavailableError: a file is missing or damaged, or cannot be downloaded.
    """
    files = download(setting, path, part) if fetch else check_model(setting, path, part)
    if files is None:
        return None
    revision = None if Path(path).is_dir() else files.settings[0].parent.name  # the folder of a commit
    try:
        return BaseIdentity(path=path, digest=_files_digest(files), revision=revision)
    except OSError as error:
        raise UnavailableError(f"{setting}: {path}: cannot be read ({error.strerror}); check rights and disk") from None


def start_identity(path: str) -> BaseIdentity:
    """Return what identifies trained weights that a trial starts from: a file, or the folder of a trial, an export or a
    PEFT adapter. Any change of a file counts."""
    folder = Path(path)
    files = [folder] if folder.is_file() else [folder / name for name in START_FILES if (folder / name).is_file()]
    lines = [f"{file.relative_to(folder)} {file_digest(file)}" for file in files]
    return BaseIdentity(path=path, digest=hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16])


def identify_bases(config: ModelConfig, *, fetch: bool = False) -> dict[str, BaseIdentity]:
    """Return what identifies the pretrained models of a configuration, see `identify`."""
    found = {setting: identify(setting, path, part, fetch=fetch) for setting, path, part in base_models(config)}
    return {setting: identity for setting, identity in found.items() if identity is not None}


def _files_digest(files: ModelFiles) -> str:
    """Return the digest of the files of a model, whatever the weights are called and however JSON is laid out."""
    with ThreadPoolExecutor(READERS) as readers:
        lines = sorted(readers.map(file_digest, files.weights))
    lines += [f"{path.name} {file_digest(path)}" for path in files.tokenizer if path.name != "tokenizer_config.json"]
    for path in (*files.settings, *(path for path in files.tokenizer if path.name == "tokenizer_config.json")):
        settings = json.loads(path.read_text(encoding="utf-8"))
        lines.append(f"{path.name} {_settings_text(settings, IGNORED_IN_FILES)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the sha256 of a file as hex digits, from memory or the user's cache if nothing says that it changed."""
    real = path.resolve()
    stat = real.stat()
    key = (str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _digests:
        cached = _cache_file("files", str(real))
        digest = _read_cache(cached, key) if stat.st_size >= LARGE else None
        if digest is None:
            with real.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if stat.st_size >= LARGE:
                _write_cache(cached, key, digest)
        _digests[key] = digest
    return _digests[key]


def derived_digest(name: str, identity: BaseIdentity | None, compute: Callable[[], str]) -> str:
    """Return a digest that follows from an identity, computed once and kept in the user's cache.

    Args:
        name: of the digest and of all else that it depends on.
        identity: of the model; None: the digest is computed in every process.
        compute: returns the digest.
    """
    if identity is None:
        return compute()
    key = (name, identity.digest)
    if key not in _digests:
        cached = _cache_file("models", f"{name} {identity.digest}")
        digest = _read_cache(cached, key)
        if digest is None:
            _write_cache(cached, key, digest := compute())
        _digests[key] = digest
    return _digests[key]


def _cache_file(kind: str, name: str) -> Path | None:
    try:
        return user_cache() / "digests" / kind / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    except RuntimeError:  # the user has no home
        return None


def _read_cache(path: Path | None, key: tuple[object, ...]) -> str | None:
    """Return the digest of a cache file, if it was written for this key."""
    try:
        content = json.loads(path.read_bytes()) if path else {}
        digest = content["digest"] if content["key"] == list(key) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if isinstance(digest, str) else None


def _write_cache(path: Path | None, key: tuple[object, ...], digest: str) -> None:
    """Write a cache file, if that is possible: a home may be read-only, and the digest is computed again then."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.unfinished-{os.getpid()}-{threading.get_ident()}")
        write_file(path, json.dumps({"key": key, "digest": digest}), temporary=temporary)
    except OSError:
        pass


def write_bases(bases: Bases) -> str:
    """Return base models as JSON."""
    return BASES.dump_json(dict(bases)).decode()


def read_bases(text: str) -> dict[str, BaseIdentity]:
    """Return what `write_bases` was given."""
    return BASES.validate_json(text)


def other_bases(then: Bases, now: Bases) -> str:
    """Return which models are not what they were, in words; empty if all are, as far as that is known."""
    changed = [(setting, then[setting], now[setting]) for setting in sorted(then.keys() & now.keys())]
    return "; ".join(
        f"{setting} {new.path} was {old} and is now {new}" for setting, old, new in changed if old.digest != new.digest
    )


def refuse_other_bases(subject: str, then: Bases, now: Bases) -> None:
    """Refuse to continue with other pretrained models.

    Args:
        subject: what was computed with the former ones, for the message.
        then: the former ones; those that were not recorded are accepted.
        now: the present ones.

    Raises:
        OtherBaseError: a model has another digest.
    """
    if changes := other_bases(then, now):
        raise OtherBaseError(
            f"{subject}: made with another base model ({changes}); restore its files, or accept other results with "
            f"{ALLOW}"
        )


def digest(tensors: "Mapping[str, Tensor]") -> str:
    """Return 16 hex digits of the sha256 of tensors and their names; equal digests mean equal bits."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode())
        content.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def model_digest(tensors: "Mapping[str, Tensor]", settings: Mapping[str, object]) -> str:
    """Return a hash of a model's weights and of those of its settings that change what it computes."""
    content = _settings_text(settings, IGNORED)
    return hashlib.sha256(f"{digest(tensors)} {content}".encode()).hexdigest()[:16]


def _settings_text(settings: Mapping[str, object], ignored: set[str]) -> str:
    return json.dumps({name: settings[name] for name in settings.keys() - ignored}, sort_keys=True, default=str)
