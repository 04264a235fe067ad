"""Fixtures shared by all tests: tiny models in Hugging Face folders and small prepared corpora, made once a session.

They import what they need themselves: pytest-xdist reads this file also in the process that only hands out tests.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import model  # noqa: F401  # which lets torch and transformers load less, if it comes first

if TYPE_CHECKING:
    from data.loading.examples import Example
    from data.shards.dataset import Shards

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of processes that tests start: the models are tiny
os.environ.pop("COLUMNS", None)  # pytest-xdist sets the width of a terminal that nothing is printed to
SHARED = Path(__file__).resolve().parents[2] / "shared" / "annomi"
LABELS = ("change", "sustain", "neutral")
LONGEST = (
    "test_readme.py",
    "test_slurm.py",
    "test_kill.py",
    "test_cluster.py",
    "test_mlflow_server.py",
    "test_browser.py",
)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking, again and again, through all that is imported: a tenth of the time."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def built_in_inputs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let all processes of this session, and no other, share the demo's corpus and models."""
    root = tmp_path_factory.getbasetemp()
    os.environ["SWEEP_CACHE"] = str((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "inputs")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with untrained encoders and an untrained LLM; loaded by `from_pretrained` like any other."""
    from tests import tiny_models

    folder = tmp_path_factory.mktemp("models")
    for name, make in tiny_models.MODELS.items():
        make(folder / name)
    return folder


@pytest.fixture(scope="session")
def ctc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CTC model that was trained on synthetic speech."""
    from tests.model import voices

    folder = tmp_path_factory.mktemp("ctc")
    voices.make_ctc(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Nine synthetic dialogues of eight turns."""
    from data.corpus import synthetic
    from data.preparation.build import prepare

    folder = tmp_path_factory.mktemp("corpus") / "shards"
    return prepare(synthetic.corpus(sessions=9, turns=8, seed=3), folder)


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Eight ragged examples, from the shortest clip that is allowed (0.1 s) to one over several encoder windows."""
    import numpy as np

    from data.corpus.schema import SAMPLE_RATE
    from data.loading.examples import Example

    rng = np.random.default_rng(5)
    seconds = (0.1, 0.35, 0.7, 1.0, 1.6, 2.4, 3.1, 5.3)
    words = "i really want to stop it now and then maybe so".split()
    return [
        Example(
            id=f"c/{place}",
            task="classify",
            conversation=f"c{place % 3}",
            speaker="client",
            answer=LABELS[place % 3],
            subset=None,
            turns=(
                *(("therapist", " ".join(words[turn:])) for turn in range(place % 4)),
                ("client", " ".join(words[: 1 + place])),
            ),
            audio_turn=place % 4,
            pcm=(rng.standard_normal(round(length * SAMPLE_RATE)) * (500 + 900 * place) + 200).astype("<i2"),
        )
        for place, length in enumerate(seconds)
    ]


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, and often wait: no process is left alone with one at the end.

    The tests of a file share its fixtures, so one process runs them, unless they name a group of their own."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
