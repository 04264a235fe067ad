"""Preparing: 44.1 kHz stereo through `sweep prepare`, Ray's start included, relative to real time, and its memory.

The recordings are noise with the envelope of speech. An m4a repeats the packets of one that was encoded once.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import soundfile

from tests.bench.measure import Row

MINUTES, RATE = 30, 44_100
TURN = 6  # s
SPEED = (("wav", 20, 100), ("flac", 4, 100), ("m4a", 4, 60))  # suffix, files of MINUTES, goal
LENGTHS = (20, 180)  # min
HEADER = (
    "transcript_id,mi_quality,video_title,video_url,topic,utterance_id,interlocutor,timestamp,utterance_text,"
    "main_therapist_behaviour,client_talk_type"
)


def run() -> list[Row]:
    """The goals of preparing."""
    rows = []
    for suffix, files, goal in SPEED:
        hours = files * MINUTES / 60
        row = Row(f"sweep prepare, {hours:g} h of 44.1 kHz stereo {suffix}", "real time", goal=goal)
        wall, cpu, _, row.note = prepared(suffix, [MINUTES] * files)
        if not row.note:
            row.runs = [hours * 3600 / wall]
            row.note = f"{wall:.0f} s on {os.cpu_count()} CPUs, {cpu:.0f} CPU-seconds ({hours * 3600 / cpu:.0f} x)"
        rows.append(row)
    peaks = [prepared("m4a", [minutes, 1, 1]) for minutes in LENGTHS]
    note = next(
        (problem for *_, problem in peaks if problem), " and ".join(f"{peak:.2f} GB" for _, _, peak, _ in peaks)
    )
    row = Row("memory of preparing an m4a of 3 h, anonymous", "one of 20 min", goal=1.2, most=True, note=note)
    if not any(problem for *_, problem in peaks):
        row.runs = [peaks[1][2] / peaks[0][2]]
    return [*rows, row]


def prepared(suffix: str, minutes: Sequence[int]) -> tuple[float, float, float, str]:
    """Prepare recordings; return wall and CPU time (s), the peak of anonymous memory (GB), and what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, suffix, minutes)
        command = [sys.executable, "-m", "sweep", "prepare", "annomi", str(folder / "annomi.csv")]
        command += ["--audio", str(folder / "audio"), "--out", str(folder / "shards")]
        started, peak, cpu = time.monotonic(), 0.0, dict[int, float]()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):  # Ray's are not waited for: they are watched
                    memory = watched.memory_info()
                    peak = max(peak, (memory.rss - memory.shared) / 1e9)
                    for one in (watched, *watched.children(recursive=True)):
                        times = one.cpu_times()
                        cpu[one.pid] = times.user + times.system
                time.sleep(0.2)
            wall = time.monotonic() - started
            assert process.stderr is not None
            problem = process.stderr.read().strip()[-200:] if process.returncode else ""
    return wall, sum(cpu.values()), peak, problem


def write(folder: Path, suffix: str, minutes: Sequence[int]) -> None:
    """Recordings of noise with the envelope of speech, and their transcripts."""
    rng = np.random.default_rng(0)
    minute = (
        rng.standard_normal((60 * RATE, 2)) * np.repeat(rng.uniform(0, 1, 60 * 8), -(-RATE // 8))[: 60 * RATE, None]
    )
    minute = (minute * 3000).clip(-32768, 32767).astype(np.int16)
    (folder / "audio").mkdir()
    lines = [HEADER]
    for session, length in enumerate(minutes):
        path, shifts = folder / "audio" / f"{session}.{suffix}", rng.integers(0, 60 * RATE, length)
        if suffix == "m4a":
            write_m4a(path, minute, length, int(shifts[0]) // 1024)
        else:
            with soundfile.SoundFile(path, "w", RATE, 2, "PCM_16") as file:
                for shift in shifts:
                    file.write(np.roll(minute, shift, axis=0))
        for number in range(length * 60 // TURN):
            stamp = time.strftime("%H:%M:%S", time.gmtime(number * TURN))
            who = ("therapist", "question", "n/a") if number % 2 == 0 else ("client", "n/a", "change")
            said = f"so what happened in session {session} at turn {number}"
            lines.append(f"{session},high,t,video{session},x,{number},{who[0]},{stamp},{said},{who[1]},{who[2]}")
    (folder / "annomi.csv").write_text("\n".join(lines) + "\n")


def write_m4a(path: Path, minute: np.ndarray, length: int, shift: int) -> None:
    """Write so many minutes of the packets of one minute, from a packet on."""
    import av

    encoded = path.with_name("minute.mp4")
    if not encoded.exists():
        with av.open(str(encoded), "w") as file:
            stream = file.add_stream("aac", rate=RATE, layout="stereo")
            for start in range(0, len(minute), 1024):
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(minute[start : start + 1024]).reshape(1, -1), "s16", "stereo"
                )
                frame.sample_rate, frame.pts = RATE, start
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    with av.open(str(encoded)) as source, av.open(str(path), "w", format="mp4") as file:
        packets = [bytes(packet) for packet in source.demux(audio=0) if packet.size]
        stream = file.add_stream_from_template(source.streams.audio[0])
        for number in range(length * 60 * RATE // 1024):
            packet = av.Packet(packets[(number + shift) % len(packets)])
            packet.pts = packet.dts = number * 1024
            packet.duration, packet.time_base, packet.stream = 1024, Fraction(1, RATE), stream
            file.mux(packet)
