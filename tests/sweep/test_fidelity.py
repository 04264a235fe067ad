"""With `search.fidelity: data`, trials are compared on nested shares of the training groups, and survive any kill."""

import contextlib
from pathlib import Path
from typing import Any, cast

import pytest

from data.corpus import synthetic
from data.corpus.config import CorpusConfig
from data.errors import ConfigError, MisfitError
from data.loading.tasks import items, items_of_share, training_groups
from data.preparation.build import prepare
from data.shards.dataset import Shards
from model.training.progress import Metrics
from model.training.trainer import Report
from sweep.analysis import confirm
from sweep.analysis.leaderboard import leaderboard
from sweep.config.files import load
from sweep.config.paths import trial_folder
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config, parse
from sweep.config.search import SHARES
from sweep.execution.trial import run_shares
from sweep.preflight.checks import resolve_inputs
from sweep.search.cost import spent
from sweep.search.study import StudyStore
from sweep.tracking.summary import end_tags, trial_metrics
from tests.sweep.common import settings
from tests.sweep.stores import kill_at_writes

VALUES = [0.5, 0.3, 0.9, 0.1]  # of each trial, in every epoch
EPOCHS = 4
RULE = {"kind": "promote", "keep": 0.5, "after_trials": 2, "finish": 1, "compare": "objective"}


class StoppedError(Exception):
    """The trial leaves its worker."""


def config(**search: Any) -> Config:
    space = {"train.learning_rate": {"low": 1e-4, "high": 1e-2}}
    return settings(
        **{"space": space, "fidelity": "data", "pruning": RULE, "startup_trials": 99, "points": [], "trials": 4}
        | search
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    parts = CorpusConfig.model_validate({"split": {"fractions": [0.8, 0.1, 0.1]}})
    return prepare(synthetic.corpus(sessions=24, turns=4), tmp_path_factory.mktemp("shares") / "shards", parts)


def test_shares_are_nested_and_leave_other_splits_whole(shards: Shards) -> None:
    found = [set(items_of_share(share, shards, "classify", "train")) for share in SHARES]
    assert found[0] < found[1] < found[2] == set(items(shards, "classify", "train"))
    groups = {shards.columns["group"][row] for _, row in found[0]}
    assert groups == set(training_groups(shards)[: round(len(training_groups(shards)) / 4)])
    assert items_of_share(0.25, shards, "classify", "val") == items(shards, "classify", "val")


def run(folder: Path, sweep: Config) -> list[tuple[int, float]]:
    """Run what is left of a sweep with one worker, and return the numbers and shares that were trained."""
    study, trained = StudyStore.open(folder, sweep), list[tuple[int, float]]()
    while (asked := study.ask([], sweep.search.trials)) is not None:
        number = asked.number

        def report(epoch: int, metrics: Metrics, number: int = number) -> None:
            if study.report(number, epoch, metrics):
                raise StoppedError

        def train(share: float, part: Path, report: Report, number: int = number) -> None:
            trained.append((number, share))
            for epoch in range(1, EPOCHS + 1):
                costs = {"steps": 40 * share * epoch, "seconds": float(epoch), "epoch": float(epoch)}
                report(epoch, {"macro_f1": VALUES[number], **costs})

        try:
            run_shares(cast("ResolvedConfig", sweep), trial_folder(folder, number), report, train)
            study.complete(number)
        except StoppedError:
            pass
    return trained


def test_trials_are_compared_on_shares(tmp_path: Path) -> None:
    sweep = config()
    trained = run(tmp_path, sweep)
    trials = StudyStore.read(tmp_path, sweep).trials()
    # Trial 0 has no peer yet, 1 is the worse of two, 2 is the best; then 0 is in the better half of three.
    assert trained == [(0, 0.25), (1, 0.25), (0, 0.25), (0, 0.5), (2, 0.25), (2, 0.5), (2, 1.0), (3, 0.25)]
    assert [(trial.state, len(trial.curve), trial.share) for trial in trials] == [
        *(("PRUNED", 8, 0.5), ("PRUNED", 4, 0.25), ("COMPLETE", 12, 1.0), ("PRUNED", 4, 0.25))
    ]
    assert (trials[2].steps, trials[2].metrics["seconds"]) == (40 * (1 + 2 + 4), 3 * EPOCHS)
    assert spent(sweep, trials)["trials"] == pytest.approx(0.75 + 0.25 + 1.75 + 0.25)
    rows = [row[1:4] for row in leaderboard(sweep, tmp_path, trials).table.rows]
    assert rows[:2] == [["COMPLETE", "0.900", "100%"], ["PRUNED 8/12", "0.500", "50%"]]
    assert (end_tags(trials[0], 1)["sweep.share"], end_tags(trials[0], 1)["sweep.rung"]) == ("0.5", "8")
    assert confirm.plan(StudyStore.read(tmp_path, sweep), tmp_path, 1, 1).search.fidelity == "epochs"
    assert trial_metrics(sweep, trials[0], []).keys() == {"best_macro_f1", "best_macro_f1_share_0.25", "objective"}


@pytest.mark.parametrize("every", [3, 7])
def test_kills_change_nothing(every: int, tmp_path: Path) -> None:
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    run(folders[0], config())
    whole = StudyStore.read(folders[0], config()).trials()
    assert kill_at_writes(every, lambda: run(folders[1], config())) > 3
    assert StudyStore.read(folders[1], config()).trials() == whole


def test_finished_share_is_reported_again_and_not_trained(tmp_path: Path) -> None:
    reported, shares = list[int](), list[float]()

    def train(share: float, part: Path, report: Report) -> None:
        shares.append(share)
        (part / "checkpoint.pt").write_text("")
        if share == 0.5 and len(shares) == 2:
            raise KeyboardInterrupt
        report(1, {"macro_f1": 0.5})

    one = cast("ResolvedConfig", config().with_values({"train.epochs": 1}))
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            run_shares(one, tmp_path, lambda epoch, _: reported.append(epoch), train)
    assert (shares, reported) == ([0.25, 0.5, 0.5, 1.0], [1, 1, 2, 3])
    assert [path.parent.name for path in tmp_path.rglob("checkpoint.pt")] == [tmp_path.name]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"search": {"pruning": None}}, "search.pruning is null, so that nothing is compared; set kind: promote"),
        ({"search": {"tie_share": 0.2}}, "search.tie_share is above 0; set it to 0, and confirm the best with"),
        ({"train": {"patience": 2}}, "train.patience is set; set it to null"),
        ({"train": {"keep": "best"}}, "train.keep is best; set it to last"),
        ({"search": {"space": {"train.epochs": [2, 3]}}}, "train.epochs is an axis; set a number"),
    ],
)
def test_what_shares_do_not_go_with_is_one_line(changed: dict[str, Any], message: str) -> None:
    tree = {"name": "a", **changed, "search": {"fidelity": "data"} | changed.get("search", {})}
    with pytest.raises(ConfigError, match=message) as refusal:
        parse(tree, "a.yaml")
    assert len(str(refusal.value).splitlines()) <= 2


def test_too_few_groups_are_refused(place: Path) -> None:
    few = load(str(place / "good.yaml"), ["search.fidelity=data"])
    with pytest.raises(MisfitError, match=r"search.fidelity: data needs 16 groups of sessions .* has \d+; set it to"):
        resolve_inputs(few)
