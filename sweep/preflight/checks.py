"""Check the inputs of a sweep before it starts: the corpus, the models, and every model structure of the search.

The structures are built without weights. A mistake is then one line at the start, and not a failed trial hours later.
"""

from collections.abc import Iterator

from data.errors import ConfigError, UserError
from data.loading.tasks import answer_sets, has_audio
from model.checkpoints.base_files import base_models, check_adapter, check_model
from model.checkpoints.fingerprint import BaseIdentity, Bases, identify, identify_bases, start_identity
from model.evaluation.split_data import TrialData
from model.objectives.class_weights import resolve_balanced
from model.speech_llm.speech_llm import SpeechLLM
from sweep.config.loader import flat
from sweep.config.resolve import PREFIX, ResolvedConfig, resolve
from sweep.config.schema import Config
from sweep.execution.trial import open_shards
from sweep.search.candidates import resolve_candidate, structures
from sweep.search.study import StudyBases

STARTS = ("model.init_from", "model.adapter.init_from", "model.lora.init_from")  # settings that name trained weights


def resolve_inputs(config: Config, allow_other_base: bool = False) -> ResolvedConfig:
    """Resolve a configuration, and check its corpus, its models and the structures of its search.

    Args:
        config: of the sweep.
        allow_other_base: accept that `model.init_from` was trained on another base model.

    Raises:
        UserError: a shard is missing or corrupt, a split has no items of a task, an unknown label has a weight, an
            example is too long, a model is missing or does not fit its settings, or a modality needs audio and the
            corpus has none.
    """
    check_bases(config)
    resolved = resolve(config)
    shards = open_shards(resolved)
    shards.verify()
    check_audio(resolved, has_audio(shards))
    measured = set()
    for values in structures(resolved):
        trial = resolve_candidate(resolved, values)
        if trial is None:
            continue
        bases = identify_bases(trial.model, fetch=True)
        model = skeleton(trial, bases, allow_other_base)
        resolve_balanced(trial.train, model.tasks)
        if (lengths := _lengths(trial)) not in measured:
            measured.add(lengths)
            TrialData.open(open_shards(trial), model, trial.data, ("train", "val"), teacher=trial.train.has_teacher)
    return resolved


def _lengths(config: Config) -> str:
    """Return the settings on which the lengths of examples depend; they are measured once for each."""
    irrelevant = {"lora", "trainable", "init_from", "init_partial", "precision", "priors"}
    return repr((config.model.model_dump(exclude=irrelevant), config.tasks.active(), config.data.fold))


def check_bases(config: Config) -> None:
    """Check the files of all models that a search starts from. Reads headers, makes nothing and loads nothing.

    Raises:
        ConfigError: a file is missing or damaged, in one line that names it.
    """
    for trial in _structured_trials(config):
        for setting, path, part in base_models(trial.model):
            if not path.startswith(PREFIX):
                check_model(setting, path, part)
        if trial.model.lora.enabled and trial.model.lora.init_from is not None:
            check_adapter(trial.model.lora, trial.model.lora.init_from)


def study_bases(config: Config) -> StudyBases:
    """Return what identifies the models that a search starts from, for its study: by setting and value.

    Raises:
        UserError: a file is missing or damaged, or cannot be downloaded.
    """
    found: dict[str, dict[str, BaseIdentity]] = {}
    for trial in _structured_trials(config):
        settings, resolved = flat(trial), resolve(trial)
        for setting, path, part in base_models(resolved.model):
            if settings[setting] not in found.setdefault(setting, {}):
                identity = identify(setting, path, part, fetch=True)
                assert identity is not None, "it was fetched"
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


def skeleton(config: ResolvedConfig, bases: Bases | None = None, allow_other_base: bool = False) -> SpeechLLM:
    """Return the model of a configuration without its weights.

    Raises:
        UserError: see `SpeechLLM`.
    """
    answers = answer_sets(open_shards(config), config.tasks.active())
    return SpeechLLM(config.model, answers, "meta", bases=bases, allow_other_base=allow_other_base)


def check_audio(config: Config, has_audio: bool) -> None:
    """Check that the corpus has audio if a modality needs it.

    Raises:
        UserError: it has none.
    """
    axis = config.search.space.get("model.modality")
    modalities = [config.model.modality] if axis is None else axis.extremes()
    if any(modality != "text" for modality in modalities) and not has_audio:
        raise UserError(
            f"{config.data.shards}: model.modality {' / '.join(map(str, modalities))} needs audio, and this corpus is "
            "text only; use --set model.modality=text, or prepare the corpus with --audio"
        )
