"""Resolve the inputs of a configuration: built-in names and local paths become absolute paths.

The built-in inputs are the synthetic corpus and the tiny models. They are made on first use and cached by version.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from data.atomic import shared_folder
from data.corpus import synthetic
from data.corpus.config import CorpusConfig, SplitConfig
from data.corpus.schema import SCHEMA_VERSION
from data.errors import ConfigError
from data.user_cache import user_cache
from model.config import TINY_VERSION
from sweep.config.loader import flat
from sweep.config.schema import Config

PREFIX = "builtin:"
MAKE_SECONDS = 1800.0  # for a built-in input to be made


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
    _make_all(missing(config))
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
    named = {key: settings[key].removeprefix(PREFIX) for key in KEYS if settings[key].startswith(PREFIX)}
    for key, name in named.items():
        if name not in MAKERS:
            known = ", ".join(PREFIX + maker for maker in MAKERS)
            raise ConfigError(f"{key}: {PREFIX}{name} is not built in; use one of {known}, or a path")
    return named


def _folder(name: str) -> Path:
    """Return the folder of a built-in input: in $SWEEP_CACHE, or in the user's cache folder."""
    return user_cache() / f"{name}-{synthetic.VERSION}.{TINY_VERSION}.{SCHEMA_VERSION}"


def _make_all(names: list[str]) -> None:
    """Make several inputs at the same time, each in a process with one thread.

    The processes do not import `__main__` as those of `multiprocessing` do: it may be a script that runs a sweep.
    """
    code = "import sys; from sweep.config.resolve import _make; _make(sys.argv[1])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    makers = [
        subprocess.Popen([sys.executable, "-c", code, name], env=environment, stderr=subprocess.PIPE, text=True)
        for name in names
    ]
    errors = [_output(maker) for maker in makers]
    for name, maker, error in zip(names, makers, errors, strict=True):
        if maker.returncode:
            raise OSError(f"{PREFIX}{name} cannot be made ({error.strip().rpartition(chr(10))[2]})")


def _output(maker: "subprocess.Popen[str]") -> str:
    """Return what a maker wrote to stderr; end one that hangs."""
    try:
        return maker.communicate(timeout=MAKE_SECONDS)[1]
    except subprocess.TimeoutExpired:
        maker.kill()
        return f"{maker.communicate(timeout=MAKE_SECONDS)[1]}\nnot done within {MAKE_SECONDS / 60:.0f} min"


def _make(name: str) -> None:
    with shared_folder(_folder(name)) as unfinished:
        MAKERS[name](unfinished)
