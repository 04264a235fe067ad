"""The pretrained models and trained weights that the trials of a search may start from: their files and identities.

Imports no torch: a model that cannot be used is reported before the seconds that this takes.
"""

from collections.abc import Iterator

from data.errors import ConfigError
from model.checkpoints.audio_llms import check_audio_llm
from model.checkpoints.base_files import base_models, check_adapter, check_model
from model.checkpoints.fingerprint import BaseIdentity, identify, start_identity
from sweep.config.loader import flat
from sweep.config.resolve import PREFIX, resolve
from sweep.config.schema import Config
from sweep.search.candidates import structures
from sweep.search.study_storage import StudyBases

STARTS = ("model.init_from", "model.adapter.init_from", "model.lora.init_from")  # settings that name trained weights


def check_bases(config: Config) -> None:
    """Check the files of all models that a search starts from. Reads headers, makes nothing and loads nothing.

    Raises:
        ConfigError: a file is missing or damaged, in one line that names it.
    """
    for trial in _structured_trials(config):
        check_audio_llm(trial.model)
        for setting, path, part in base_models(trial.model):
            if not path.startswith(PREFIX):
                check_model(setting, path, part)
        if trial.model.lora.enabled and trial.model.lora.init_from is not None:
            check_adapter(trial.model.lora, trial.model.lora.init_from)


def study_bases(config: Config, fetch: bool = True) -> StudyBases:
    """Return what identifies the models that a search starts from, for its study: by setting and value.

    Args:
        config: of the sweep.
        fetch: download the files of Hugging Face ids that are missing; otherwise such ids are left out.

    Raises:
        UserError: a file is missing or damaged, or cannot be downloaded.
    """
    found: dict[str, dict[str, BaseIdentity]] = {}
    for trial in _structured_trials(config):
        settings, resolved = flat(trial), resolve(trial)
        for setting, path, part in base_models(resolved.model):
            if settings[setting] not in found.setdefault(setting, {}):
                identity = identify(setting, path, part, fetch=fetch)
                if identity is not None:
                    found[setting][settings[setting]] = identity
        for setting in STARTS:
            if settings[setting] is not None and settings[setting] not in found.setdefault(setting, {}):
                found[setting][settings[setting]] = start_identity(settings[setting])
    return found


def _structured_trials(config: Config) -> Iterator[Config]:
    """Yield a trial of each structure that the search may draw, see `structures`."""
    for values in structures(config):
        try:
            yield config.for_trial(values)
        except ConfigError:
            continue  # a trial that draws them reports it
