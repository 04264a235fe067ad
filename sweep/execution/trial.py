"""One trial: from its configuration to a trained, evaluated model, in a worker of a group or in a plain process."""

import functools
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from data.atomic import write_file
from data.errors import StorageError, UnavailableError
from data.loading.cached_arrays import CacheFolders
from data.loading.tasks import answer_sets, items_of_share
from data.shards.dataset import Shards
from model.checkpoints.checkpoint import FILE, PREVIOUS
from model.checkpoints.fingerprint import Bases, OtherBaseError, other_bases, read_bases
from model.evaluation.llm_check import resolve_packing
from model.evaluation.split_data import TrialData
from model.objectives.class_weights import resolve_balanced
from model.runtime import memory
from model.runtime.distributed import in_turns, on_first_worker, world
from model.speech_llm.kernels import compile_layers, set_kernels
from model.speech_llm.packing import set_packing
from model.speech_llm.sharding import device_mesh
from model.speech_llm.speech_llm import SpeechLLM
from model.training.progress import Metrics, Objective
from model.training.random_state import seed_everything
from model.training.trainer import Report, TrialInterrupted, fit, never
from sweep.config.paths import share_folder
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config
from sweep.execution.job import TrialJob
from sweep.search.cost import COSTS

AnyConfig = TypeVar("AnyConfig", bound=Config)
DONE = "done.json"  # in the folder of a share: what its training has reported, by epoch
LIVE = CacheFolders()  # nothing is cached: the trial computes features and teacher logits itself


def open_shards(config: ResolvedConfig) -> Shards:
    """Open the corpus of a configuration, once per process."""
    return _open(config.data.shards, config.data.fold, config.data.codes)


@functools.lru_cache(maxsize=16)  # folds that a sweep may cycle through
def _open(folder: str, fold: int, codes: str | None) -> Shards:
    return Shards(folder, fold, codes)


def with_class_weights(config: AnyConfig, shards: Shards) -> AnyConfig:
    """Return the configuration with numbers where it asks for balanced classes; a trial's `config.yaml` has them.

    Raises:
        ConfigError: it has numbers for a task or a label that does not exist.
    """
    if (config.train.class_weights, config.train.sampling) == ("equal", "none"):
        return config
    train = resolve_balanced(config.train, answer_sets(shards, config.tasks.active()))
    return config.model_copy(update={"train": train})


def configure_process(config: Config) -> None:
    """Set threads, random seeds and arithmetic of this process as for a trial."""
    # Convolutions on a GPU round fp32 to TF32 by default, which would break the equality of batch sizes.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(config.resources.threads)
    seed_everything(config.seed)


def build(
    config: ResolvedConfig,
    reader: str,
    splits: Sequence[str],
    device: str,
    cached: CacheFolders = LIVE,
    expected: Bases | None = None,
    allow_other_base: bool = False,
    share: float = 1.0,
) -> tuple[SpeechLLM, TrialData]:
    """Return the model of a trial before training, and its data.

    Args:
        config: of the trial.
        reader: "ray" or "local".
        splits: to open.
        device: "cpu" or "cuda".
        cached: folders of precomputed numbers.
        expected: the base models that the driver of a sweep found, by setting; None: outside a sweep.
        allow_other_base: accept a checkpoint that was trained on other base models.
        share: of the training groups, see `items_of_share`.

    Raises:
        ConfigError: `train.packing` is on, `train.kernels` is liger, or the LLM is to be sharded, and it cannot.
        OtherBaseError: this machine has other base models than the driver's.
    """
    configure_process(config)
    shards = open_shards(config)
    answers = answer_sets(shards, config.tasks.active())
    make = functools.partial(
        SpeechLLM,
        config.model,
        answers,
        encodes=not cached.features,
        bases=expected,
        allow_other_base=allow_other_base,
    )
    if config.resources.shard and world()[1] > 1:
        device_mesh(device)
        model = in_turns(functools.partial(_sharded, make, device))
    else:
        model = make(device=device)
    set_packing(model.llm, resolve_packing(config.model, config.train.packing, device))
    set_kernels(model.llm, config.train.kernels)
    if config.train.compile == "on":
        compile_layers(model.llm)
    if changes := other_bases(expected or {}, model.bases):
        raise OtherBaseError(
            f"{socket.gethostname()}: {changes}, while the sweep runs; restore the files, on all nodes"
        )
    return model, TrialData.open(
        shards,
        model,
        config.data,
        splits,
        reader,
        teacher=config.train.has_teacher,
        features=cached.features,
        teacher_logits=cached.teacher_logits,
        votes=config.train.labels == "votes",
        select=functools.partial(items_of_share, share),
    )


def _sharded(make: Callable[..., SpeechLLM], device: str) -> SpeechLLM:
    """Return a model of whose LLM this worker has a part.

    It is read as a whole, into the memory of the host. So the workers of a machine take turns, and it is forgotten:
    another trial reads its files again.
    """
    model = make(device="cpu")
    model.shard(device)
    memory.forget_models()
    return model


def available_device() -> str:
    """Return the device of a process that runs outside Ray."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_trial(
    config: ResolvedConfig,
    folder: Path,
    report: Report,
    reader: str,
    device: str,
    interrupted: Callable[[], bool] = never,
    cached: CacheFolders = LIVE,
    expected: Bases | None = None,
    allow_other_base: bool = False,
    share: float = 1.0,
) -> None:
    """Train a trial to its end, resuming from its checkpoint in `folder`; see `build` and `fit`.

    Raises:
        TrialInterrupted: `interrupted` returned True; the checkpoint is written.
    """
    model, data = build(config, reader, ("train", "val"), device, cached, expected, allow_other_base, share)
    objective = Objective(config.search.metric, maximize=config.search.direction == "maximize")
    fit(model, data, config.train, config.tasks, config.seed, folder, report, interrupted, objective)


def run_shares(
    config: ResolvedConfig, folder: Path, report: Report, train: Callable[[float, Path, Report], None]
) -> None:
    """Train on each share of the training groups, one after another, and report the epochs of all of them in one count.

    What the training on a share has reported is kept in its folder once it is over, and reported again after a resume.

    Args:
        config: of the trial.
        folder: of the trial.
        report: called with the epochs of all shares.
        train: trains on a share to the end, from what is in the folder on, and calls its report.
    """
    costs: Mapping[str, float] = {}  # of the shares before
    for number, share in enumerate(config.search.shares):
        part, history = share_folder(folder, share), list[tuple[int, Metrics]]()

        def report_part(
            epoch: int,
            metrics: Metrics,
            first: int = number * config.train.epochs,
            before: Mapping[str, float] = costs,
            history: list[tuple[int, Metrics]] = history,
        ) -> None:
            total = metrics | {name: metrics[name] + before.get(name, 0) for name in COSTS if name in metrics}
            history.append((first + epoch, total))
            report(first + epoch, total)

        if number == len(config.search.shares) - 1:
            train(share, part, report_part)
            return
        path = part / DONE
        known = on_first_worker(functools.partial(_history, path))
        for epoch, metrics in known or ():
            report(epoch, metrics)
        if known is None:
            part.mkdir(parents=True, exist_ok=True)
            train(share, part, report_part)
            known = history
            if world()[0] == 0:
                write_file(path, json.dumps(history))
                for name in (FILE, PREVIOUS):
                    (part / name).unlink(missing_ok=True)
        costs = {name: value for name, value in known[-1][1].items() if name in COSTS}


def _history(path: Path) -> list[tuple[int, Metrics]] | None:
    """Return what the training on a share has reported; None if it is not over."""
    return [(epoch, metrics) for epoch, metrics in json.loads(path.read_bytes())] if path.exists() else None


def fit_job(job: TrialJob, report: Report, interrupted: Callable[[], bool]) -> bool:
    """Run a trial in a worker of a group.

    Returns:
        Whether the trial trained to its end; otherwise it was interrupted.
    """
    config, folder = ResolvedConfig.model_validate_json(job.config), Path(job.folder)
    if not (folder / "config.yaml").exists():
        raise StorageError(
            f"{folder}: not visible on node {socket.gethostname()}; --out must be on storage that all nodes share"
        )
    device = config.resources.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            "resources.gpus_per_worker: this worker finds no CUDA device; install a driver, or set it to 0"
        )
    logits = Path(job.teacher_logits) if job.teacher_logits else None
    cached = CacheFolders(tuple(map(Path, job.features)), logits)
    bases = read_bases(job.bases)

    def train(share: float, part: Path, report: Report) -> None:
        run_trial(config, part, report, job.reader, device, interrupted, cached, bases, job.allow_other_base, share)

    try:
        run_shares(config, folder, report, train)
    except TrialInterrupted:
        return False
    return True
