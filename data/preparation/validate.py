"""Validate a corpus: from the tables alone (`check`) and from the audio while clips are cut (`cut`)."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from data.corpus import audio
from data.corpus.config import CorpusConfig
from data.corpus.decoding import StoredClip
from data.corpus.issues import Finding, build_error
from data.corpus.label_counts import label_problems
from data.corpus.schema import JOIN, SAMPLE_RATE, Conversation, Corpus, Turn, flag, is_rejected, reject, split_label
from data.corpus.votes import count_votes, label_order
from data.errors import ConfigError, DataError
from data.shards.format import fold_split

# Takes a channel, int16 [n_samples], the turns whose times it sets, and the list that findings are added to.
Aligner = Callable[[np.ndarray, list[Turn], list[Finding]], None]

TOLERANCE = 0.05  # s; smaller overlaps, and smaller excesses over the recording, are rounding errors
LATE = 0.5  # s; recognisers end the last turn this much after the recording
LONG = 30.0  # s
TIMELESS = ("W_TS_ZERO", "W_TS_OPEN")  # no longer valid if the alignment has set the times
RARE = 3  # turns; a label with fewer turns that resembles a frequent one may be a typing error
CLIPPED, SILENT, OFFSET = 1e-3, 1e-4, 0.02  # fraction of samples at full scale; peak; mean


def check_channels(corpus: Corpus, channels: Mapping[str, int]) -> None:
    """Raise a ConfigError unless either all roles of the corpus have a channel or none has one."""
    speakers = {
        turn.speaker
        for conversation in corpus.conversations
        for turn in conversation.turns
        if not is_rejected(turn.flags)
    }
    wrong = sorted(speakers ^ channels.keys()) if channels else []
    if wrong:
        rule = "has no channel" if wrong[0] in speakers else "is not a role of the corpus"
        raise ConfigError(f"channels.{wrong[0]}: {rule}; set one for each of {', '.join(sorted(speakers))}, or none")


def check(corpus: Corpus, *, order: bool = True) -> None:
    """Check every turn without reading audio, and add findings to the corpus and flags to its turns.

    Duplicate turns are dropped; rejected turns lose their label.

    Args:
        corpus: the result of an importer; it is changed.
        order: whether times are final. If they will be aligned, `check_order` is called afterwards.

    Raises:
        BuildError: one id is used for two different utterances.
        DataError: a declared label contains the separator of joined labels.
    """
    for label in corpus.labels:
        if JOIN in label:
            raise DataError(f"label {label!r} contains {JOIN!r}, which joins the labels of one turn; rename it")
    _drop_duplicates(corpus)
    _drop_empty(corpus)
    for conversation in corpus.conversations:
        for turn in conversation.turns:
            _check_label(turn, corpus)
            _check_times(turn, corpus.findings)
        if order:
            check_order(conversation.turns, corpus.findings)
        if conversation.recording is not None and not audio.exists(conversation.recording):
            _reject_all(conversation.turns, corpus.findings, "E_AUDIO_MISSING", conversation.recording)
        for turn in conversation.turns:
            for file in (turn.clip, turn.recording):
                if file is not None and not audio.exists(file):
                    _reject_all([turn], corpus.findings, "E_AUDIO_MISSING", file)
            _check_text(turn, conversation, corpus.findings)
    if not corpus.declared:
        _flag_rare_labels(corpus)


def _drop_duplicates(corpus: Corpus) -> None:
    """Drop turns whose id and content occurred before; raise a BuildError if only the id did."""
    conflicts: list[Finding] = []
    sessions: dict[str, Conversation] = {}
    seen: dict[str, tuple[str, Turn]] = {}
    for conversation in corpus.conversations:
        kept = []
        first_session = sessions.setdefault(conversation.id, conversation)
        for turn in conversation.turns:
            session_id, first = seen.setdefault(turn.id, (conversation.id, turn))
            if first is turn and first_session is conversation:
                kept.append(turn)
            elif first is turn:
                place = next((turn.where for turn in first_session.turns), first_session.id)
                message = f"the session is already at {place}, without this turn; merge the two"
                conflicts.append(Finding("F_DUPLICATE", turn.where, turn.id, message, turn.span))
            elif session_id == conversation.id and _equal(first, turn):
                message = f"is already at {first.where}, with equal content"
                corpus.findings.append(Finding("W_DUPLICATE", turn.where, turn.id, message, turn.span, first.span))
            elif first_session is not conversation:
                message = f"the session is already at {first.where}, with other content; rename one of the two sessions"
                conflicts.append(Finding("F_DUPLICATE", turn.where, turn.id, message, turn.span, first.span))
            else:
                message = f"is already at {first.where}, with different content"
                conflicts.append(Finding("F_DUPLICATE", turn.where, turn.id, message, turn.span, first.span))
        conversation.turns = kept if first_session is conversation else []
    corpus.conversations = list(sessions.values())
    if conflicts:
        ids = len({finding.utterance for finding in conflicts})
        advice = f"{ids} id(s) are used for different utterances; make the ids unique, or remove the wrong rows"
        raise build_error(conflicts, advice)


def _drop_empty(corpus: Corpus) -> None:
    """Drop sessions without turns."""
    for conversation in corpus.conversations:
        if not conversation.turns:
            message = "the session has no turns"
            corpus.findings.append(Finding("W_SESSION_EMPTY", conversation.id, conversation.id, message))
    corpus.conversations = [conversation for conversation in corpus.conversations if conversation.turns]


def _check_text(turn: Turn, conversation: Conversation, findings: list[Finding]) -> None:
    """Take the label from a turn that has nothing to read and nothing to hear, so it is no example."""
    audible = turn.audio is not None or turn.clip is not None
    audible = audible or (recording_of(turn, conversation) is not None and turn.span is not None)
    if turn.label is not None and not turn.text and not audible:
        flag(turn, findings, "W_TEXT_EMPTY", "the turn has neither text nor audio")
        turn.label = None


def _equal(first: Turn, second: Turn) -> bool:
    """Return whether two turns have equal content. A missing end is ignored, because it depends on the next row."""
    names = ("speaker", "text", "label", "start", "subset", "clip", "recording")
    same = all(getattr(first, name) == getattr(second, name) for name in names)
    return same and (None in (first.end, second.end) or first.end == second.end)


def _check_label(turn: Turn, corpus: Corpus) -> None:
    """Reject undeclared labels and labels of another role, and sort the labels of a turn in declared order."""
    if turn.label is None:
        return
    labels = set(split_label(turn.label))
    allowed = corpus.roles.get(turn.speaker, ())
    for label in sorted(labels):
        if label not in corpus.labels:
            near = get_close_matches(label, allowed or corpus.labels, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            expected = ", ".join(allowed or corpus.labels)
            reject(turn, corpus.findings, "E_LABEL", f"label {label!r} is unknown; {hint}expected: {expected}")
            return
        if label not in allowed:
            roles = ", ".join(role for role, allowed in corpus.roles.items() if label in allowed) or "no role"
            message = f"label {label!r} belongs to {roles}, but the speaker is the {turn.speaker}"
            reject(turn, corpus.findings, "E_LABEL_ROLE", message)
            return
    turn.label = JOIN.join(sorted(labels, key=corpus.labels.index))
    _check_votes(turn, allowed, corpus)


def _check_votes(turn: Turn, allowed: Sequence[str], corpus: Corpus) -> None:
    """Join the labels of each annotator in declared order, and flag votes for labels that the turn cannot have."""
    ballots = [split_label(given) for given, annotators in turn.votes.items() for _ in range(annotators)]
    if any(len(ballot) > 1 for ballot in ballots):
        turn.votes = count_votes(ballots, label_order(corpus.labels))
    strange = sorted({label for ballot in ballots for label in ballot if label not in allowed})
    if strange:
        count = sum(not set(strange).isdisjoint(ballot) for ballot in ballots)
        message = f"{count} of {len(ballots)} annotators gave {', '.join(strange)}, which no {turn.speaker} turn has"
        flag(turn, corpus.findings, "W_LABEL_VOTE", message)


def _check_times(turn: Turn, findings: list[Finding]) -> None:
    if turn.start is not None and turn.start < -TOLERANCE:
        reject(turn, findings, "E_TS_RANGE", f"starts before the recording ({turn.start:.2f} s)")
    elif turn.span is None:
        return
    elif turn.span[1] < turn.span[0]:
        reject(turn, findings, "E_TS_END", f"ends before it starts ({_format_span(turn)})")
    elif turn.span[1] == turn.span[0] and "W_TS_ZERO" not in turn.flags:
        flag(turn, findings, "W_TS_ZERO", f"has zero length ({_format_span(turn)})")
        turn.end = None


def _format_span(turn: Turn) -> str:
    return f"{turn.start:.2f}-{turn.end:.2f} s"


def check_order(turns: Sequence[Turn], findings: list[Finding]) -> None:
    """Flag turns that start before the previous one, and turns that overlap an earlier one."""
    timed = [turn for turn in turns if turn.start is not None and not is_rejected(turn.flags)]
    latest: Turn | None = None  # the turn that ends last so far
    before: Turn | None = None
    for turn in timed:
        assert turn.start is not None
        if before is not None and before.start is not None and turn.start < before.start:
            message = f"starts at {turn.start:.2f} s, before the previous turn {before.id} ({before.start:.2f} s)"
            flag(turn, findings, "W_TS_ORDER", message, before.span or (before.start, before.start))
        if latest is not None and latest.end is not None and latest.start is not None and turn.end is not None:
            shared = min(turn.end, latest.end) - max(turn.start, latest.start)
            if shared > TOLERANCE:
                message = f"overlaps {latest.id} by {shared:.2f} s ({_format_span(turn)} and {_format_span(latest)})"
                flag(turn, findings, "W_TS_OVERLAP", message, latest.span)
        before = turn
        if turn.end is not None and (latest is None or latest.end is None or turn.end > latest.end):
            latest = turn


def _reject_all(
    turns: Iterable[Turn], findings: list[Finding], code: str, source: Path | StoredClip, why: str = ""
) -> None:
    file = source.path if isinstance(source, StoredClip) else source
    for turn in turns:
        if not is_rejected(turn.flags):
            reject(turn, findings, code, why or f"the file {file.name} does not exist in {file.parent.name}")


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


def check_codebook(corpus: Corpus, config: CorpusConfig) -> None:
    """Add findings about codes of the codebook, and classes of its levels, that never occur.

    Raises:
        ConfigError: the corpus has other labels than the codebook, because its format has labels that cannot change.
    """
    book = config.codebook
    if book is None or not config.coded:
        return
    foreign = [role for role in corpus.roles if corpus.roles[role] and corpus.roles[role] != book.labels.get(role)]
    if foreign:
        labels = ", ".join(corpus.roles[foreign[0]])
        raise ConfigError(
            f"codebook: {book.name} has other codes of the {foreign[0]} than the format, which declares {labels}; "
            "leave codebook out, or list these codes in this order"
        )
    seen = Counter[tuple[str, str]]()
    for conversation in corpus.conversations:
        for turn in conversation.turns:
            seen.update((turn.speaker, code) for code in (split_label(turn.label) if turn.label else ()))
    if not seen:
        return
    codes = [(role, code) for role, labels in book.labels.items() for code in labels]
    if absent := [code for role, code in codes if not seen[role, code]]:
        message = f"{len(absent)} of {len(codes)} codes never occur: {', '.join(absent)}"
        corpus.findings.append(Finding("W_LABEL_ABSENT", "codebook", book.name, message))
    for level in book.levels:
        for role, classes in book.merge(level).codes().items():
            for name in (name for name, members in classes.items() if not any(seen[role, code] for code in members)):
                message = f"the class {name!r} of the {role} never occurs; its codes are {', '.join(classes[name])}"
                corpus.findings.append(Finding("W_LABEL_ABSENT", "codebook", f"{book.name}, level {level}", message))


def check_split_labels(corpus: Corpus, parts: Mapping[str, int | str | None], folds: int | None) -> None:
    """Add findings about labels that the splits cannot tell anything about.

    Args:
        corpus: with the final labels of its turns.
        parts: the split of each conversation, or its fold.
        folds: number of folds; None: there are splits.
    """
    counts: dict[int | str | None, Counter[str]] = {}
    for conversation in corpus.conversations:
        for turn in conversation.turns:
            labels = split_label(turn.label) if turn.label is not None else ()
            counts.setdefault(parts[conversation.id], Counter()).update(labels)
    found: dict[tuple[str, str, str], tuple[str, list[int]]] = {}
    for test in range(folds or 1):
        by_split: dict[str, Counter[str]] = {}
        for part, count in counts.items():
            name = fold_split(part, test, folds) if folds and isinstance(part, int) else str(part)
            by_split[name] = by_split.get(name, Counter()) + count
        for problem in label_problems(by_split):
            key = problem.code, problem.where, problem.label
            found.setdefault(key, (problem.message, []))[1].append(test)
    for (code, where, label), (message, tests) in found.items():
        in_folds = f" (with data.fold {', '.join(map(str, tests))})" if folds and len(tests) < folds else ""
        corpus.findings.append(Finding(code, where, label, message + in_folds))


def cut(
    conversation: Conversation, channels: Mapping[str, int], findings: list[Finding], align: Aligner | None = None
) -> dict[Path, audio.Recording]:
    """Set the samples of every turn that has times in a recording, and add findings about them.

    Args:
        conversation: the session; `audio` of its turns is set.
        channels: role → channel of the recording with only this speaker; empty: channels are mixed down. A recording
            of one speaker is mixed down in any case.
        findings: the list that findings are added to.
        align: refines the times of the turns before they are cut.

    Returns:
        The recordings of the session by file: one, or one for each speaker.
    """
    spoken: dict[Path, list[Turn]] = {}
    for turn in conversation.turns:
        path = recording_of(turn, conversation)
        if path is not None and not is_rejected(turn.flags):
            spoken.setdefault(path, []).append(turn)
    recordings = {}
    for path, turns in spoken.items():
        own = channels if path == conversation.recording else {}
        name = conversation.id if path == conversation.recording else f"{conversation.id} ({turns[0].speaker})"
        recording = _read(path, turns, findings, name, separate=bool(own))
        if recording is not None:
            recordings[path] = recording
            _cut_all([turn for turn in turns if turn.clip is None], recording, own, findings, align)
    return recordings


def recording_of(turn: Turn, conversation: Conversation) -> Path | None:
    """Return the recording that a turn is in: that of its speaker, or else that of the session."""
    return turn.recording or conversation.recording


def _cut_all(
    turns: list[Turn],
    recording: audio.Recording,
    channels: Mapping[str, int],
    findings: list[Finding],
    align: Aligner | None,
) -> None:
    if align is not None:
        for channel, pcm in enumerate(recording.pcm):
            align(pcm, [turn for turn in turns if channels.get(turn.speaker, 0) == channel], findings)
        for turn in (turn for turn in turns if turn.given is not None and turn.span is not None):
            turn.flags = tuple(code for code in turn.flags if code not in TIMELESS)
    for turn in turns:
        if turn.span is not None:
            _cut(turn, recording, channels.get(turn.speaker, 0), findings)


def read_clip(turn: Turn, findings: list[Finding]) -> None:
    """Set the samples of a turn with a clip of its own, and add findings about them."""
    if turn.clip is None or is_rejected(turn.flags):
        return
    recording = _read(turn.clip, [turn], findings, turn.id)
    if recording is not None:
        _take(turn, recording, slice(0, recording.pcm.shape[1]), 0, findings)


def _read(
    path: Path | StoredClip, turns: Sequence[Turn], findings: list[Finding], name: str, *, separate: bool = False
) -> audio.Recording | None:
    """Decode a file and add findings about it; return None and reject its turns if it cannot be decoded."""
    try:
        recording = audio.read_recording(path, separate=separate)
    except DataError as error:
        _reject_all(turns, findings, "E_AUDIO_UNREADABLE", path, str(error).replace(str(path), path.name))
        return None
    span = (0.0, recording.duration)
    if recording.pcm.shape[1] == 0:
        _reject_all(turns, findings, "E_AUDIO_EMPTY", path, f"{path.name} contains no samples")
        return None
    if recording.announced is not None:
        longer = recording.duration - recording.announced
        both = f"contains {recording.duration:.2f} s, but its header announces {recording.announced:.2f} s"
        if longer < -recording.tolerance:
            findings.append(Finding("W_TRUNCATED", path.name, name, f"{both}; copy it again", None, span))
        elif longer > recording.tolerance:
            findings.append(Finding("W_LENGTH", path.name, name, f"{both}; all of it is read", None, span))
    if recording.gain < 1:
        message = f"the peak is {recording.peak:.2f} x full scale; all samples are multiplied by {recording.gain:.3g}"
        findings.append(Finding("W_SCALED", path.name, name, message, None, span))
    if recording.filled:
        message = f"the recorder paused; {recording.filled:.2f} s of silence keep the times right"
        findings.append(Finding("W_AUDIO_GAP", path.name, name, message, None, span))
    if recording.source_channels > 1 and not separate:
        message = f"{recording.source_channels} channels"
        findings.append(Finding("W_STEREO", path.name, name, message, None, span))
    if recording.source_rate != SAMPLE_RATE:
        findings.append(Finding("W_RESAMPLED", path.name, name, f"{recording.source_rate} Hz", None, span))
    return recording


def _cut(turn: Turn, recording: audio.Recording, channel: int, findings: list[Finding]) -> None:
    assert turn.start is not None
    assert turn.end is not None
    whole, times = (0.0, recording.duration), f"{_format_span(turn)}, recording {recording.duration:.2f} s"
    late = turn.end - recording.duration
    if late > LATE:
        reject(turn, findings, "E_TS_RANGE", f"ends {late:.2f} s after the recording ({times})", whole)
        return
    if late > 0:
        flag(turn, findings, "W_TS_CLAMPED", f"ends {1000 * late:.0f} ms after the recording ({times})", whole)
    if late > TOLERANCE:  # a smaller excess is a rounding error, and the time is stored as it is
        turn.end = recording.duration
    if channel >= len(recording.pcm):
        message = f"the {turn.speaker} is expected on channel {channel}, but the file has {len(recording.pcm)}"
        reject(turn, findings, "E_AUDIO_MISSING", message, whole)
        return
    piece = slice(audio.samples(max(0.0, turn.start)), audio.samples(turn.end))
    _take(turn, recording, piece, channel, findings)


def _take(turn: Turn, recording: audio.Recording, piece: slice, channel: int, findings: list[Finding]) -> None:
    """Check the samples of a turn and set them as its audio."""
    clip = recording.pcm[channel, piece]
    span = (piece.start / SAMPLE_RATE, piece.stop / SAMPLE_RATE)
    broken = (recording.broken >= span[0]) & (recording.broken < span[1])
    seconds = len(clip) / SAMPLE_RATE
    if broken.any():
        message = f"{broken.sum()} samples are NaN or infinite, the first at {recording.broken[broken][0]:.3f} s"
        reject(turn, findings, "E_AUDIO_NAN", message, span)
        return
    if len(clip) < audio.MIN_SAMPLES:
        reject(turn, findings, "E_TOO_SHORT", f"{1000 * seconds:.0f} ms of audio", span)
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
