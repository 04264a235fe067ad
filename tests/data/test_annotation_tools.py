"""Tiers of ELAN and Praat, and CHAT: which tiers have codes, whose they are, and what was said."""

from pathlib import Path

import pytest

from data.corpus.config import CorpusConfig, TierConfig
from data.corpus.schema import JOIN, Corpus
from data.errors import DataError
from data.importers import IMPORTERS, guess_format
from data.importers.annotation_tools.tiers import Annotation, Tier, tier_segments
from data.importers.base.builder import TurnBuilder

PLAIN = TierConfig()
SAID = {"therapist": [(0, 2, "why"), (4, 6, "so")], "client": [(2, 4, "hm")]}


def tier(name: str, *annotations: tuple[float, float, str], speaker: str = "", parent: str = "") -> Tier:
    return Tier(name, [Annotation(start, end, value, name) for start, end, value in annotations], speaker, parent)


def texts() -> list[Tier]:
    return [tier(name, *said) for name, said in SAID.items()]


def builder(config: TierConfig = PLAIN) -> TurnBuilder:
    return TurnBuilder("elan", CorpusConfig(tiers=config))


def coded(*tiers: Tier, config: TierConfig = PLAIN) -> list[tuple[str, str, str]]:
    return [(found.speaker, found.text, found.code) for found in tier_segments(tiers, builder(config), "a.eaf")]


ALL = [("therapist", "why", "oq"), ("client", "hm", "ct"), ("therapist", "so", "sr")]


@pytest.mark.parametrize(
    "codes",
    [
        [tier("Code therapist", (0, 2, "oq"), (4, 6, "sr")), tier("client_code", (2, 4, "ct"))],
        [tier("x code", (0, 2, "oq"), (4, 6, "sr"), parent="therapist"), tier("y code", (2, 4, "ct"), parent="client")],
        [tier("codes", (0, 2, "oq"), (2, 4, "ct"), (4, 6, "sr"))],
        [tier("therapist labels", (0.1, 1.9, "oq"), (3.9, 5.5, "sr")), tier("client MISC", (3, 3, "ct"))],
    ],
    ids=["names", "parents", "one for all", "other times"],
)
def test_codes_belong_to_the_turns_they_lie_in(codes: list[Tier]) -> None:
    assert coded(*texts(), *codes) == ALL


def test_settings_say_which_tiers_have_text_and_codes() -> None:
    extra = tier("gesture", (0, 6, "nods"))
    acts = [tier("therapist.acts", (0, 2, "oq"), (0.5, 1, "gi"), (4, 6, "sr")), tier("client.acts", (2, 4, "ct"))]
    config = TierConfig(text=("therapist", "client"), code="{tier}.acts")
    assert coded(*texts(), *acts, extra, config=config) == [("therapist", "why", f"oq{JOIN}gi"), *ALL[1:]]
    assert ("gesture", "nods", "") in coded(*texts(), extra)
    with pytest.raises(DataError, match=r"tiers\.text: a\.eaf has no tier 'client'; it has therapist"):
        coded(texts()[0], config=config)
    two = [tier("therapist code 1", (0, 2, "oq")), tier("therapist code 2", (0, 2, "cq"))]
    with pytest.raises(DataError, match=r"^a\.eaf: tier 'therapist' has several tiers with codes .* choose one"):
        coded(*texts(), *two)


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (("therapist text", "therapist code", "client text", "client code"), PLAIN),
        (("TherapistTranscription", "TherapistBehaviours", "ClientTranscription", "ClientBehaviours"), PLAIN),
        (
            ("say_therapist", "therapist:x", "say_client", "client:x"),
            TierConfig(text=("say_{speaker}",), code="{speaker}:x"),
        ),
    ],
    ids=["word", "capitals", "settings"],
)
def test_speakers_are_found_within_the_names_of_tiers(names: tuple[str, ...], config: TierConfig) -> None:
    one, one_codes, two, two_codes = names
    tiers = [tier(one, *SAID["therapist"]), tier(one_codes, (0, 2, "oq"), (4, 6, "sr"))]
    tiers += [tier(two, *SAID["client"]), tier(two_codes, (2, 4, "ct"))]
    assert [(name.lower(), *rest) for name, *rest in coded(*tiers, config=config)] == ALL


def test_codes_of_a_shared_tier_belong_to_one_turn_each() -> None:
    said = [tier("therapist", (0, 10, "why")), tier("client", (2, 3, "mhm"))]
    codes = tier("codes", (0, 10, "oq"), (2, 3, "fn"))
    assert coded(*said, codes) == [("therapist", "why", "oq"), ("client", "mhm", "fn")]


def test_tiers_and_codes_left_out_are_findings() -> None:
    depends = tier("translation", (0, 2, "porque"), parent="therapist")
    codes = tier("therapist code", (0, 2, "oq"), (2.5, 3.5, "lost"))
    found = builder()
    segments = tier_segments([*texts(), depends, codes], found, "a.eaf")
    assert [(segment.text, segment.code) for segment in segments] == [("why", "oq"), ("hm", ""), ("so", "")]
    assert {finding.code for finding in found.findings} == {"W_TIER_OTHER", "W_CODE_ALONE"}
    assert any("'lost' at 2.50 s" in finding.message for finding in found.findings)


def read(path: Path, **config: object) -> Corpus:
    return IMPORTERS[guess_format(path)].read(path, None, CorpusConfig.model_validate(config))


EAF = """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT><HEADER TIME_UNITS="milliseconds"/><TIME_ORDER>
<TIME_SLOT TIME_SLOT_ID="t1" TIME_VALUE="500"/><TIME_SLOT TIME_SLOT_ID="t2" TIME_VALUE="1500"/>
<TIME_SLOT TIME_SLOT_ID="t3"/></TIME_ORDER>
<TIER TIER_ID="A" PARTICIPANT="Therapist"><ANNOTATION>
<ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="t1" TIME_SLOT_REF2="t2">
<ANNOTATION_VALUE>a &amp; b</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a2" TIME_SLOT_REF1="t2" TIME_SLOT_REF2="t3">
<ANNOTATION_VALUE>no end</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION></TIER>
<TIER TIER_ID="A MISC" PARENT_REF="A"><ANNOTATION><REF_ANNOTATION ANNOTATION_ID="c1" ANNOTATION_REF="a1">
<ANNOTATION_VALUE>OQ</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION></TIER></ANNOTATION_DOCUMENT>"""


def test_participant_is_the_speaker_of_a_tier(tmp_path: Path) -> None:
    (tmp_path / "a.eaf").write_text(EAF, encoding="utf-8")
    [conversation] = read(tmp_path).conversations
    assert [(turn.speaker, turn.text, turn.label, turn.span) for turn in conversation.turns] == [
        ("therapist", "a & b", "oq", (0.5, 1.5))
    ]


def test_elan_uses_vocabularies_and_the_origin_of_media(tmp_path: Path) -> None:
    header = '<HEADER TIME_UNITS="milliseconds"><MEDIA_DESCRIPTOR MIME_TYPE="audio/x-wav" TIME_ORIGIN="2000"/></HEADER>'
    text = EAF.replace('<HEADER TIME_UNITS="milliseconds"/>', header).replace(
        '"A MISC"', '"acts" LINGUISTIC_TYPE_REF="v"'
    )
    kind = '<LINGUISTIC_TYPE LINGUISTIC_TYPE_ID="v" CONTROLLED_VOCABULARY_REF="acts"/></ANNOTATION_DOCUMENT>'
    (tmp_path / "a.eaf").write_text(text.replace("</ANNOTATION_DOCUMENT>", kind), encoding="utf-8")
    [conversation] = read(tmp_path).conversations
    assert [(turn.label, turn.span) for turn in conversation.turns] == [("oq", (2.5, 3.5))]


ENTITIES = "".join(f'<!ENTITY x{n} "' + 10 * f"&x{n - 1};" + '">' for n in range(1, 12))
BOMB = f'<!DOCTYPE a [<!ENTITY x0 "xxxxxxxxxx">{ENTITIES}]><ANNOTATION_DOCUMENT>&x11;</ANNOTATION_DOCUMENT>'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.eaf", "<ANNOTATION_DOCUMENT>", r"^a\.eaf: not readable as XML"),
        ("a.eaf", "<html/>", r"^a\.eaf:1: not a file of ELAN \(html\)"),
        ("a.eaf", BOMB, r"^a\.eaf: not readable as XML"),
        ("a.eaf", '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>', r"^a\.eaf: not readable as XML"),
        ("a.TextGrid", 'File type = "ooTextFile"\nitem []:\n', r"^a\.TextGrid: not readable as a TextGrid|no turns"),
        ("a.cha", "*THE:\thello\n", r"^a\.cha:1: no line @Begin"),
    ],
)
def test_broken_files_are_refused_in_one_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 3
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "client"
        xmin = 0
        xmax = 3
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 1
            text = ""
        intervals [2]:
            xmin = 1
            xmax = 2,5
            text = "I said ""no"" twice"
        intervals [3]:
            xmin = 2.5
            xmax = 3
            text = " "
    item [2]:
        class = "TextTier"
        name = "client code"
        xmin = 0
        xmax = 3
        points: size = 1
        points [1]:
            number = 1.5
            mark = "CT"
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_long_text_grid_with_points_is_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "s 1.TextGrid").write_text(LONG.replace("2,5", "2.5"), encoding=encoding)
    [conversation] = read(tmp_path).conversations
    assert (conversation.id, [(turn.text, turn.label, turn.span) for turn in conversation.turns]) == (
        "s 1",
        [('I said "no" twice', "ct", (1.0, 2.5))],
    )


CHAT = """@UTF8
@Begin
@Participants:\tTHE Ann Therapist, CLI Bob Client, MOT Mother
@ID:\teng|x|CLI|||||Client|||
*THE:\tso <what brings> [/] what brings &-uh you in (.) today ? \x150_1500\x15
%cod:\tOQ
*CLI:\tI wanna [: want to] <cut down> [!] (be)cause xxx
\tit hurts . [+ exc] \x151500_2000\x15 \x152000_3000\x15
%com:\tlooks away
%cod:\tCT+
*MOT:\tgoodbye@c dear .
@End
"""


def test_chat_text_is_what_was_said_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.cha").write_text(CHAT, encoding="utf-8")
    corpus = read(tmp_path / "a.cha", roles={"MOT": "client"})
    assert [(turn.speaker, turn.text, turn.label, turn.span) for turn in corpus.conversations[0].turns] == [
        ("therapist", "so what brings you in today?", "oq", (0.0, 1.5)),
        ("client", "I want to cut down because it hurts.", "ct+", (1.5, 3.0)),
        ("client", "goodbye dear.", None, None),
    ]


@pytest.mark.parametrize(
    ("lines", "config", "text", "label"),
    [
        ("*PAR:\tno .\n%cod:\t$OQ <w2> $SR\n%spa:\t$x", {}, "no.", f"oq{JOIN}sr"),
        ("*PAR:\tno .\n%cod:\t$OQ\n%cod:\t$SR", {}, "no.", f"oq{JOIN}sr"),
        ("*PAR:\tno .\n%cod:\t$OQ\n%xmisc:\tFN", {"code": "%xmisc"}, "no.", "fn"),
        ("*PAR:\t<<a b> [/] a c> [//] a d +/.\n%cod:\t$OQ", {}, "a d", "oq"),
        ('*PAR:\tno . \x15%snd:"s1"_0_1500\x15\n%cod:\t$OQ', {}, "no.", "oq"),
    ],
    ids=["several", "lines", "setting", "nested", "old bullet"],
)
def test_chat_codes_and_text_of_a_turn(
    lines: str, config: dict[str, str], text: str, label: str, tmp_path: Path
) -> None:
    (tmp_path / "a.cha").write_text(
        f"@UTF8\n@Begin\n@Participants:\tPAR Participant\n{lines}\n@End\n", encoding="utf-8"
    )
    [turn] = read(tmp_path / "a.cha", tiers=config).conversations[0].turns
    assert (turn.text, turn.label) == (text, label)


def test_chat_laughter_alone_has_no_text(tmp_path: Path) -> None:
    text = "@UTF8\n@Begin\n@Participants:\tPAR Participant\n*PAR:\t&=laughs .\n*PAR:\tyes .\n@End\n"
    (tmp_path / "a.cha").write_text(text, encoding="utf-8")
    assert [turn.text for turn in read(tmp_path / "a.cha").conversations[0].turns] == ["", "yes."]


def test_recordings_are_those_that_the_file_names(tmp_path: Path) -> None:
    """Only names count, since paths are those of another machine; a recording named like the session comes first."""
    (audio := tmp_path / "audio").mkdir()
    for name in ("tape 1.wav", "s3.flac"):
        (audio / name).touch()
    media = '<HEADER><MEDIA_DESCRIPTOR MIME_TYPE="audio/x-wav" MEDIA_URL="file:///C:/x/tape%201.wav"/></HEADER>'
    for name in ("s1", "s3"):
        (tmp_path / f"{name}.eaf").write_text(
            EAF.replace('<HEADER TIME_UNITS="milliseconds"/>', media), encoding="utf-8"
        )
    (tmp_path / "s4.cha").write_text(CHAT.replace("@ID", "@Media:\ttape 1, audio\n@ID", 1), encoding="utf-8")
    for source, names in ((tmp_path, ["tape 1.wav", "s3.flac"]), (tmp_path / "s4.cha", ["tape 1.wav"])):
        corpus = IMPORTERS[guess_format(source)].read(source, audio, CorpusConfig(roles={"MOT": "client"}))
        assert [one.recording and one.recording.name for one in corpus.conversations] == names


def test_elan_slots_without_times_are_evenly_spaced(tmp_path: Path) -> None:
    slots = "".join(
        f'<TIME_SLOT TIME_SLOT_ID="t{n}"{time}/>'
        for n, time in enumerate(('TIME_VALUE="0"', "", "", 'TIME_VALUE="3000"'))
    )
    slots = slots.replace('"TIME', '" TIME')
    said = "".join(
        f'<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a{n}" TIME_SLOT_REF1="t{n}" TIME_SLOT_REF2="t{n + 1}">'
        f"<ANNOTATION_VALUE>w{n}</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>"
        for n in range(3)
    )
    tiers = f'<TIER TIER_ID="client">{said}</TIER>'
    text = f"<ANNOTATION_DOCUMENT><TIME_ORDER>{slots}</TIME_ORDER>{tiers}</ANNOTATION_DOCUMENT>"
    (tmp_path / "a.eaf").write_text(text, encoding="utf-8")
    [conversation] = read(tmp_path).conversations
    assert [turn.span for turn in conversation.turns] == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
