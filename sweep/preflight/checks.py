"""What a sweep needs before it starts: corpus and models are looked at, and every structure that the search may ask for
is built without weights, so that a mistake is one line now and not a failed trial later."""

from data.errors import UserError
from data.loading.tasks import answer_sets, has_audio
from model.evaluation.split_data import TrialData
from model.objectives.class_weights import resolve_balanced
from model.speech_llm.speech_llm import SpeechLLM
from sweep.config.resolve import ResolvedConfig, resolve
from sweep.config.schema import Config
from sweep.execution.trial import open_shards
from sweep.search.candidates import resolve_candidate, structures


def resolve_inputs(config: Config) -> ResolvedConfig:
    """Make what is built in, and check the rest.

    Raises:
        UserError: a shard is missing or corrupt, a split has nothing for a task, a label that there is not has a
            weight, an example does not fit, a model is not to be found or does not fit its settings, or the corpus has
            no sound and an axis wants it.
    """
    resolved = resolve(config)
    shards = open_shards(resolved)
    shards.verify()
    check_sound(resolved, has_audio(shards))
    measured = set()
    for values in structures(resolved):
        trial = resolve_candidate(resolved, values)
        if trial is None:
            continue
        model = skeleton(trial)
        resolve_balanced(trial.train, model.tasks)
        if (lengths := _lengths(trial)) not in measured:
            measured.add(lengths)
            TrialData.open(open_shards(trial), model, trial.data, ("train", "val"), teacher=trial.train.has_teacher)
    return resolved


def _lengths(config: Config) -> str:
    """The settings that decide how long an example is: others need not be measured anew."""
    lora = {"lora", "trainable", "init_from", "init_partial", "precision", "priors"}
    return repr((config.model.model_dump(exclude=lora), config.tasks.active(), config.data.fold))


def skeleton(config: ResolvedConfig) -> SpeechLLM:
    """The model of a configuration without its weights.

    Raises:
        UserError: see `SpeechLLM`.
    """
    shards = open_shards(config)
    return SpeechLLM(config.model, answer_sets(shards, config.tasks.active()), "meta")


def check_sound(config: Config, audible: bool) -> None:
    """Raise a UserError where a modality needs sound and the corpus has none."""
    axis = config.search.space.get("model.modality")
    wanted = [config.model.modality] if axis is None else axis.extremes()
    if any(modality != "text" for modality in wanted) and not audible:
        raise UserError(
            f"{config.data.shards}: model.modality {' / '.join(map(str, wanted))} needs sound and this corpus is text "
            "only; use --set model.modality=text, or prepare the corpus with --audio"
        )
