"""Decode with FFmpeg (PyAV) what libsndfile cannot read, or reads only in part."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

# Containers that hold samples. Playlists and scripts, which open other files, are not among them.
CONTAINERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,eac3,flac,flv,gsm,matroska,webm,mov,mp4,m4a,3gp,mp3,mpeg,"
    "mpegts,nistsphere,ogg,tta,voc,w64,wav,wv"
)
TIMED = ("mov", "matroska", "asf")  # their packets have times, so a pause of the recorder is a gap
TOLERANCE = 0.25  # s; the first and the last frame of a lossy codec contain padding
_GAP = 0.1  # s; shorter gaps are rounding errors of the times
_LONGEST_GAP = 4 * 3600.0  # s; a longer one is a wrong time
_FILL = 60  # s of silence that are made at a time
_RAW = {"mp3": b"\xff", "aac": b"\xff"}  # formats without a signature: FFmpeg recognises them in noise as well


class FFmpegDecoder:
    """Reads the best audio track of a file as float32 blocks; see `data.corpus.decoding.Decoder`."""

    tolerance = TOLERANCE

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            ValueError: the file has no track that can be decoded.
            OSError: the file cannot be read.
        """
        import av

        self.path = path
        self.filled = 0.0  # s of silence for gaps
        try:
            with _open(path) as container:
                stream = container.streams.best("audio")
                if stream is None:
                    raise ValueError("the file has no audio track")
                first = next(_frames(container), None)
                if first is None:
                    raise ValueError("the audio track has no samples")
                self.rate, self.channels = first.sample_rate, len(first.layout.channels)
                self.layout = first.layout.name
                self.announced = _announced(container)
                self.limit = 1.0 if stream.codec_context.name.startswith("pcm_f") else 1.25
        except av.FFmpegError as error:
            raise ValueError(error.strerror or str(error)) from None
        self._blocks = self._decoded()
        self._rest = np.empty((0, self.channels), np.float32)

    def read(self, frames: int) -> np.ndarray:
        """Return the next samples [n, n_channels]; less than `frames` only at the end."""
        parts, length = [self._rest], len(self._rest)
        while length < frames and (block := next(self._blocks, None)) is not None:
            parts.append(block)
            length += len(block)
        joined = np.concatenate(parts)
        self._rest = joined[frames:].copy()
        return joined[:frames]

    def restart(self) -> None:
        """Start from the first sample again."""
        self._blocks.close()
        self._blocks, self._rest, self.filled = self._decoded(), self._rest[:0], 0.0

    def close(self) -> None:
        """Close the file."""
        self._blocks.close()

    def _decoded(self) -> Generator[np.ndarray, None, None]:
        """Yield the samples of all frames; a gap in the times is filled with silence."""
        import av

        produced, resampler, source = 0, None, None
        with _open(self.path) as container:
            timed = container.format.name.split(",")[0] in TIMED
            start = (container.start_time or 0) / av.time_base
            for frame in _frames(container):
                if timed and frame.time is not None:
                    gap = frame.time - start - produced / self.rate
                    if _GAP < gap < _LONGEST_GAP:
                        self.filled += gap
                        for silence in _silence(round(gap * self.rate), _FILL * self.rate):
                            produced += silence
                            yield np.zeros((silence, self.channels), np.float32)
                form = (frame.format.name, frame.layout.name, frame.sample_rate)
                rest: list[av.AudioFrame] = []
                if resampler is None or form != source:  # a chained file may change in the middle
                    rest = resampler.resample(None) if resampler is not None else []
                    source, resampler = form, av.AudioResampler("fltp", self.layout, self.rate)
                for converted in (*rest, *resampler.resample(frame)):
                    block = converted.to_ndarray().T
                    produced += len(block)
                    yield block


def seconds(path: Path, after: float = 0.0) -> float | None:
    """Return where the audio of a file ends, without decoding it; None if FFmpeg does not know.

    Args:
        path: an MP3, Ogg or FLAC file.
        after: a position (s) to start from; only the packets from there on are read. 0: all packets are counted, and
            their times, which begin again in a chained file, are not used.
    """
    import av

    try:
        with _open(path) as container:
            stream = container.streams.best("audio")
            if stream is None or stream.time_base is None:
                return None
            if after:
                container.seek(int(max(0.0, after - 1.0) * av.time_base))
            total, end = 0, 0
            for packet in container.demux(stream):
                total += packet.duration or 0
                if packet.pts is not None:
                    end = max(end, packet.pts + (packet.duration or 0))
            return float((end if after else total) * stream.time_base)
    except (av.FFmpegError, OSError):
        return None


def _open(path: Path) -> "InputContainer":
    import av

    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    container = av.open(str(path.absolute()), options=options)
    mark = _RAW.get(container.format.name)
    if mark is not None:
        with path.open("rb") as file:
            head = file.read(3)
        if not head.startswith((mark, b"ID3")):
            container.close()
            raise ValueError("the format is not recognised")
    return container


def _frames(container: "InputContainer") -> "Iterator[av.AudioFrame]":
    """Yield the frames of the best audio track. Packets that cannot be decoded are skipped, as players do."""
    import av

    packets = container.demux(container.streams.best("audio"))
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError):  # the end, or a truncated file
            return
        try:
            for frame in packet.decode():
                assert isinstance(frame, av.AudioFrame)
                yield frame
        except av.FFmpegError:
            continue


def _silence(frames: int, most: int) -> Iterator[int]:
    while frames > 0:
        yield min(frames, most)
        frames -= most


def _announced(container: "InputContainer") -> float | None:
    """Return the length (s) in the header of the audio track; None if there is none, or FFmpeg has estimated it."""
    stream = container.streams.best("audio")
    assert stream is not None
    kind = container.format.name.split(",")[0]
    if kind in ("aac", "amr", "mp3", "ogg", "ac3", "eac3", "mpeg", "mpegts", "gsm"):
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base) or None
    clock = stream.metadata.get("DURATION", "").split(":")  # of Matroska and WebM
    try:
        return int(clock[0]) * 3600 + int(clock[1]) * 60 + float(clock[2])
    except (ValueError, IndexError):
        return None
