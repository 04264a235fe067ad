"""`sweep inspect`: the parts that train, and examples exactly as the model reads them."""

import re
import shutil
from pathlib import Path

import pytest

from data.shards.dataset import Shards
from tests.model.families import make
from tests.sweep.common import complaint, sweep, tree


def inspect(here: Path, *settings: str, example: str | None = None) -> str:
    """Return what the command prints; it changes no file."""
    options = [word for setting in settings for word in ("--set", setting)]
    options += ["--example", example] if example else []
    before = tree(here)
    outcome = sweep("inspect", here / "good.yaml", *options)
    assert (outcome.code, outcome.err) == (0, "")
    assert tree(here) == before
    return outcome.out


def numbers(out: str, part: str) -> list[int]:
    row = next(line for line in out.splitlines() if line.split()[:1] == [part])
    return [int(word.replace(",", "")) for word in row.split()[1:3]]


def test_inspect_counts_the_parts(here: Path) -> None:
    out = inspect(here, "model.end_of_audio=learned", "train.learning_rates.adapter=0.5")
    rows = [numbers(out, part) for part in ("encoder", "adapter", "lora", "tokens", "llm")]
    assert numbers(out, "all") == [sum(column) for column in zip(*rows, strict=True)]
    assert [total == trained for total, trained in rows] == [False, True, True, True, False]
    assert re.search(r"adapter .* 5\.00e-01 +new", out)
    assert re.search(r"encoder .* frozen +hubert-group", out)


def test_inspect_shows_the_sequence_that_is_read(here: Path, corpus: Shards) -> None:
    columns = corpus.columns
    row = columns["split"].index("train") + 3
    out = inspect(here, "data.history=1", "model.cls=after", "model.end_of_audio=learned", example=columns["id"][row])
    before, text = columns["text"][row - 1 : row + 1]
    clip = rf"\[\w+: {columns['n_samples'][row] / 16_000:.2f} s → \d+ frames → \d+ embeddings\]\[END\]"
    assert re.search(rf"reads +<s>therapist: {before}⏎client: {text}{clip}⏎label:", out)
    assert re.search(rf"answers +{columns['label'][row]}\[CLS\]", out)
    assert out.count("loss over") == 1
    assert re.search(r"loss over .*'</s>' \d+\n", out)


def test_inspect_says_how_prompts_start(here: Path) -> None:
    for bos, line in (
        ("auto", "prompts start with <s> (model.prompt.bos auto)"),
        ("never", "prompts start without BOS (model.prompt.bos never; always adds <s>)"),
    ):
        out = inspect(here, f"model.prompt.bos={bos}")
        assert line in out
        assert ("reads     <s>therapist:" in out) == (bos == "auto")


def test_inspect_says_what_lora_reaches(here: Path) -> None:
    out = inspect(here, "model.lora.targets=[q_proj, v_proj]")
    line = next(line for line in out.splitlines() if line.startswith("LoRA reaches"))
    start = r"LoRA reaches \d+% of the LLM's weights \(embeddings aside\): q_proj, v_proj; not gate_proj \d+%"
    assert re.match(start, line)
    assert "warning" not in out
    assert "LoRA reaches" not in inspect(here, "model.lora.enabled=false")


def test_inspect_warns_when_lora_skips_the_experts(here: Path) -> None:
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    llm = (f"model.llm.path={make('gpt_oss', here / 'moe')}", "model.lora.dropout=0")
    out = " ".join(inspect(here, *llm, "model.lora.targets=all-linear").split())
    assert re.search(
        r"warning: model\.lora\.targets \(all-linear\) skip [5-9]\d% of the LLM's weights; fused experts are", out
    )
    assert f"so name them too ({', '.join(experts)})" in out
    named = inspect(here, *llm, f"model.lora.targets=[q_proj, {', '.join(experts)}]")
    assert "warning" not in named


def test_inspect_shows_an_example_of_every_task(here: Path) -> None:
    out = inspect(here, "tasks.response=1", "tasks.quality=1", "model.prompt.instruction=task")
    tasks = [line.split(":")[0] for line in out.splitlines() if re.match(r"\w+: c\d+", line)]
    assert tasks == ["classify", "response", "quality"]
    assert "<s>Write the therapist's reply.⏎" in out


def test_inspect_names_labels_that_begin_alike(here: Path, corpus: Shards) -> None:
    """Only the end of the sequence tells them apart, which the scores include."""
    assert "begin with the same tokens" not in inspect(here)
    manifest = Path(shutil.copytree(corpus.folder, here / "shards")) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"neutral"', '"change of plan"'))
    out = inspect(here, f"data.shards={manifest.parent}")
    assert "labels 'change' and 'change of plan' begin with the same tokens" in out


@pytest.mark.parametrize("wanted", ["c000/999", "nonsense"])
def test_inspect_of_an_unknown_id_is_one_error(wanted: str, here: Path) -> None:
    message = complaint(sweep("inspect", here / "good.yaml", "--example", wanted))
    assert message.startswith(f"--example {wanted}: there is no such item for classify")
