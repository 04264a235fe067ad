"""Resolve the inputs of a configuration: built-in names and local paths become absolute paths.

The built-in inputs are the synthetic corpus and the tiny models. They are made on first use and cached by version.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from data.atomic import shared_folder
from data.corpus import synthetic
from data.corpus.config import CorpusConfig, SplitConfig
from data.corpus.schema import SCHEMA_VERSION
from data.errors import ConfigError, reason
from data.user_cache import user_cache
from model.config import TINY_VERSION
from sweep.config.loader import flat
from sweep.config.schema import Config

PREFIX = "builtin:"
LOCK_SECONDS = 300.0  # to wait for another process that makes the same input; it takes some 15 s


def _make_corpus(folder: Path) -> None:
    from data.preparation.build import prepare

    prepare(synthetic.corpus(), folder, CorpusConfig(split=SplitConfig(fractions=(0.64, 0.18, 0.18))))


def _make_encoder(folder: Path) -> None:
    from model import tiny  # imports torch, which naming the inputs need not

    tiny.make_encoder(folder)


def _make_llm(folder: Path) -> None:
    from model import tiny

    tiny.make_llm(folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "synthetic": _make_corpus,
    "tiny-whisper": _make_encoder,
    "tiny-llama": _make_llm,
}
KEYS = ("data.shards", "model.encoder.path", "model.llm.path")
FILES = (*KEYS, "model.init_from", "model.adapter.init_from", "model.lora.init_from")


class ResolvedConfig(Config):
    """A configuration whose local inputs are absolute paths and whose built-in inputs have been made.

    `resolve` is its only source; its JSON travels to the workers. Changed values may name anything, so `with_values`
    returns a plain `Config`.
    """


def missing(config: Config) -> list[str]:
    """Return the built-in inputs of a configuration that have not been made.

    Raises:
        ConfigError: there is no built-in input of that name.
    """
    return sorted({name for name in _named(config).values() if not _folder(name).exists()})


def resolve(config: Config) -> ResolvedConfig:
    """Make missing built-in inputs, and replace built-in names and relative paths by absolute paths.

    Raises:
        ConfigError: there is no built-in input of that name.
    """
    for name in missing(config):
        _make(name)
    resolved = absolute(config).with_values({key: str(_folder(name)) for key, name in _named(config).items()})
    return ResolvedConfig.model_validate(dict(resolved))


def absolute(config: Config) -> Config:
    """Return the configuration with absolute paths, which are valid in other folders: Ray workers run in one each."""
    settings = flat(config)
    return config.with_values(
        {key: str(Path(settings[key]).absolute()) for key in FILES if settings[key] and Path(settings[key]).exists()}
    )


def _named(config: Config) -> dict[str, str]:
    """Return the settings that name a built-in input, with its name."""
    settings = flat(config)
    named = {key: settings[key].removeprefix(PREFIX) for key in KEYS if str(settings[key]).startswith(PREFIX)}
    for key, name in named.items():
        if name not in MAKERS:
            known = ", ".join(PREFIX + maker for maker in MAKERS)
            raise ConfigError(f"{key}: {PREFIX}{name} is not built in; use one of {known}, or a path")
    return named


def _folder(name: str) -> Path:
    """Return the folder of a built-in input: in $SWEEP_CACHE, or in the user's cache folder."""
    return user_cache() / f"{name}-{synthetic.VERSION}.{TINY_VERSION}.{SCHEMA_VERSION}"


def _make(name: str) -> None:
    """Make a built-in input here and not in a process of its own: that would import torch once more, and take as long.

    The makers compute with one thread and a random state of their own, so no input depends on the process. Of several
    processes one makes it, and the others wait.
    """
    folder = _folder(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        with contextlib.suppress(Timeout):  # what two processes make is the same
            lock.acquire(timeout=LOCK_SECONDS)
        try:
            if not folder.exists():  # another process may have made it while this one waited
                with shared_folder(folder) as unfinished:
                    MAKERS[name](unfinished)
        finally:
            lock.release()
    except OSError as error:
        raise OSError(f"{PREFIX}{name} cannot be made ({reason(error)})") from error
