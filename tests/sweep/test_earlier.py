"""Learning from earlier sweeps: what is taken from where, what it advises, and that it is the same after a kill."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from data.errors import ConfigError, UserError
from sweep.config.diff import claim_folder, compare
from sweep.config.schema import Config, parse
from sweep.preflight.earlier_sweeps import learn
from sweep.search.sampling.advice import DRAWS, Advice, read_earlier
from sweep.search.study import StudyStore
from tests.sweep.common import Asked

RANK, RATE, MODALITY, END = "model.lora.rank", "train.learning_rate", "model.modality", "model.end_of_audio"
SPACE: dict[str, Any] = {
    MODALITY: ["speech", "text"],
    RANK: [2, 4, 8, 16],
    RATE: {"low": 1e-4, "high": 1e-2, "log": True},
    END: {"choices": ["none", "learned"], "when": {MODALITY: ["speech"]}},
}
HERE = "f" * 16


def sweep_of(name: str, **changed: Any) -> Config:
    tree: dict[str, Any] = {"name": name, "train": {"epochs": 1}}
    search = {"trials": 24, "space": SPACE, "pruning": None, "sampler": "tpe"}
    return parse(tree | changed | {"search": search | changed.get("search", {})}, name)


def quality(values: dict[str, Any], best: str = "speech") -> float:
    """Speech at rank 8 is best, and rates matter little."""
    return 0.3 + 0.3 * (values[MODALITY] == best) + 0.1 * (values[RANK] == 8) - 10 * abs(values[RATE] - 1e-3)


def run(folder: Path, config: Config, count: int, best: str = "speech", fingerprint: str = HERE) -> list[Asked]:
    """Start or resume a sweep, and run trials until there are `count`."""
    claim_folder(config, folder)
    study, asked = StudyStore.open(folder, config), list[Asked]()
    study.bind(fingerprint)
    if (earlier := learn(config, folder, fingerprint)) is not None:
        earlier.save(folder)
        study.earlier = earlier.sweeps
    while (trial := study.ask([], count)) is not None:
        study.report(trial.number, 1, {"macro_f1": quality(trial.params, best), "steps": 1})
        study.complete(trial.number)
        asked.append(trial)
    return asked


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of 16 trials, one with another task, and a folder that is none."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "old", sweep_of("old"), 16)
    run(folder / "few", sweep_of("few"), 2)
    replies = {"tasks": {"classify": 0, "response": 1}, "search": {"metric": "loss"}}
    claim_folder(config := sweep_of("replies", **replies), folder / "replies")
    StudyStore.open(folder / "replies", config)
    (folder / "nothing").mkdir()
    return folder


def learning(runs: Path, *names: str, **search: Any) -> Config:
    return sweep_of("new", search={"learn_from": [str(runs / name) for name in names], **search})


def test_first_trials_are_what_an_earlier_sweep_found_good(runs: Path, tmp_path: Path) -> None:
    asked = run(tmp_path / "new", learning(runs, "old"), 4)
    best = max(trial.value or 0 for trial in StudyStore.of(runs / "old").trials())
    assert [quality(values) > best - 0.1 for number, values in asked if number != 2] == [True] * 3
    earlier = read_earlier(tmp_path / "new")
    assert earlier is not None
    assert earlier.lines() == [f"learns from {runs / 'old'}: 16 trials (weight 1)"]


def test_new_trials_outvote_what_was_learned(runs: Path, tmp_path: Path) -> None:
    """Here text is best, where the earlier sweep says speech."""
    asked = run(tmp_path / "new", learning(runs, "old"), 16, best="text")
    modalities = [values[MODALITY] for _, values in asked]
    assert modalities[0] == "speech"
    assert modalities[8:].count("text") >= 6


def test_resumed_search_draws_alike_without_the_earlier_sweep(runs: Path, tmp_path: Path) -> None:
    """What was taken is kept in the sweep's own folder."""
    shutil.copytree(runs / "old", tmp_path / "old")
    config = learning(tmp_path, "old")
    whole = run(tmp_path / "one", config, 8)
    first = run(tmp_path / "many", config, 3)
    shutil.rmtree(tmp_path / "old")
    assert first + run(tmp_path / "many", config, 8) == whole


def test_weight_halves_for_each_difference_and_auto_leaves_out(runs: Path) -> None:
    config = sweep_of("new", search={"learn_from": ["auto"]}, train={"epochs": 3})
    earlier = learn(config, runs / "new", "another")
    assert earlier is not None
    assert earlier.lines() == [
        f"learns from {runs / 'old'}: 16 trials, another corpus, other epochs (weight 0.25)",
        "learns nothing from few: 2 complete trials, fewer than 4",
        "learns nothing from replies: other tasks: response, not classify",
    ]
    assert learn(sweep_of("new"), runs / "new", HERE) is None


def test_advice_fades_with_own_trials(runs: Path, tmp_path: Path) -> None:
    config = learning(runs, "old")
    earlier = learn(config, tmp_path, HERE)
    assert earlier is not None
    run(tmp_path / "new", config, 12)
    own = StudyStore.open(tmp_path / "new", config).runs()
    draws = [Advice(config, earlier.sweeps, own[:count]).draws for count in (0, 2, 4, 12)]
    assert draws == [DRAWS, 0, DRAWS // 2, DRAWS // 4]
    [old] = earlier.sweeps
    assert Advice(config, [old.model_copy(update={"weight": 0.05})], own).draws < 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"search.learn_from: .*nothing: not the folder of a sweep \(no config.yaml\); remove it"),
        ("replies", r"search.learn_from: .*replies: other tasks: response, not classify; remove it"),
        ("few", r"few: 2 complete trials, fewer than 4; remove it"),
    ],
)
def test_sweep_that_teaches_nothing_is_refused(name: str, message: str, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        learn(learning(runs, name), tmp_path, HERE)
    assert "\n" not in str(refusal.value)


def test_started_sweep_keeps_what_it_learns_from(runs: Path, tmp_path: Path) -> None:
    [change] = compare(sweep_of("new"), learning(runs, "old")).refused
    assert change.key == "search.learn_from"
    (tmp_path / "earlier.json").write_text("{")
    with pytest.raises(UserError, match=r"earlier.json: damaged; restore a copy"):
        read_earlier(tmp_path)
    with pytest.raises(ConfigError, match=r"search.learn_from"):
        sweep_of("new", search={"learn_from": []})
