"""Check the inputs of a sweep before it starts: the corpus, the models, and every model structure of the search.

The structures are built without weights. A mistake is then one line at the start, and not a failed trial hours later.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

from data.errors import ConfigError, MisfitError, UserError
from data.loading.tasks import answer_sets, check_votes, has_audio, training_groups
from model.checkpoints.fingerprint import Bases, identify_bases
from model.evaluation.llm_check import check_llm, resolve_packing
from model.evaluation.split_data import TrialData
from model.objectives.class_weights import resolve_balanced
from model.speech_llm.kernels import check_kernels
from model.speech_llm.speech_llm import SpeechLLM
from sweep.config.resolve import ResolvedConfig, resolve
from sweep.config.schema import Config
from sweep.config.search import LEAST_GROUPS
from sweep.config.space import Value
from sweep.execution.trial import open_shards
from sweep.search.base_models import check_bases
from sweep.search.candidates import resolve_candidate, structures

# While transformers builds a model, it changes settings of torch for the whole process.
building = threading.RLock()
TURN = 0.01  # s


@contextlib.contextmanager
def building_in_turns() -> Iterator[None]:
    """Hold the lock `building`, and then pause: a loop would take it again before a trial that starts gets it."""
    with building:
        yield
    time.sleep(TURN)


def resolve_inputs(config: Config, allow_other_base: bool = False, fetch: bool = True) -> ResolvedConfig:
    """Resolve a configuration, and check its corpus, its models and the structures of its search.

    Args:
        config: of the sweep.
        allow_other_base: accept that `model.init_from` was trained on another base model.
        fetch: download the files of Hugging Face ids that are missing.

    Raises:
        UserError: a shard is missing or corrupt, a split has no items of a task, an unknown label has a weight, an
            example is too long, a model is missing or does not fit its settings, a modality needs audio and the corpus
            has none, or training needs votes and no training turn has several annotators.
    """
    check_bases(config)
    resolved = resolve(config)
    shards = open_shards(resolved)
    shards.verify()
    check_audio(resolved, has_audio(shards))
    if resolved.search.fidelity == "data" and (count := len(training_groups(shards))) < LEAST_GROUPS:
        raise MisfitError(
            f"search.fidelity: data needs {LEAST_GROUPS} groups of sessions in the training split, since the first "
            f"share is {resolved.search.shares[0]:.0%}, and {resolved.data.shards} has {count}; set it to epochs"
        )
    if "votes" in _values(resolved, "train.labels", resolved.train.labels):
        check_votes(shards, resolved.tasks.active())
    measured = set()
    for values in structures(resolved):
        trial = resolve_candidate(resolved, values)
        if trial is None:
            continue
        bases = identify_bases(trial.model, fetch=fetch)
        model = skeleton(trial, bases, allow_other_base)
        resolve_balanced(trial.train, model.tasks)
        if (lengths := _lengths(trial)) not in measured:
            measured.add(lengths)
            data = TrialData.open(
                open_shards(trial), model, trial.data, ("train", "val"), teacher=trial.train.has_teacher
            )
            _check_token_budget(resolved, data)
    return resolved


def _check_token_budget(config: Config, data: TrialData) -> None:
    """Check that the longest example fits into the smallest token budget of the trials.

    Raises:
        ConfigError: it does not.
    """
    values = _values(config, "train.token_budget", config.train.token_budget)
    budget = min((value for value in values if isinstance(value, int)), default=None)
    splits = data.splits.values()
    longest, (_, row) = max(
        (sum(cost), item) for split in splits for cost, item in zip(split.costs, split.items, strict=True)
    )
    if budget is not None and longest > budget:
        raise ConfigError(
            f"train.token_budget: {budget} is smaller than the longest example, {data.shards.columns['id'][row]}, "
            f"which takes {longest} tokens and frames; set at least {longest}, or auto"
        )


def _lengths(config: Config) -> str:
    """Return the settings on which the lengths of examples depend; they are measured once for each."""
    irrelevant = dict.fromkeys(("lora", "trainable", "init_from", "init_partial", "precision", "priors"), True)
    return repr(
        (config.model.model_dump(exclude={**irrelevant, "encoder": {"lora"}}), config.tasks.active(), config.data.fold)
    )


def skeleton(config: ResolvedConfig, bases: Bases | None = None, allow_other_base: bool = False) -> SpeechLLM:
    """Return the model of a configuration without its weights.

    Raises:
        UserError: see `SpeechLLM`, `check_llm`, `resolve_packing` and `check_kernels`.
    """
    answers = answer_sets(open_shards(config), config.tasks.active())
    model = SpeechLLM(config.model, answers, "meta", bases=bases, allow_other_base=allow_other_base)
    check_llm(config.model.llm)
    resolve_packing(config.model, config.train.packing, "meta")
    check_kernels(model.llm, config.train.kernels, config.resources.device)
    return model


def check_audio(config: Config, has_audio: bool) -> None:
    """Check that the corpus has audio if a modality needs it.

    Raises:
        UserError: it has none.
    """
    modalities = _values(config, "model.modality", config.model.modality)
    if any(modality != "text" for modality in modalities) and not has_audio:
        raise UserError(
            f"{config.data.shards}: model.modality {' / '.join(map(str, modalities))} needs audio, and this corpus is "
            "text only; use --set model.modality=text, or prepare the corpus with --audio"
        )


def _values(config: Config, key: str, value: Value) -> list[Value]:
    """Return the values that a setting has in the trials: its own, or those of its axis."""
    axis = config.search.space.get(key)
    return [value] if axis is None else axis.extremes()
