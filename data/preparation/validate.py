"""Checks of a corpus: what can be told from the tables alone (`check`), and what only the sound shows (`cut`)."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from data.corpus import audio
from data.corpus.issues import Finding, failure
from data.corpus.schema import JOIN, SAMPLE_RATE, Conversation, Corpus, Turn, flag, is_rejected, reject, split_label
from data.errors import ConfigError, DataError

Aligner = Callable[[np.ndarray, list[Turn], list[Finding]], None]  # a whole channel, int16 [n_samples]

TOLERANCE = 0.05  # s: a time this little past the recording, or into a neighbour, is rounding
LONG = 30.0  # s
TIMELESS = ("W_TS_ZERO", "W_TS_OPEN")  # not so any more where the alignment gave a turn its length
RARE = 3  # turns: a label that is rarer and resembles a frequent one may be a typing error
CLIPPED, SILENT, OFFSET = 1e-3, 1e-4, 0.02  # share of samples at full scale; peak; mean of the samples


def check_channels(corpus: Corpus, channels: Mapping[str, int]) -> None:
    """Raise a ConfigError where a role would be heard on the channel of another one."""
    speakers = {turn.speaker for one in corpus.conversations for turn in one.turns if not is_rejected(turn.flags)}
    wrong = sorted(speakers ^ channels.keys()) if channels else []
    if wrong:
        rule = "has no channel" if wrong[0] in speakers else "is no role of the corpus"
        raise ConfigError(
            f"channels.{wrong[0]}: {rule}; name one for each of {', '.join(sorted(speakers))}, or none at all"
        )


def check(corpus: Corpus, *, order: bool = True) -> None:
    """Judge every turn by what the tables say; findings go to the corpus and the flags of its turns.

    Turns that stand twice are dropped, rejected ones lose their label.

    Args:
        corpus: what an importer returned.
        order: whether times are final; where they will be aligned, `check_order` comes afterwards.

    Raises:
        BuildError: an id names two different utterances.
        DataError: a declared label cannot be told apart from several joined ones.
    """
    for label in corpus.labels:
        if JOIN in label:
            raise DataError(f"label {label!r} contains {JOIN!r}, which joins the labels of one turn; rename it")
    _drop_duplicates(corpus)
    for conversation in corpus.conversations:
        for turn in conversation.turns:
            _check_label(turn, corpus)
            _check_times(turn, corpus.findings)
        if order:
            check_order(conversation.turns, corpus.findings)
        if conversation.recording is not None and not audio.exists(conversation.recording):
            _reject_all(conversation.turns, corpus.findings, "E_AUDIO_MISSING", conversation.recording)
        for turn in conversation.turns:
            if turn.clip is not None and not audio.exists(turn.clip):
                _reject_all([turn], corpus.findings, "E_AUDIO_MISSING", turn.clip)
    if not corpus.declared:
        _flag_rare_labels(corpus)


def _drop_duplicates(corpus: Corpus) -> None:
    """Conversations and turns of one id: equal turns are dropped, different ones fail the build."""
    conflicts: list[Finding] = []
    sessions: dict[str, Conversation] = {}
    seen: dict[str, tuple[str, Turn]] = {}
    for conversation in corpus.conversations:
        kept = []
        known = sessions.setdefault(conversation.id, conversation)
        for turn in conversation.turns:
            owner, first = seen.setdefault(turn.id, (conversation.id, turn))
            if first is turn and known is conversation:
                kept.append(turn)
            elif first is turn:
                message = (
                    f"the session stands already at {known.turns[0].where}, without this turn; put it in one place"
                )
                conflicts.append(Finding("F_DUPLICATE", turn.where, turn.id, message, turn.span))
            elif owner == conversation.id and _equal(first, turn):
                message = f"stands already at {first.where}, equal in everything"
                corpus.findings.append(Finding("W_DUPLICATE", turn.where, turn.id, message, turn.span, first.span))
            else:
                message = f"stands already at {first.where}, with other content"
                conflicts.append(Finding("F_DUPLICATE", turn.where, turn.id, message, turn.span, first.span))
        conversation.turns = kept if known is conversation else []
    corpus.conversations = list(sessions.values())
    if conflicts:
        ids = len({finding.utterance for finding in conflicts})
        raise failure(conflicts, f"{ids} id(s) name different utterances: give each its own, or remove the wrong rows")


def _equal(one: Turn, other: Turn) -> bool:
    """In all but the place in the file, from which an end may follow."""
    names = ("speaker", "text", "label", "start", "subset", "clip")
    same = all(getattr(one, name) == getattr(other, name) for name in names)
    return same and (None in (one.end, other.end) or one.end == other.end)


def _check_label(turn: Turn, corpus: Corpus) -> None:
    """Labels are declared and belong to the role; those of one turn stand in the order of the declaration."""
    if turn.label is None:
        return
    own = set(split_label(turn.label))
    allowed = corpus.roles.get(turn.speaker, ())
    for label in sorted(own):
        if label not in corpus.labels:
            near = get_close_matches(label, allowed or corpus.labels, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(allowed or corpus.labels)
            reject(turn, corpus.findings, "E_LABEL", f"label {label!r} is unknown; {hint}known: {known}")
            return
        if label not in allowed:
            owners = ", ".join(role for role, labels in corpus.roles.items() if label in labels)
            message = f"label {label!r} belongs to {owners or 'nobody'}, and the {turn.speaker} speaks"
            reject(turn, corpus.findings, "E_LABEL_ROLE", message)
            return
    turn.label = JOIN.join(sorted(own, key=corpus.labels.index))


def _check_times(turn: Turn, findings: list[Finding]) -> None:
    if turn.start is not None and turn.start < -TOLERANCE:
        reject(turn, findings, "E_TS_RANGE", f"starts before the recording ({turn.start:.2f} s)")
    elif turn.span is None:
        return
    elif turn.span[1] < turn.span[0]:
        reject(turn, findings, "E_TS_END", f"ends before it starts ({_show(turn)})")
    elif turn.span[1] == turn.span[0] and "W_TS_ZERO" not in turn.flags:
        flag(turn, findings, "W_TS_ZERO", f"has no length ({_show(turn)})")
        turn.end = None


def _show(turn: Turn) -> str:
    return f"{turn.start:.2f}-{turn.end:.2f} s"


def check_order(turns: Sequence[Turn], findings: list[Finding]) -> None:
    """Starts that go backwards, and utterances that overlap an earlier one: people do talk at once."""
    timed = [turn for turn in turns if turn.start is not None and not is_rejected(turn.flags)]
    latest: Turn | None = None  # the turn that ends last so far
    before: Turn | None = None
    for turn in timed:
        assert turn.start is not None
        if before is not None and before.start is not None and turn.start < before.start:
            message = f"starts at {turn.start:.2f} s, before {before.id} above it ({before.start:.2f} s)"
            flag(turn, findings, "W_TS_ORDER", message, before.span or (before.start, before.start))
        if latest is not None and latest.end is not None and latest.start is not None and turn.end is not None:
            shared = min(turn.end, latest.end) - max(turn.start, latest.start)
            if shared > TOLERANCE:
                message = f"overlaps {latest.id} by {shared:.2f} s ({_show(turn)} and {_show(latest)})"
                flag(turn, findings, "W_TS_OVERLAP", message, latest.span)
        before = turn
        if turn.end is not None and (latest is None or latest.end is None or turn.end > latest.end):
            latest = turn


def _reject_all(turns: Iterable[Turn], findings: list[Finding], code: str, path: Path, why: str = "") -> None:
    for turn in turns:
        if not is_rejected(turn.flags):
            reject(turn, findings, code, why or f"no file {path.name} in {path.parent.name}")


def _flag_rare_labels(corpus: Corpus) -> None:
    turns = [turn for conversation in corpus.conversations for turn in conversation.turns if turn.label is not None]
    counts = Counter(label for turn in turns for label in split_label(turn.label or ""))
    common = [label for label, count in counts.items() if count >= 10 * RARE]
    for turn in turns:
        for label in split_label(turn.label or ""):
            near = get_close_matches(label, common, n=1, cutoff=0.75) if counts[label] < RARE else []
            if near:
                message = f"label {label!r} occurs {counts[label]} x and resembles {near[0]!r} ({counts[near[0]]} x)"
                flag(turn, corpus.findings, "W_LABEL_RARE", message)


def cut(
    conversation: Conversation, channels: Mapping[str, int], findings: list[Finding], align: Aligner | None = None
) -> audio.Recording | None:
    """Give every turn that has a time, or a file of its own, its samples, and note what is odd about them.

    Args:
        conversation: its turns get `audio`.
        channels: role → channel of the recording that holds this speaker alone; empty: mixed down.
        findings: get what is found.
        align: refines the turns' times first.

    Returns:
        The recording of the session, where there is one.
    """
    for turn in conversation.turns:
        if turn.clip is not None:
            _read_clip(turn, findings)
    path = conversation.recording
    if path is None or all(is_rejected(turn.flags) for turn in conversation.turns):
        return None
    recording = _read(path, conversation.turns, findings, conversation.id, separate=bool(channels))
    if recording is None:
        return None
    own = [turn for turn in conversation.turns if turn.clip is None and not is_rejected(turn.flags)]
    if align is not None:
        for channel, pcm in enumerate(recording.pcm):
            align(pcm, [turn for turn in own if channels.get(turn.speaker, 0) == channel], findings)
        for turn in (turn for turn in own if turn.given is not None and turn.span is not None):
            turn.flags = tuple(code for code in turn.flags if code not in TIMELESS)
    for turn in own:
        if turn.span is not None:
            _cut(turn, recording, channels.get(turn.speaker, 0), findings)
    return recording


def _read_clip(turn: Turn, findings: list[Finding]) -> None:
    assert turn.clip is not None
    recording = _read(turn.clip, [turn], findings, turn.id)
    if recording is not None:
        _take(turn, recording, slice(0, recording.pcm.shape[1]), 0, findings)


def _read(
    path: Path, turns: Sequence[Turn], findings: list[Finding], name: str, *, separate: bool = False
) -> audio.Recording | None:
    """Decode a file, with its own findings; None, and its turns rejected, if that cannot be."""
    try:
        recording = audio.read_recording(path, separate=separate)
    except DataError as error:
        _reject_all(turns, findings, "E_AUDIO_UNREADABLE", path, str(error).replace(str(path), path.name))
        return None
    span = (0.0, recording.duration)
    if recording.pcm.shape[1] == 0:
        _reject_all(turns, findings, "E_AUDIO_EMPTY", path, f"{path.name} holds no samples")
        return None
    if recording.missing > TOLERANCE:
        message = (
            f"holds {recording.duration:.2f} s, and announces {recording.missing:.2f} s more; copy or export it again"
        )
        findings.append(Finding("W_TRUNCATED", path.name, name, message, None, span))
    if recording.source_channels > 1 and not separate:
        message = f"{recording.source_channels} channels"
        findings.append(Finding("W_STEREO", path.name, name, message, None, span))
    if recording.source_rate != SAMPLE_RATE:
        findings.append(Finding("W_RESAMPLED", path.name, name, f"{recording.source_rate} Hz", None, span))
    return recording


def _cut(turn: Turn, recording: audio.Recording, channel: int, findings: list[Finding]) -> None:
    assert turn.start is not None
    assert turn.end is not None
    whole, shown = (0.0, recording.duration), f"{_show(turn)}, recording {recording.duration:.2f} s"
    late = turn.end - recording.duration
    if late > TOLERANCE:
        reject(turn, findings, "E_TS_RANGE", f"ends {late:.2f} s after the recording ({shown})", whole)
        return
    if late > 0:
        flag(turn, findings, "W_TS_CLAMPED", f"ends {1000 * late:.0f} ms after the recording ({shown})", whole)
    if channel >= len(recording.pcm):
        message = f"the {turn.speaker} is expected on channel {channel}, and the file has {len(recording.pcm)}"
        reject(turn, findings, "E_AUDIO_MISSING", message, whole)
        return
    piece = slice(audio.samples(max(0.0, turn.start)), audio.samples(turn.end))
    _take(turn, recording, piece, channel, findings)


def _take(turn: Turn, recording: audio.Recording, piece: slice, channel: int, findings: list[Finding]) -> None:
    """Judge the samples of a turn and keep them."""
    clip = recording.pcm[channel, piece]
    span = (piece.start / SAMPLE_RATE, piece.stop / SAMPLE_RATE)
    broken = (recording.broken >= span[0]) & (recording.broken < span[1])
    seconds = len(clip) / SAMPLE_RATE
    if broken.any():
        message = f"{broken.sum()} samples are NaN or infinite, the first at {recording.broken[broken][0]:.3f} s"
        reject(turn, findings, "E_AUDIO_NAN", message, span)
        return
    if len(clip) < audio.MIN_SAMPLES:
        reject(turn, findings, "E_TOO_SHORT", f"{1000 * seconds:.0f} ms of sound", span)
        return
    wave = audio.waveform(clip)
    peak, offset = float(np.abs(wave).max()), float(wave.mean())
    full = float((np.abs(wave) >= 0.999).mean())
    if peak < SILENT:
        flag(turn, findings, "W_SILENT", f"peak {peak:.1e} of full scale", span)
    if full > CLIPPED:
        flag(turn, findings, "W_CLIPPED", f"{full:.1%} of the samples are at full scale", span)
    if abs(offset) > OFFSET:
        flag(turn, findings, "W_DC", f"mean of the samples {offset:+.3f}", span)
    if seconds > LONG:
        flag(turn, findings, "W_TOO_LONG", f"{seconds:.1f} s", span)
    turn.audio = clip
