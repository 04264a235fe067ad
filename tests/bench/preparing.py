"""Preparing: ten hours of 44.1 kHz stereo through `sweep prepare`, Ray's start included, relative to real time."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from tests.bench.measure import Row

FILES, MINUTES, RATE = 20, 30, 44_100
TURN = 6  # s
HEADER = (
    "transcript_id,mi_quality,video_title,video_url,topic,utterance_id,interlocutor,timestamp,utterance_text,"
    "main_therapist_behaviour,client_talk_type"
)


def run() -> list[Row]:
    """The goal of preparing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        command = [sys.executable, "-m", "sweep", "prepare", "annomi", str(folder / "annomi.csv")]
        command += ["--audio", str(folder / "audio"), "--out", str(folder / "shards")]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wall = time.monotonic() - started
    if done.returncode:
        return [Row("sweep prepare", "real time", goal=100, note=done.stderr.strip()[-200:])]
    note = f"{wall:.0f} s on {os.cpu_count()} CPUs"
    return [Row("sweep prepare, 10 h of 44.1 kHz stereo", "real time", [FILES * MINUTES * 60 / wall], 100, note=note)]


def write(folder: Path) -> None:
    """Recordings of noise with the envelope of speech, and their transcripts."""
    rng = np.random.default_rng(0)
    minute = (
        rng.standard_normal((60 * RATE, 2)) * np.repeat(rng.uniform(0, 1, 60 * 8), -(-RATE // 8))[: 60 * RATE, None]
    )
    minute = (minute * 3000).clip(-32768, 32767).astype(np.int16)
    (folder / "audio").mkdir()
    lines = [HEADER]
    for session in range(FILES):
        with soundfile.SoundFile(folder / "audio" / f"{session}.wav", "w", RATE, 2, "PCM_16") as file:
            for shift in rng.integers(0, 60 * RATE, MINUTES):
                file.write(np.roll(minute, shift, axis=0))
        for number in range(MINUTES * 60 // TURN):
            stamp = time.strftime("%H:%M:%S", time.gmtime(number * TURN))
            who = ("therapist", "question", "n/a") if number % 2 == 0 else ("client", "n/a", "change")
            said = f"so what happened in session {session} at turn {number}"
            lines.append(f"{session},high,t,video{session},x,{number},{who[0]},{stamp},{said},{who[1]},{who[2]}")
    (folder / "annomi.csv").write_text("\n".join(lines) + "\n")
