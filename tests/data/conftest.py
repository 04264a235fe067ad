"""Fixtures that several files of this folder share."""

import numpy as np
import pytest

from data.corpus.audio import SAMPLE_RATE
from tests.data.world import END, EVERY, LABELS, LENGTH, SESSIONS, TURNS, World


@pytest.fixture
def world() -> World:
    rows, sound = [], {}
    rng = np.random.default_rng(0)
    for session in range(SESSIONS):
        name = f"s{session}"
        sound[name] = (rng.standard_normal((round((END + 1) * SAMPLE_RATE), 1)) * 0.05).astype(np.float32)
        for turn in range(TURNS):
            role = ("therapist", "client")[turn % 2]
            rows.append(
                {
                    "conversation": name,
                    "id": f"{name}/{turn}",
                    "speaker": role[0].upper(),
                    "text": f"words of turn {turn} in {name}",
                    "label": LABELS[role][turn // 2 % len(LABELS[role])],
                    "start": turn * EVERY,
                    "end": turn * EVERY + LENGTH,
                    "annotator": "a",
                    "video": f"v{session}",
                    "split": "",
                }
            )
    return World(rows, sound, dict.fromkeys(sound, SAMPLE_RATE))
