"""Memory: a corpus of 20 GB is streamed, decoded and padded once; what the process takes beyond its modules.

The corpus is one shard under many names: each is mapped by itself, as different files would be. Anonymous memory is
what the process holds; mapped pages of the shards are the system's to drop, and are shared by all trials of a node.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from data.corpus.schema import SAMPLE_RATE, Conversation, Corpus, Turn
from data.loading.prefetch import Prefetcher
from data.loading.sources import local_source
from data.preparation.build import prepare
from data.shards.dataset import MANIFEST, Shards
from data.shards.format import to_bytes
from tests.bench.measure import Row

NAMES, SECONDS, TURNS = 320, 10, 200  # shards of 64 MB
GOAL = 2.0  # GB


def run() -> list[Row]:
    """The goal of memory."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "shards")
        command = [sys.executable, "-m", "tests.bench.memory", f"{folder}/shards"]
        taken = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    note = f"{taken['gigabytes']:.1f} GB read, {taken['clips']} clips"
    return [
        Row("memory, resident", "GB beyond the base", [taken["resident"]], GOAL, most=True, note=note),
        Row("memory, anonymous", "GB beyond the base", [taken["anonymous"]], GOAL, most=True, note=note),
    ]


def write(folder: Path) -> None:
    """A shard of random samples under NAMES names, and an index that knows them all."""
    rng = np.random.default_rng(0)
    sessions = []
    for session in range(3):
        turns = []
        for index in range(TURNS // 3):
            turn = Turn(f"{session}/{index}", index, "client", f"turn {index} of {session}", "ab"[index % 2])
            turn.audio = rng.integers(-3000, 3000, SECONDS * SAMPLE_RATE, dtype=np.int16)
            turns.append(turn)
        sessions.append(Conversation(f"s{session}", f"g{session}", turns))
    shards = prepare(Corpus("bench", ("a", "b"), {"client": ("a", "b")}, sessions), folder)
    [info], index = shards.manifest.shards, shards.index
    parts, infos = [], []
    for number in range(NAMES):
        name = f"shard-{number:08x}.arrow"
        (folder / name).hardlink_to(folder / info.name)
        infos.append(info.model_copy(update={"name": name}))
        columns = {"shard": pa.array([number] * len(index), pa.int32())}
        for column in ("id", "conversation"):
            columns[column] = pa.array([f"{number}-{value}" for value in index[column].to_pylist()])
        part = index
        for column, values in columns.items():
            part = part.set_column(index.column_names.index(column), index.schema.field(column), values)
        parts.append(part)
    (folder / shards.manifest.index).write_bytes(to_bytes(pa.concat_tables(parts)))
    manifest = shards.manifest.model_copy(update={"shards": tuple(infos)})
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def stream(folder: str) -> dict[str, Any]:
    """Read the corpus once, in an order that jumps between all shards."""
    from data.config import DataConfig
    from tests.bench.reading import audio, padded

    resident, anonymous = used()
    shards = Shards(folder)
    rows = np.random.default_rng(0).permutation(len(shards.columns["id"])).tolist()
    steps = [[("classify", row) for row in rows[start : start + 16]] for start in range(0, len(rows), 16)]
    most, clips = (0.0, 0.0), 0
    for number, batch in enumerate(audio(Prefetcher(lambda: local_source(shards, DataConfig(), True)(steps)))):
        clips += len(padded(batch)[1])
        if number % 50 == 0:
            most = tuple(map(max, most, used()))
    gigabytes = sum(shards.columns["length"]) / 1e9
    beyond = {"resident": most[0] - resident, "anonymous": most[1] - anonymous}
    return beyond | {"gigabytes": gigabytes, "clips": clips}


def used() -> tuple[float, float]:
    """Resident memory of this process, and what of it is backed by no file, in GB."""
    memory = psutil.Process().memory_info()
    return memory.rss / 1e9, (memory.rss - memory.shared) / 1e9


if __name__ == "__main__":
    print(json.dumps(stream(sys.argv[1])))
