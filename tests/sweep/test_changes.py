"""What a started sweep takes and what it refuses, and what a dry run says about it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from data.errors import ConfigError
from sweep.cli.show import preview_table
from sweep.config import version
from sweep.config.diff import claim_folder, compare
from sweep.config.files import load
from sweep.config.paths import trial_folder
from sweep.config.schema import Config, parse
from sweep.config.version import code_version
from sweep.preflight import preview as preview_module
from sweep.preflight.preview import Preview, preview
from sweep.search.study import StudyStore
from tests.sweep.common import POINTS, SPACE, ask, report, settings, tree

RANK, RATE = "model.lora.rank", "train.learning_rate"
PROGRESS = {"epoch": 1, "step": 3, "total_steps": 19}


def axes(**changed: Any) -> Config:
    """The settings of the tests with other axes; None removes one."""
    space = {key: axis for key, axis in (SPACE | changed).items() if axis is not None}
    points = [{key: value for key, value in point.items() if key in space} for point in POINTS]
    return settings(space=space, points=points)


def told(before: Config, after: Config) -> dict[str, tuple[str, str]]:
    """Verdict and words by key."""
    return {change.key: (change.verdict, change.why) for change in compare(before, after).all}


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("search.trials", 40, ""),
        ("search.trials", 3, ""),
        ("resources.slots", 3, ""),
        ("resources.workers", 2, "dropout"),
        ("resources.cpus_per_worker", 2.0, ""),
        ("resources.gpus_per_worker", 0.5, "CPUs and GPUs"),
        ("storage.keep", None, ""),
        ("train.token_budget", 99, "fp32"),
        ("train.checkpoint_steps", 9, ""),
        ("data.reader", "local", ""),
    ],
)
def test_what_no_result_depends_on_is_taken(key: str, value: Any, word: str) -> None:
    [(found, (verdict, why))] = told(settings(), settings().with_values({key: value})).items()
    assert (found, verdict) == (key, "taken")
    assert word in why


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("seed", 1, "comparable"),
        ("data.shards", "elsewhere", "comparable"),
        ("data.history", 3, "comparable"),
        ("tasks.forecast", 1.0, "comparable"),
        ("model.modality", "text", "comparable"),
        ("model.lora.alpha", 3, "comparable"),
        ("train.epochs", 9, "comparable"),
        ("search.metric", "accuracy", "judged"),
        ("search.pruning", {"first_epoch": 3}, "pruned"),
        ("search.startup_trials", 2, "drawn"),
        ("storage.ledger", "sqlite:///x.db", "left behind"),
        ("name", "other", "names"),
    ],
)
def test_what_decides_a_result_is_refused(key: str, value: Any, why: str) -> None:
    before, after = settings(), settings().with_values({key: value})
    assert {found.partition(".")[0] for found in told(before, after)} == {key.partition(".")[0]}
    assert all(verdict == "refused" and why in words for verdict, words in told(before, after).values())


@pytest.mark.parametrize(
    ("key", "axis"),
    [
        (RANK, [2, 8, 16, 32]),
        (RANK, [1, 16, 8, 2]),
        (RATE, {"low": 1e-4, "high": 1e-2, "log": True}),
        (RATE, {"low": 5e-4, "high": 1e-1, "log": True}),
        ("model.cls", ["none", "after"]),
        ("train.weight_decay", {"low": 0.0, "high": 0.1}),
        ("model.end_of_audio", {"choices": ["none", "learned"], "when": {"model.modality": ["speech"]}}),
    ],
)
def test_a_wider_space_is_taken(key: str, axis: Any) -> None:
    assert [verdict for verdict, _ in told(axes(), axes(**{key: axis})).values()] == ["taken"]


@pytest.mark.parametrize(
    ("key", "axis", "why"),
    [
        (RANK, [2, 16], "narrower: 8 would be left out"),
        (RANK, [2, 16, 32, 64], "narrower: 8 would be left out"),
        (RANK, None, "put the axis back"),
        (RANK, {"low": 1, "high": 64}, "list of choices cannot become a range"),
        (RATE, {"low": 1e-3, "high": 1e-2, "log": True}, "narrower"),
        (RATE, {"low": 5e-4, "high": 5e-3, "log": True}, "narrower"),
        (RATE, {"low": 5e-4, "high": 1e-2}, "log, step"),
        (RATE, [1e-3], "list"),
        ("model.trainable", SPACE["model.trainable"]["choices"], "condition"),  # type: ignore[call-overload,index]
        ("model.cls", ["before", "after"], "trials so far have 'none', which a new axis must contain"),
    ],
)
def test_a_narrower_space_is_refused(key: str, axis: Any, why: str) -> None:
    found = told(axes(), axes(**{key: axis}))
    assert found.pop(f"search.space.{key}")[0] == "refused"
    assert why in told(axes(), axes(**{key: axis}))[f"search.space.{key}"][1]
    assert found.keys() <= {"search.points"}


def test_a_section_that_is_taken_out_is_a_change() -> None:
    found = told(settings(pruning={"first_epoch": 3}), settings())
    assert {verdict for verdict, _ in found.values()} == {"refused"}
    assert "search.pruning.first_epoch" in found


@pytest.mark.parametrize(("key", "value"), [("keep", 0.25), ("after_trials", 9), ("audit", 0.2), ("first_epoch", 1)])
def test_the_rule_of_pruning_stays_as_it_was(key: str, value: float) -> None:
    before, after = settings(pruning={}), settings(pruning={key: value})
    for one, other in ((before, after), (after, before)):
        [(found, (verdict, why))] = told(one, other).items()
        assert (found, verdict) == (f"search.pruning.{key}", "refused")
        assert "pruned by the former rule" in why


def test_of_the_first_rung_the_epoch_counts_that_comes_out() -> None:
    """It stays where it is, however that is said; and a wider axis of epochs must not move it."""

    def searched(first: int | None, epochs: list[int]) -> Config:
        return settings(points=[], pruning={"first_epoch": first}, space={"train.epochs": epochs})

    key, axis = "search.pruning.first_epoch", "search.space.train.epochs"
    assert told(searched(None, [2, 4]), searched(3, [2, 4])) == {key: ("taken", "epoch 3 as before")}
    found = told(searched(None, [2, 4]), searched(None, [2, 4, 8]))
    assert {name: verdict for name, (verdict, _) in found.items()} == {key: "refused", axis: "taken"}
    assert found[key][1].endswith("; set it to 3")
    for way_out in (searched(3, [2, 4, 8]), searched(None, [1, 2, 4])):
        assert {verdict for verdict, _ in told(searched(None, [2, 4]), way_out).values()} == {"taken"}


def test_steps_must_hold_the_former_ones() -> None:
    def stepped(low: float, high: float) -> Config:
        return settings(points=[], space={"train.warmup": {"low": low, "high": high, "step": 0.2}})

    assert [verdict for verdict, _ in told(stepped(0.2, 0.6), stepped(0.0, 0.8)).values()] == ["taken"]
    assert [verdict for verdict, _ in told(stepped(0.2, 0.6), stepped(0.1, 0.7)).values()] == ["refused"]


def test_points_may_follow_and_not_go_before() -> None:
    more = settings(points=[*POINTS, {RANK: 2}])
    assert told(settings(), more) == {"search.points": ("taken", "new points run next")}
    for other in ([{RANK: 2}, *POINTS], POINTS[:1], POINTS[::-1]):
        assert told(settings(), settings(points=other))["search.points"][0] == "refused"


def test_equal_settings_have_no_changes_and_the_order_of_axes_is_none() -> None:
    assert compare(load("demo"), load("demo")).all == ()
    assert compare(axes(), settings(space=dict(reversed(SPACE.items())))).all == ()


def test_a_refusal_names_each_difference_its_reason_and_the_way_out_and_writes_nothing(tmp_path: Path) -> None:
    claim_folder(settings(), tmp_path / "s")
    before = tree(tmp_path)
    other = axes(**{RANK: [2]}).with_values({"seed": 3, "train.epochs": 9, "search.trials": 99})
    with pytest.raises(ConfigError) as error:
        claim_folder(other, tmp_path / "s")
    first, *reasons = str(error.value).splitlines()
    assert first.startswith(f"{tmp_path / 's'}: started with other settings (seed: 0 → 3; train.epochs: 4 → 9; ")
    assert "search.space.model.lora.rank: [2, 8, 16] → [2]" in first
    assert first.endswith("; use --out for a new folder")
    assert "  - seed, train.epochs: trials would not be comparable" in reasons
    assert "  - search.space.model.lora.rank: narrower: 8, 16 would be left out" in reasons
    assert not any("search.trials" in line for line in [first, *reasons])
    assert tree(tmp_path) == before


def test_a_change_that_is_taken_is_written(tmp_path: Path) -> None:
    claim_folder(settings(), tmp_path)
    claim_folder(wider := axes(**{RANK: [2, 8, 16, 32]}), tmp_path)
    assert load(str(tmp_path / "config.yaml")) == wider
    with pytest.raises(ConfigError, match="narrower: 32 would be left out"):
        claim_folder(settings(), tmp_path)


def test_a_sweep_of_before_this_section_was_there_goes_on(tmp_path: Path) -> None:
    claim_folder(settings(), tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text[: text.index("storage:")])
    claim_folder(settings(), tmp_path)


def test_the_code_version_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_version() == code_version.__wrapped__()
    monkeypatch.setattr(version, "__file__", str(tmp_path / "sweep/config/version.py"))
    versions = []
    for name, content in {"sweep/a.py": "1", "model/b.py": "2", "data/deep/c.py": "3", "docs/d.py": "4"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        versions.append(code_version.__wrapped__())
    (tmp_path / "sweep/a.py").write_text("5")
    versions.append(code_version.__wrapped__())
    assert versions[2] == versions[3], "other files do not count"
    assert len(set(versions)) == 4


def shown(found: Preview) -> str:
    (console := Console(width=200, record=True)).print(preview_table(found))
    return console.export_text()


def test_a_dry_run_of_a_new_sweep(tmp_path: Path) -> None:
    found = preview(settings(), tmp_path / "new", None)
    assert (found.started, found.refused, found.points, found.drawn, found.going_on) == (False, False, POINTS, 7, [])
    assert "new sweep" in shown(found)
    assert "7 drawn by the search" in shown(found)
    assert list(tmp_path.iterdir()) == []


def a_sweep(folder: Path, *, config: Config | None = None) -> Config:
    """Five trials: complete, failed, and three that run, with a checkpoint, a damaged one, and none."""
    config = config or settings(points=[*POINTS, *[{RANK: rank} for rank in (2, 8, 16, 8)]])
    claim_folder(config, folder)
    study = StudyStore.open(folder, config)
    study.bind("aa", code_version())
    ask(study, 5)
    report(study, 0, 0.1, 0.2, 0.3, 0.4)
    study.complete(0)
    study.fail(1, "lost")
    for number in (2, 3):
        trial_folder(folder, number).mkdir(parents=True)
    save(trial_folder(folder, 2) / "checkpoint.pt")
    (trial_folder(folder, 3) / "checkpoint.pt").write_bytes(b"half")
    return config


def save(path: Path) -> None:
    from model.checkpoints import checkpoint

    state = {"tensors": {"w": torch.zeros(1)}, "progress": PROGRESS, "parents": [], "files": {}, "meaning": {}}
    checkpoint.save(path, state)


def test_a_dry_run_says_what_goes_on_from_where_and_what_starts(tmp_path: Path) -> None:
    config = a_sweep(tmp_path)
    before = tree(tmp_path)
    found = preview(config.with_values({"search.trials": 8}), tmp_path, "aa")
    assert tree(tmp_path) == before
    assert found.going_on == [
        (2, "from step 19, in epoch 2"),
        (3, "from its start (its newest checkpoint is damaged)"),
        (4, "from its start"),
    ]
    assert (found.points, found.drawn, found.ended) == ([{RANK: 8}], 2, {"COMPLETE": 1, "FAIL": 1})
    assert (found.notes, found.refused) == ([], False)
    text = shown(found)
    for part in ("search.trials: 9 → 8", "1 COMPLETE", "trial 2 from step 19", f"trial 5: {RANK} 8", "2 drawn by the"):
        assert part in text, text


def test_a_dry_run_falls_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    config = a_sweep(tmp_path)
    from model.checkpoints import checkpoint

    save(trial_folder(tmp_path, 3) / checkpoint.PREVIOUS)
    assert preview(config, tmp_path, "aa").going_on[1] == (
        3,
        "from step 19, in epoch 2 (its newest checkpoint is damaged)",
    )


def test_a_dry_run_of_a_sweep_that_is_done(tmp_path: Path) -> None:
    config = settings(trials=2, points=[])
    claim_folder(config, tmp_path)
    study = StudyStore.open(tmp_path, config)
    ask(study, 2)
    for number in (0, 1):
        report(study, number, 0.1)
        study.complete(number)
    found = preview(config, tmp_path, None)
    assert (found.going_on, found.points, found.drawn, found.ended) == ([], [], 0, {"COMPLETE": 2})
    assert shown(found).count("no trial") == 2


def test_a_dry_run_tells_of_other_data_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = a_sweep(tmp_path)
    monkeypatch.setattr(preview_module, "code_version", lambda: "2+new")
    found = preview(config, tmp_path, "bb")
    assert found.refused
    assert "data: aa → bb: another corpus, which is refused" in shown(found)
    assert f"code: {code_version()} → 2+new" in shown(found)
    assert "refused: another corpus" in shown(found)


def test_a_dry_run_shows_a_refusal_as_the_run_would(tmp_path: Path) -> None:
    a_sweep(tmp_path)
    before = tree(tmp_path)
    other = axes(**{RANK: [2]})
    with pytest.raises(ConfigError) as error:
        claim_folder(other, tmp_path)
    found = preview(other, tmp_path, "aa")
    assert found.refused
    assert found.changes.refusal(tmp_path) == str(error.value)
    assert "narrower: 8, 16 would be left out" in shown(found)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("url", [None, "sqlite:///ledger.db"])
def test_a_dry_run_of_a_folder_without_a_trial_writes_nothing(url: str | None, tmp_path: Path) -> None:
    config = settings().with_values({"storage.ledger": url})
    claim_folder(config, tmp_path)
    before = tree(tmp_path)
    found = preview(config, tmp_path, "aa")
    assert (found.started, found.points, found.drawn) == (True, POINTS, 7)
    assert tree(tmp_path) == before


def test_a_preview_survives_words_that_look_like_markup(tmp_path: Path) -> None:
    tree_ = settings().model_dump() | {"search": {"points": []}}
    config = parse(tree_, "a").with_values({"model.prompt.separator": "[SEP]"})
    claim_folder(parse(tree_, "a"), tmp_path)
    assert "[SEP]" in shown(preview(config, tmp_path, None))
