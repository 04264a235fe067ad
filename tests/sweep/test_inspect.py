"""`sweep inspect`: the parts that train, and examples exactly as the model reads them."""

import re
from pathlib import Path

import pytest

from data.shards.dataset import Shards
from tests.sweep.common import sweep, tree


def shown(here: Path, *sets: str, example: str | None = None) -> str:
    options = [word for item in sets for word in ("--set", item)]
    named = ["--example", example] if example else []
    before = tree(here)
    outcome = sweep("inspect", here / "good.yaml", *options, *named)
    assert (outcome.code, outcome.err) == (0, "")
    assert tree(here) == before
    return outcome.out


def numbers(out: str, part: str) -> list[int]:
    row = next(line for line in out.splitlines() if line.split()[:1] == [part])
    return [int(word.replace(",", "")) for word in row.split()[1:3]]


def test_the_parts_add_up(here: Path) -> None:
    out = shown(here, "model.end_of_audio=learned", "train.learning_rates.adapter=0.5")
    rows = [numbers(out, part) for part in ("encoder", "adapter", "lora", "tokens", "llm")]
    assert numbers(out, "all") == [sum(column) for column in zip(*rows, strict=True)]
    assert [total == trained for total, trained in rows] == [False, True, True, True, False]
    assert re.search(r"adapter .* 5\.00e-01 +new", out)
    assert re.search(r"encoder .* frozen +hubert-group", out)


def test_an_example_is_the_sequence_that_the_model_reads(here: Path, corpus: Shards) -> None:
    columns = corpus.columns
    row = columns["id"].index("c000/3")
    split = columns["split"][row]
    if split != "train":
        row = columns["split"].index("train") + 3
    name = columns["id"][row]
    texts = columns["text"][row - 1 : row + 1]
    out = shown(here, "data.history=1", "model.cls=after", "model.end_of_audio=learned", example=name)
    sound = rf"\[sound: {columns['n_samples'][row] / 16_000:.2f} s → \d+ frames → \d+ embeddings\]\[END\]"
    assert re.search(rf"reads +<s>therapist: {texts[0]}⏎client: {texts[1]}{sound}⏎label:", out)
    assert re.search(rf"answers +{columns['label'][row]}\[CLS\]", out)
    assert out.count("loss over") == 1
    assert re.search(r"loss over .*'</s>' \d+\n", out)


def test_every_task_has_its_example(here: Path) -> None:
    out = shown(here, "tasks.response=1", "tasks.quality=1", "model.prompt.instruction=task")
    assert [line.split(":")[0] for line in out.splitlines() if re.match(r"\w+: c\d+", line)] == [
        "classify",
        "response",
        "quality",
    ]
    assert "<s>Write the therapist's reply.⏎" in out


def test_labels_that_begin_alike_are_told(here: Path) -> None:
    """Only EOS tells them apart, which the scores include."""
    assert "begin with the same tokens" not in shown(here)
    manifest = here / "shards" / "manifest.json"
    manifest.parent.mkdir()
    source = Path(re.search(r'"shards": "([^"]+)"', (here / "good.yaml").read_text())[1])  # type: ignore[index]
    for path in source.iterdir():
        (manifest.parent / path.name).write_bytes(path.read_bytes())
    manifest.write_text(manifest.read_text().replace('"neutral"', '"change of plan"'))
    out = shown(here, f"data.shards={manifest.parent}")
    assert "labels 'change' and 'change of plan' begin with the same tokens" in out


@pytest.mark.parametrize("wanted", ["c000/999", "nonsense"])
def test_an_id_that_is_not_there_is_one_line(wanted: str, here: Path) -> None:
    outcome = sweep("inspect", here / "good.yaml", "--example", wanted)
    assert outcome.code == 2
    assert f"--example {wanted}: there is no such item for classify" in outcome.err
