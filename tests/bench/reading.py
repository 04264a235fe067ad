"""Reading a batch: stored clip → decoded → padded float32 tensor and lengths, per CPU-second of all processes.

Three hours of noise with the envelope of speech, in batches of 16 as the plan makes them, the same for all that can
read in a given order (WebDataset and lhotse's Shar read from front to back).
"""

import importlib.util
import io
import logging
import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import soundfile
import torch
from torch import Tensor

from data.config import DataConfig
from data.corpus.schema import SAMPLE_RATE
from data.loading.batching import Cost, plan
from data.loading.examples import Example, clip_samples
from data.loading.prefetch import Prefetcher
from data.loading.ray_source import ray_source
from data.loading.sources import local_source
from data.shards.dataset import Shards
from tests.bench.materials import made, noise
from tests.bench.measure import Cost as Spent
from tests.bench.measure import Row, in_turns, measured, ratios

CLIPS, SESSIONS, BATCH = 2520, 24, 16
ROUNDS, EPOCHS, RAY_ROUNDS = 8, 4, 6
CONFIG = DataConfig(history=0)
Steps = list[list[tuple[str, int]]]
Clips = Iterable[list[np.ndarray]]  # of a batch each, int16


def run() -> list[Row]:
    """Measure all readers."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    shards, steps = corpus()
    clips = [np.array(shards.pcm(row)) for row in range(len(shards.columns["id"]))]
    in_memory = Shards(shards.folder)
    in_memory.pcm = clips.__getitem__  # type: ignore[method-assign]
    works: dict[str, Callable[[], object]] = {
        "memory-mapped": lambda: consume(mapped(shards, steps)),
        "in-memory loader": lambda: consume(mapped(in_memory, steps)),
        "arrays in memory, no dialogue": lambda: consume([clips[row] for _, row in step] for step in steps),
        "DataLoader, 0 workers": lambda: loader(shards, steps, 0),
        "DataLoader, 2 workers": lambda: loader(shards, steps, 2),
    }
    missing = []
    for name, (module, make) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            missing.append(Row("memory-mapped", name, goal=1.0, note="not installed: uv pip install -e '.[bench]'"))
        else:
            read = make(shards, steps)
            works[name] = lambda read=read: consume(read())
    taken = in_turns({name: repeated(work) for name, work in works.items()}, ROUNDS)
    hours = EPOCHS * sum(shards.columns["n_samples"]) / SAMPLE_RATE / 3600
    speeds = {name: hours / statistics.median(cost.cpu for cost in costs) for name, costs in taken.items()}
    goals = {"in-memory loader": 0.9, "arrays in memory, no dialogue": None}
    rows = []
    for name in list(works)[1:]:
        note = f"{speeds[name]:.1f} h of audio a CPU-second; memory-mapped {speeds['memory-mapped']:.1f}"
        runs = ratios(taken[name], taken["memory-mapped"])
        rows.append(Row("memory-mapped", name, runs, goals.get(name, 1.0), note=note))
    return [*rows, *missing, through_ray()]


def repeated(work: Callable[[], object]) -> Callable[[], object]:
    """Return EPOCHS of some work: CPU time is counted in hundredths of a second."""
    return lambda: [work() for _ in range(EPOCHS)]


def corpus() -> tuple[Shards, Steps]:
    """Return the corpus, and one epoch over all of it, whatever the split."""
    shards = Shards(noise("reading-3", SESSIONS, CLIPS // SESSIONS))
    items = [("classify", row) for row in range(len(shards.columns["id"])) if shards.columns["n_samples"][row]]
    costs = [Cost(0, clip_samples(shards, item, CONFIG)) for item in items]
    return shards, [[items[position] for position in step] for step in plan(costs, batch_size=BATCH, seed=0, epoch=0)]


def padded(clips: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return int16 clips as float32 [B, N] in [-1, 1), and their lengths."""
    lengths = torch.tensor([len(clip) for clip in clips])
    waves = torch.empty(len(clips), int(lengths.max()))
    for wave, clip in zip(waves.numpy(), clips, strict=True):
        np.multiply(clip, np.float32(1 / 32768), out=wave[: len(clip)])
        wave[len(clip) :] = 0
    return waves, lengths


def consume(source: Clips) -> int:
    """Pad all batches; return the number of clips."""
    return sum(len(padded(clips)[1]) for clips in source)


def mapped(shards: Shards, steps: Steps) -> Clips:
    """Read as a trial does, examples and all, ahead by a thread."""
    return audio(Prefetcher(lambda: local_source(shards, CONFIG, True)(steps)))


def audio(batches: Iterable[list[Example]]) -> Clips:
    """Yield the clips of examples."""
    for batch in batches:
        yield [example.pcm for example in batch if example.pcm is not None]


class Rows(torch.utils.data.Dataset[np.ndarray]):
    """What a DataLoader reads."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __getitem__(self, row: int) -> np.ndarray:
        return self.shards.pcm(row)


def loader(shards: Shards, steps: Steps, workers: int) -> int:
    """Read the same files with a PyTorch DataLoader."""
    rows = [[row for _, row in step] for step in steps]
    batches = torch.utils.data.DataLoader(Rows(shards), batch_sampler=rows, num_workers=workers, collate_fn=padded)
    return sum(len(lengths) for _, lengths in batches)


def hugging_face(shards: Shards, steps: Steps) -> Callable[[], Clips]:
    """A memory-mapped `datasets.Dataset`, in its Arrow format: the fastest of those it has."""
    import datasets

    datasets.disable_progress_bars()
    folder = made("datasets", lambda folder: datasets.Dataset(table(shards)).save_to_disk(folder))
    dataset = datasets.load_from_disk(folder).with_format("arrow")

    def read() -> Iterator[list[np.ndarray]]:
        for step in steps:
            column = dataset[[row for _, row in step]]["audio"]
            yield [np.frombuffer(value.as_buffer(), "<i2") for value in column]

    return read


def web_dataset(shards: Shards, steps: Steps) -> Callable[[], Clips]:
    """Tar files."""
    import webdataset

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True)
        with webdataset.TarWriter(str(path)) as writer:
            for row in range(len(shards.columns["id"])):
                writer.write({"__key__": f"{row:06}", "pcm": shards.pcm(row).tobytes()})

    tar = made("webdataset.tar", write)

    def read() -> Iterator[list[np.ndarray]]:
        for batch in webdataset.WebDataset(str(tar), shardshuffle=False).batched(BATCH, collation_fn=list):
            yield [np.frombuffer(sample["pcm"], "<i2") for sample in batch]

    return read


def shar(shards: Shards, steps: Steps) -> Callable[[], Clips]:
    """lhotse's tar files with FLAC: it has no raw PCM."""
    from lhotse import CutSet, MonoCut, Recording
    from lhotse.shar import SharWriter

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        with SharWriter(folder, fields={"recording": "flac"}, shard_size=500) as writer:
            for row in range(len(shards.columns["id"])):
                soundfile.write(sink := io.BytesIO(), shards.pcm(row), SAMPLE_RATE, format="WAV")
                recording = Recording.from_bytes(sink.getvalue(), recording_id=f"{row:06}")
                writer.write(MonoCut(recording.id, 0, recording.duration, 0, recording=recording))

    folder = made("shar", write)

    def read() -> Iterator[list[np.ndarray]]:
        cuts = list(CutSet.from_shar(in_dir=folder))
        for start in range(0, len(cuts), BATCH):
            yield [(cut.load_audio()[0] * 32768).astype(np.int16) for cut in cuts[start : start + BATCH]]

    return read


PEERS: dict[str, tuple[str, Callable[[Shards, Steps], Callable[[], Clips]]]] = {
    "Hugging Face datasets": ("datasets", hugging_face),
    "WebDataset": ("webdataset", web_dataset),
    "lhotse Shar": ("lhotse", shar),
}


def table(shards: Shards) -> pa.Table:
    clips = [shards.pcm(row).tobytes() for row in range(len(shards.columns["id"]))]
    return pa.table({"audio": pa.array(clips, pa.large_binary())})


def through_ray() -> Row:
    """The Ray reader against `ray.data.read_parquet` of the same clips, decoded in the consumer.

    Each has its own cluster, because idle processes of one would be counted with the other.
    """
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for name in ("own", "parquet"):
        ends[name], remote = context.Pipe()
        context.Process(target=serve, args=(name, remote), daemon=True).start()
    taken: dict[str, list[Spent]] = {name: [] for name in ends}
    for number in range(RAY_ROUNDS + 1):
        for name in list(ends)[:: 1 if number % 2 else -1]:
            ends[name].send(True)
            cost = ends[name].recv()
            if number:  # the first round starts processes
                taken[name].append(cost)
    for end in ends.values():
        end.send(False)
        end.recv()
    medians = {name: statistics.median(cost.cpu for cost in costs) / EPOCHS for name, costs in taken.items()}
    note = ", ".join(f"{name} {median:.2f} CPU-s" for name, median in medians.items())
    return Row("Ray reader", "ray.data.read_parquet", ratios(taken["parquet"], taken["own"]), 4.0, note=note)


def serve(name: str, end: Connection) -> None:
    """Read EPOCHS on a new cluster at each request, and send what they cost."""
    import ray.data

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    shards, steps = corpus()
    # Ray with its defaults: the object store of a sweep's own cluster is small, and Parquet would spill there.
    ray.init(address="local", logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        clips = table(shards)
        for number in range(8):
            part, path = clips.slice(number * CLIPS // 8, CLIPS // 8), folder / f"{number}.parquet"
            pa.parquet.write_table(part, path, row_group_size=64, compression="none")

    def parquet() -> int:
        dataset = ray.data.read_parquet(str(made("parquet", write)), columns=["audio"])
        tables = dataset.iter_batches(batch_size=BATCH, batch_format="pyarrow", prefetch_batches=2)
        return consume([np.frombuffer(value.as_buffer(), "<i2") for value in batch["audio"]] for batch in tables)

    def own() -> int:
        return consume(audio(Prefetcher(lambda: ray_source(shards, CONFIG, True)(steps))))

    work = repeated({"own": own, "parquet": parquet}[name])
    while end.recv():
        end.send(measured(work))
    ray.shutdown()
    end.send(None)
