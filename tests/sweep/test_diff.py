"""Which changes a started sweep accepts and refuses, and what a dry run says about them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from data.errors import ConfigError
from model.checkpoints import checkpoint
from sweep.cli.show import preview_table
from sweep.config import version
from sweep.config.diff import claim_folder, compare, continued
from sweep.config.files import load
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.config.version import code_version
from sweep.preflight import preview as preview_module
from sweep.preflight.preview import Preview, preview
from sweep.search.study import StudyStore
from tests.sweep.common import POINTS, SPACE, ask, report, settings, tree

RANK, RATE = "model.lora.rank", "train.learning_rate"
PROGRESS = {"epoch": 1, "step": 3, "total_steps": 19}


def axes(**changed: Any) -> Config:
    """Return the settings of the tests with other axes; None removes one."""
    space = {key: axis for key, axis in (SPACE | changed).items() if axis is not None}
    points = [{key: value for key, value in point.items() if key in space} for point in POINTS]
    return settings(space=space, points=points)


def verdicts(before: Config, after: Config) -> dict[str, tuple[str, str]]:
    """Return verdict and reason by key."""
    return {change.key: (change.verdict, change.why) for change in compare(before, after).all}


@pytest.mark.parametrize(
    ("key", "value", "verdict", "why"),
    [
        ("search.trials", 40, "accepted", ""),
        ("resources.workers", 2, "accepted", "dropout"),
        ("resources.gpus_per_worker", 0.5, "accepted", "CPUs and GPUs"),
        ("train.token_budget", 99, "accepted", "fp32"),
        ("data.reader", "local", "accepted", ""),
        ("seed", 1, "refused", "comparable"),
        ("data.history", 3, "refused", "comparable"),
        ("tasks.forecast", 1.0, "refused", "comparable"),
        ("model.modality", "text", "refused", "comparable"),
        ("train.epochs", 9, "refused", "comparable"),
        ("search.metric", "accuracy", "refused", "ranked"),
        ("search.pruning", {"first_epoch": 3}, "refused", "pruned"),
        ("search.startup_trials", 2, "refused", "sampled"),
        ("storage.ledger", "sqlite:///x.db", "refused", "left in"),
        ("name", "other", "refused", "names"),
    ],
)
def test_setting_is_accepted_if_no_result_depends_on_it(key: str, value: Any, verdict: str, why: str) -> None:
    found = verdicts(settings(), settings().with_values({key: value}))
    assert {name.partition(".")[0] for name in found} == {key.partition(".")[0]}
    assert all(said == verdict and why in words for said, words in found.values())


@pytest.mark.parametrize(
    ("key", "axis", "refusal"),
    [
        (RANK, [1, 16, 8, 2], ""),
        (RATE, {"low": 1e-4, "high": 1e-2, "log": True}, ""),
        ("model.cls", ["none", "after"], ""),
        ("train.weight_decay", {"low": 0.0, "high": 0.1}, ""),
        ("model.end_of_audio", {"choices": ["none", "learned"], "when": {"model.modality": ["speech"]}}, ""),
        (RANK, [2, 16, 32, 64], "narrower: 8 would be left out"),
        (RANK, None, "put the axis back"),
        (RANK, {"low": 1, "high": 64}, "list of choices cannot become a range"),
        (RATE, {"low": 1e-3, "high": 1e-2, "log": True}, "narrower"),
        (RATE, {"low": 5e-4, "high": 1e-2}, "log, step"),
        ("model.trainable", SPACE["model.trainable"]["choices"], "condition"),  # type: ignore[call-overload,index]
        ("model.cls", ["before", "after"], "existing trials have 'none', which a new axis must contain"),
    ],
)
def test_space_may_widen_and_not_narrow(key: str, axis: Any, refusal: str) -> None:
    found = verdicts(axes(), axes(**{key: axis}))
    verdict, why = found.pop(f"search.space.{key}")
    assert (verdict, refusal in why) == ("refused" if refusal else "accepted", True)
    assert found.keys() <= {"search.points"}


def test_range_with_steps_keeps_its_steps() -> None:
    former, wider, moved = (
        settings(points=[], space={"train.warmup": {"low": low, "high": high, "step": 0.2}})
        for low, high in ((0.2, 0.6), (0.0, 0.8), (0.1, 0.7))
    )
    assert not compare(former, wider).refused
    assert compare(former, moved).refused


@pytest.mark.parametrize(("key", "value"), [("keep", 0.25), ("after_trials", 9), ("audit", 0.2), ("first_epoch", 1)])
def test_pruning_rule_cannot_change(key: str, value: float) -> None:
    before, after = settings(pruning={}), settings(pruning={key: value})
    for pair in ((before, after), (after, before)):
        [(name, (verdict, why))] = verdicts(*pair).items()
        assert (name, verdict) == (f"search.pruning.{key}", "refused")
        assert "pruned by the previous rule" in why
    removed = verdicts(after, settings())
    assert {verdict for verdict, _ in removed.values()} == {"refused"}
    assert f"search.pruning.{key}" in removed


def test_first_rung_may_be_written_otherwise_but_not_move() -> None:
    def searched(first: int | None, epochs: list[int]) -> Config:
        return settings(points=[], pruning={"first_epoch": first}, space={"train.epochs": epochs})

    key, axis = "search.pruning.first_epoch", "search.space.train.epochs"
    assert verdicts(searched(None, [2, 4]), searched(3, [2, 4])) == {key: ("accepted", "epoch 3 as before")}
    found = verdicts(searched(None, [2, 4]), searched(None, [2, 4, 8]))
    assert {name: verdict for name, (verdict, _) in found.items()} == {key: "refused", axis: "accepted"}
    assert found[key][1].endswith("; set it to 3")
    for fix in (searched(3, [2, 4, 8]), searched(None, [1, 2, 4])):
        assert {verdict for verdict, _ in verdicts(searched(None, [2, 4]), fix).values()} == {"accepted"}


def test_points_may_be_appended_only() -> None:
    more = settings(points=[*POINTS, {RANK: 2}])
    assert verdicts(settings(), more) == {"search.points": ("accepted", "new points run next")}
    for points in ([{RANK: 2}, *POINTS], POINTS[:1], POINTS[::-1]):
        assert verdicts(settings(), settings(points=points))["search.points"][0] == "refused"


def test_equal_settings_have_no_changes() -> None:
    assert compare(load("demo"), load("demo")).all == ()
    assert compare(axes(), settings(space=dict(reversed(SPACE.items())))).all == (), "axes have no order"


def test_refusal_names_differences_and_reasons(tmp_path: Path) -> None:
    claim_folder(settings(), folder := tmp_path / "s")
    before = tree(tmp_path)
    changed = axes(**{RANK: [2]}).with_values({"seed": 3, "train.epochs": 9, "search.trials": 99})
    with pytest.raises(ConfigError) as error:
        claim_folder(changed, folder)
    first, *reasons = str(error.value).splitlines()
    assert first.startswith(f"{folder}: started with different settings (seed: 0 → 3; train.epochs: 4 → 9; ")
    assert "search.space.model.lora.rank: [2, 8, 16] → [2]" in first
    assert first.endswith("; use --out for a new folder")
    assert "  - seed, train.epochs: trials would not be comparable" in reasons
    assert "  - search.space.model.lora.rank: narrower: 8, 16 would be left out" in reasons
    assert not any("search.trials" in line for line in [first, *reasons])
    assert tree(tmp_path) == before
    shown = preview(changed, folder, "aa")
    assert (shown.refused, shown.changes.refusal(folder)) == (True, str(error.value))
    assert "narrower: 8, 16 would be left out" in text_of(shown)
    assert tree(tmp_path) == before


def test_accepted_change_is_written(tmp_path: Path) -> None:
    """Also over a file of the time before its last section was there."""
    claim_folder(settings(), tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text[: text.index("storage:")])
    claim_folder(wider := axes(**{RANK: [2, 8, 16, 32]}), tmp_path)
    assert load(str(tmp_path / "config.yaml")) == wider


def test_code_version_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_version() == code_version.__wrapped__()
    monkeypatch.setattr(version, "__file__", str(tmp_path / "sweep/config/version.py"))
    versions = []
    for name in ("sweep/a.py", "model/b.py", "data/deep/c.py", "docs/d.py", "sweep/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(len(versions)))
        versions.append(code_version.__wrapped__())
    assert versions[2] == versions[3], "other files do not count"
    assert len(set(versions)) == 4


def text_of(found: Preview) -> str:
    (console := Console(width=200, record=True)).print(preview_table(found))
    return console.export_text()


def save(path: Path) -> None:
    state = {"tensors": {"w": torch.zeros(1)}, "progress": PROGRESS, "parents": [], "files": {}, "meaning": {}}
    checkpoint.save(path, state)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Five trials: complete, failed, and three that run, with a checkpoint, a damaged one, and none."""
    config = settings(points=[*POINTS, *[{RANK: rank} for rank in (2, 8, 16, 8)]])
    claim_folder(config, tmp_path)
    study = StudyStore.open(tmp_path, config)
    study.bind("aa", code_version())
    ask(study, 5)
    report(study, 0, 0.1, 0.2, 0.3, 0.4)
    study.complete(0)
    study.fail(1, "lost")
    for number in (2, 3):
        trial_folder(tmp_path, number).mkdir(parents=True)
    save(trial_folder(tmp_path, 2) / checkpoint.FILE)
    (trial_folder(tmp_path, 3) / checkpoint.FILE).write_bytes(b"half")
    return config


@pytest.mark.parametrize(("url", "started"), [(None, False), (None, True), ("sqlite:///study.db", True)])
def test_dry_run_without_a_trial_writes_nothing(url: str | None, started: bool, tmp_path: Path) -> None:
    config = settings().with_values({"storage.ledger": url})
    if started:
        claim_folder(config, tmp_path)
    before = tree(tmp_path)
    found = preview(config, tmp_path, "aa")
    assert (found.started, found.refused, found.points, found.drawn, found.resumed) == (started, False, POINTS, 7, [])
    assert ("nothing" if started else "new sweep") in text_of(found)
    assert "7 drawn by the search" in text_of(found)
    assert tree(tmp_path) == before


def test_dry_run_lists_what_resumes_and_what_starts(config: Config, tmp_path: Path) -> None:
    before = tree(tmp_path)
    found = preview(config.with_values({"search.trials": 8}), tmp_path, "aa")
    assert tree(tmp_path) == before
    damaged = " (its newest checkpoint is damaged)"
    assert found.resumed == [(2, "from step 19, in epoch 2"), (3, f"from its start{damaged}"), (4, "from its start")]
    assert (found.points, found.drawn, found.ended) == ([{RANK: 8}], 2, {"COMPLETE": 1, "FAIL": 1})
    assert (found.notes, found.refused) == ([], False)
    text = text_of(found)
    for part in ("search.trials: 9 → 8", "1 COMPLETE", "trial 2 from step 19", f"trial 5: {RANK} 8", "2 drawn by the"):
        assert part in text, text
    save(trial_folder(tmp_path, 3) / checkpoint.PREVIOUS)
    assert preview(config, tmp_path, "aa").resumed[1] == (3, f"from step 19, in epoch 2{damaged}")


def test_dry_run_of_a_finished_sweep_starts_nothing(tmp_path: Path) -> None:
    claim_folder(config := settings(trials=2, points=[]), tmp_path)
    study = StudyStore.open(tmp_path, config)
    ask(study, 2)
    for number in (0, 1):
        report(study, number, 0.1)
        study.complete(number)
    found = preview(config, tmp_path, None)
    assert (found.resumed, found.points, found.drawn, found.ended) == ([], [], 0, {"COMPLETE": 2})
    assert text_of(found).count("no trial") == 2


def test_dry_run_reports_other_data_and_code(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview_module, "code_version", lambda: "2+new")
    found = preview(config, tmp_path, "bb")
    assert found.refused
    config = config.with_values({"model.prompt.separator": "[SEP]"})  # which looks like markup
    assert "[SEP]" in text_of(preview(config, tmp_path, "bb"))
    for part in ("data: aa → bb (refused: another corpus)", f"code: {code_version()} → 2+new", "refused: another"):
        assert part in text_of(found)


def test_sweep_without_a_setting_for_bos_keeps_bos(tmp_path: Path) -> None:
    """Before the setting existed, BOS was always there; `auto` of a later file does not change what a sweep reads."""
    claim_folder(config := settings(), tmp_path)
    path = tmp_path / "config.yaml"
    written = yaml.safe_load(path.read_text())
    assert written["model"]["prompt"].pop("bos") == "auto"
    path.write_text(yaml.safe_dump(written))
    assert load(str(path)).model.prompt.bos == "always"
    assert load(str(path), ["model.prompt.bos=never"]).model.prompt.bos == "never"
    kept = continued(config, tmp_path)
    assert compare(config, kept.with_values({"model.prompt.bos": "auto"})).all == ()
    assert not compare(load(str(path)), kept).all
    for _ in range(2):  # the file has the setting afterwards
        claim_folder(continued(config, tmp_path), tmp_path)
        assert load(str(path)).model.prompt.bos == "always"
    with pytest.raises(ConfigError, match=r"model\.prompt\.bos: 'always' → 'never'"):
        claim_folder(continued(config.with_values({"model.prompt.bos": "never"}), tmp_path), tmp_path)


def test_own_file_with_part_of_a_prompt_follows_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("name: own\nmodel: {prompt: {format: plain, instruction: task}}\n")
    assert load(str(tmp_path / "own.yaml")).model.prompt.bos == "auto"
    assert continued(settings(), tmp_path / "new") == settings()


def test_sweep_that_has_started_keeps_the_layers_of_lora(tmp_path: Path) -> None:
    """The default was another one; naming the layers is a change like any other."""
    (own := tmp_path / "own.yaml").write_text("name: own\n")
    claim_folder(load(str(own), ["model.lora.targets=[q_proj, v_proj]"]), folder := tmp_path / "sweep")
    assert continued(load(str(own)), folder).model.lora.targets == ["q_proj", "v_proj"]
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: \['q_proj', 'v_proj'\] → 'all-linear'"):
        claim_folder(continued(load(str(own), ["model.lora.targets=all-linear"]), folder), folder)
