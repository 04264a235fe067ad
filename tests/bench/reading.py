"""Reading a batch: stored clip → decoded → padded float32 tensor and lengths, per CPU-second of all processes.

Three hours of noise with the envelope of speech, in batches of 16 as the plan makes them, the same for all that can
read in a given order (WebDataset and lhotse's Shar read from front to back).
"""

import importlib.util
import logging
import multiprocessing
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

from data.config import DataConfig
from data.corpus.schema import SAMPLE_RATE, Conversation, Corpus, Turn
from data.loading.batching import Cost, plan
from data.loading.examples import Example, clip_samples
from data.loading.prefetch import Prefetcher
from data.loading.ray_source import ray_source
from data.loading.sources import local_source
from data.preparation.build import prepare
from data.shards.dataset import Shards
from tests.bench.measure import Cost as Spent
from tests.bench.measure import Row, in_turns, measured, ratios

CLIPS, SESSIONS, BATCH = 2520, 24, 16
ROUNDS, EPOCHS, RAY_ROUNDS = 8, 4, 6
CACHE = Path(tempfile.gettempdir()) / "speech-llm-sweep-bench"
CONFIG = DataConfig(history=0)


def run() -> list[Row]:
    """The goals of reading."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    shards = corpus()
    steps = batches(shards)
    held = Held(shards.folder)
    plain: dict[str, Callable[[], object]] = {
        "memory-mapped": lambda: consume(mapped(shards, steps)),
        "in-memory loader": lambda: consume(mapped(held, steps)),
        "arrays in memory, no dialogue": lambda: consume([held.clips[row] for _, row in step] for step in steps),
    }
    for workers in (0, 2):
        plain[f"DataLoader, {workers} workers"] = lambda workers=workers: loader(shards, steps, workers)
    rows, missing = [], []
    for name, (module, make) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            missing.append(Row("memory-mapped", name, goal=1.0, note="not installed: uv pip install -e '.[bench]'"))
        else:
            plain[name] = make(shards, steps)
    taken = in_turns({name: repeated(work) for name, work in plain.items()}, ROUNDS)
    hours = EPOCHS * sum(shards.columns["n_samples"]) / SAMPLE_RATE / 3600
    for name in list(plain)[1:]:
        goal = {"in-memory loader": 0.9, "arrays in memory, no dialogue": None}.get(name, 1.0)
        note = f"{hours / statistics.median(cost.cpu for cost in taken[name]):.1f} h of sound a CPU-second"
        rows.append(Row("memory-mapped", name, ratios(taken[name], taken["memory-mapped"]), goal, note=note))
    own = hours / statistics.median(cost.cpu for cost in taken["memory-mapped"])
    rows[0].note += f"; memory-mapped {own:.1f}"
    return [*rows, *missing, through_ray()]


def repeated(work: Callable[[], object]) -> Callable[[], None]:
    """EPOCHS of it: CPU time is counted in hundredths of a second."""

    def run() -> None:
        for _ in range(EPOCHS):
            work()

    return run


def corpus() -> Shards:
    """Clips of a lognormal length: median 3 s, mean 4.3 s, 0.5 to 30 s."""
    folder = CACHE / "reading-3"
    if not (folder / "manifest.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        prepare(
            Corpus("bench", ("a", "b"), {"client": ("a", "b")}, list(_conversations(SESSIONS, CLIPS // SESSIONS))),
            folder,
        )
    return Shards(folder)


def _conversations(sessions: int, clips: int, longest: float = 30.0) -> Iterator[Conversation]:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(31 * SAMPLE_RATE) * np.repeat(rng.uniform(0, 1, 31 * 8), SAMPLE_RATE // 8) ** 2
    for session in range(sessions):
        turns = []
        for index in range(clips):
            seconds = float(np.clip(rng.lognormal(np.log(3), 0.85), 0.5, longest))
            start = rng.integers(0, SAMPLE_RATE)
            clip = noise[start : start + round(seconds * SAMPLE_RATE)] * rng.uniform(1000, 4000)
            text = " ".join(["word"] * max(1, round(2.5 * seconds)))
            turn = Turn(f"{session}/{index}", index, "client", text, "ab"[index % 2])
            turn.audio = clip.round().clip(-32768, 32767).astype(np.int16)
            turns.append(turn)
        yield Conversation(f"s{session}", f"g{session}", turns)


def batches(shards: Shards) -> list[list[tuple[str, int]]]:
    """One epoch over the whole corpus, whatever the split."""
    items = [("classify", row) for row in range(len(shards.columns["id"])) if shards.columns["n_samples"][row]]
    costs = [Cost(0, clip_samples(shards, item, CONFIG)) for item in items]
    return [[items[position] for position in step] for step in plan(costs, batch_size=BATCH, seed=0, epoch=0)]


def padded(clips: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """int16 clips → float32 [B, N] in [-1, 1), and their lengths."""
    lengths = torch.tensor([len(clip) for clip in clips])
    waves = torch.empty(len(clips), int(lengths.max()))
    for wave, clip in zip(waves.numpy(), clips, strict=True):
        np.multiply(clip, np.float32(1 / 32768), out=wave[: len(clip)])
        wave[len(clip) :] = 0
    return waves, lengths


def consume(source: Iterable[list[np.ndarray]]) -> int:
    """Pad all batches; the number of clips."""
    return sum(len(padded(clips)[1]) for clips in source)


def mapped(shards: Shards, steps: list[list[tuple[str, int]]]) -> Iterator[list[np.ndarray]]:
    """The project's own reader, examples and all, read ahead by its thread."""
    return sounds(Prefetcher(lambda: local_source(shards, CONFIG, True)(steps)))


def sounds(batches: Iterable[list[Example]]) -> Iterator[list[np.ndarray]]:
    """The clips of examples."""
    for batch in batches:
        yield [example.pcm for example in batch if example.pcm is not None]


class Held(Shards):
    """The same corpus with all its clips in memory."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        self.clips = [np.array(super(Held, self).pcm(row)) for row in range(len(self.columns["id"]))]

    def pcm(self, row: int) -> np.ndarray | None:
        return self.clips[row]


class Clips(torch.utils.data.Dataset[np.ndarray]):
    """What a DataLoader reads."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __getitem__(self, row: int) -> np.ndarray:
        clip = self.shards.pcm(row)
        assert clip is not None
        return clip


def loader(shards: Shards, steps: list[list[tuple[str, int]]], workers: int) -> int:
    """A PyTorch DataLoader over the same files."""
    rows = [[row for _, row in step] for step in steps]
    made = torch.utils.data.DataLoader(Clips(shards), batch_sampler=rows, num_workers=workers, collate_fn=padded)
    return sum(len(lengths) for _, lengths in made)


Make = Callable[[Shards, list[list[tuple[str, int]]]], Callable[[], int]]


def hugging_face(shards: Shards, steps: list[list[tuple[str, int]]]) -> Callable[[], int]:
    """A memory-mapped `datasets.Dataset`, in its Arrow format: the fastest of those it has."""
    import datasets

    datasets.disable_progress_bars()
    folder = CACHE / "datasets"
    if not folder.exists():
        datasets.Dataset(_table(shards)).save_to_disk(folder)
    made = datasets.load_from_disk(folder).with_format("arrow")

    def read() -> Iterator[list[np.ndarray]]:
        for step in steps:
            column = made[[row for _, row in step]]["audio"]
            yield [np.frombuffer(value.as_buffer(), "<i2") for value in column]

    return lambda: consume(read())


def web_dataset(shards: Shards, steps: list[list[tuple[str, int]]]) -> Callable[[], int]:
    """Tar files."""
    import webdataset

    tar = CACHE / "webdataset.tar"
    if not tar.exists():
        with webdataset.TarWriter(str(tar)) as writer:
            for row in range(len(shards.columns["id"])):
                writer.write({"__key__": f"{row:06}", "pcm": shards.pcm(row).tobytes()})

    def read() -> Iterator[list[np.ndarray]]:
        made = webdataset.WebDataset(str(tar), shardshuffle=False).batched(BATCH, collation_fn=list)
        for batch in made:
            yield [np.frombuffer(sample["pcm"], "<i2") for sample in batch]

    return lambda: consume(read())


def shar(shards: Shards, steps: list[list[tuple[str, int]]]) -> Callable[[], int]:
    """lhotse's tar files with FLAC: it has no raw PCM."""
    from lhotse import CutSet, MonoCut
    from lhotse.shar import SharWriter

    folder = CACHE / "shar"
    if not folder.exists():
        folder.mkdir()
        with SharWriter(folder, fields={"recording": "flac"}, shard_size=500) as writer:
            for row in range(len(shards.columns["id"])):
                clip = shards.pcm(row).astype(np.float32)[None] / 32768
                cut = MonoCut(f"{row:06}", 0, clip.shape[1] / SAMPLE_RATE, 0)
                writer.write(_with_sound(cut, clip))

    def read() -> Iterator[list[np.ndarray]]:
        held = []
        for cut in CutSet.from_shar(in_dir=folder):
            held.append((cut.load_audio()[0] * 32768).astype(np.int16))
            if len(held) == BATCH:
                yield held
                held = []
        if held:
            yield held

    return lambda: consume(read())


def _with_sound(cut: Any, clip: np.ndarray) -> Any:
    import io

    import soundfile
    from lhotse import Recording

    sink = io.BytesIO()
    soundfile.write(sink, clip[0], SAMPLE_RATE, format="WAV")
    cut.recording = Recording.from_bytes(sink.getvalue(), recording_id=cut.id)
    cut.duration = cut.recording.duration
    return cut


EXTRAS: dict[str, tuple[str, Make]] = {
    "Hugging Face datasets": ("datasets", hugging_face),
    "WebDataset": ("webdataset", web_dataset),
    "lhotse Shar": ("lhotse", shar),
}


def _table(shards: Shards) -> pa.Table:
    clips = [shards.pcm(row).tobytes() for row in range(len(shards.columns["id"]))]
    return pa.table({"audio": pa.array(clips, pa.large_binary())})


def through_ray() -> Row:
    """The Ray reader against `ray.data.read_parquet` of the same clips, decoded in the consumer.

    Each has its own cluster, because idle processes of one would be counted with the other.
    """
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for name in ("own", "parquet"):
        ends[name], other = context.Pipe()
        context.Process(target=_on_its_cluster, args=(name, other), daemon=True).start()
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
    note = ", ".join(
        f"{name} {statistics.median(cost.cpu for cost in costs) / EPOCHS:.2f} CPU-s" for name, costs in taken.items()
    )
    return Row("Ray reader", "ray.data.read_parquet", ratios(taken["parquet"], taken["own"]), 4.0, note=note)


def _on_its_cluster(name: str, end: Connection) -> None:
    """Read EPOCHS whenever asked to, and tell what they cost."""
    import ray.data

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    shards = corpus()
    steps = batches(shards)
    # Ray as it comes: the object store of a sweep's own cluster is small, and Parquet would spill there.
    ray.init(address="local", logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    files = _parquet(shards)

    def parquet() -> int:
        dataset = ray.data.read_parquet(str(files), columns=["audio"])
        tables = dataset.iter_batches(batch_size=BATCH, batch_format="pyarrow", prefetch_batches=2)
        return consume([np.frombuffer(value.as_buffer(), "<i2") for value in table["audio"]] for table in tables)

    def own() -> int:
        return consume(sounds(Prefetcher(lambda: ray_source(shards, CONFIG, True)(steps))))

    work = repeated({"own": own, "parquet": parquet}[name])
    while end.recv():
        end.send(measured(work))
    ray.shutdown()
    end.send(None)


def _parquet(shards: Shards) -> Path:
    files = CACHE / "parquet"
    if not files.exists():
        unfinished = Path(tempfile.mkdtemp(dir=CACHE))
        table = _table(shards)
        for number in range(8):
            part = table.slice(number * CLIPS // 8, CLIPS // 8)
            pa.parquet.write_table(part, unfinished / f"{number}.parquet", row_group_size=64, compression="none")
        unfinished.rename(files)
    return files
