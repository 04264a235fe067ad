"""What is drawn next: with trials that ran out of memory, and in a space that grew.

Every test runs on a journal file, SQLite and PostgreSQL.
"""

from pathlib import Path

from sweep.search.study import Reason, StudyStore
from tests.sweep.common import Asked, ask, report
from tests.sweep.stores import postgres, settings, shared_sqlite, storage  # noqa: F401 — fixtures

RANK, RATE = "model.lora.rank", "train.learning_rate"
SMALL = {RANK: [2, 4, 8], RATE: {"low": 1e-4, "high": 1e-2, "log": True}}
LARGE = {RANK: [2, 4, 8, 16, 32], RATE: {"low": 1e-5, "high": 1e-1, "log": True}}


def run(study: StudyStore, target: int, limit: int = 8, reason: Reason = "out of memory") -> list[Asked]:
    """Trials one after another; ranks above `limit` fail, and the rate is what counts for the others."""
    found = []
    while (asked := study.ask([], target)) is not None:
        number, values = asked
        if values[RANK] > limit:
            study.fail(number, "out of memory at step 3", reason=reason)
        else:
            report(study, number, values.get(RATE, values[RANK]))
            study.complete(number)
        found.append(asked)
    return found


def test_a_sweep_in_which_nothing_fits_goes_on_at_random(tmp_path: Path) -> None:
    """Else the first of the infeasible trials would be called the best, and drawn again and again."""
    config = settings(points=[], space={RANK: {"low": 16, "high": 1024}}, startup_trials=2)
    study = StudyStore.open(tmp_path, config)
    drawn = [values[RANK] for _, values in run(study, 9)]
    assert len(set(drawn)) > 6
    assert {entry.state for entry in study.trials()} == {"FAIL"}


def test_the_ledger_says_fail_and_the_draws_repeat(tmp_path: Path) -> None:
    config = settings(points=[], space={RANK: {"low": 1, "high": 64}})
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    whole = run(one := StudyStore.open(tmp_path / "one", config), 12)
    resumed: list[Asked] = []
    for target in range(1, 13):
        resumed += run(StudyStore.open(tmp_path / "many", config), target)
    assert resumed == whole
    assert {(entry.state, entry.reason) for entry in one.trials()} == {("COMPLETE", None), ("FAIL", "out of memory")}


def test_a_space_that_grew_is_searched_and_former_trials_count(tmp_path: Path) -> None:
    before = run(StudyStore.open(tmp_path, settings(points=[], space=SMALL)), 6, limit=99)
    (tmp_path / "again").mkdir()
    run(StudyStore.open(tmp_path / "again", settings(points=[], space=SMALL)), 6, limit=99)
    wider = settings(points=[], space=LARGE)
    study = StudyStore.open(tmp_path, wider)
    assert [entry.params for entry in study.trials()] == [values for _, values in before]
    more = run(study, 24, limit=99)
    assert {values[RANK] for _, values in more} >= {16, 32}
    assert any(not 1e-4 <= values[RATE] <= 1e-2 for _, values in more)
    assert run(StudyStore.open(tmp_path / "again", wider), 24, limit=99) == more, "the same history draws the same"
    assert all(entry.params.keys() == {RANK, RATE} for entry in StudyStore.read(tmp_path, wider).trials())


def test_lists_of_choices_may_grow_again(tmp_path: Path) -> None:
    for count, choices in enumerate([[2, 4], [2, 4, 8], [1, 2, 4, 8], [1, 2, 4, 8, 16]], start=1):
        study = StudyStore.open(tmp_path, settings(points=[], space={RANK: choices}))
        run(study, 4 * count, limit=99)
    assert all(entry.params.keys() == {RANK} for entry in study.trials())
    assert [entry.state for entry in study.trials()] == ["COMPLETE"] * 16


def test_running_trials_keep_their_values_in_a_space_that_grew(tmp_path: Path) -> None:
    before = ask(StudyStore.open(tmp_path, settings(points=[], space=SMALL)), 3)
    new = {"model.cls": ["none", "after"], "model.end_of_audio": {"choices": ["none", "learned"], "when": {RANK: [2]}}}
    config = settings(points=[{RANK: 32, "model.cls": "after"}], space=LARGE | new)
    assert (config.model.cls, config.model.end_of_audio) == ("none", "none")
    again = ask(StudyStore.open(tmp_path, config), 4)
    for (number, old), (same, now) in zip(before, again[:3], strict=True):
        fixed = {"model.end_of_audio": "none"} if old[RANK] == 2 else {}
        assert (same, now) == (number, old | {"model.cls": "none"} | fixed)
    assert again[3][1] | {RANK: 32, "model.cls": "after"} == again[3][1], "a new point is the next trial"


def test_a_trial_has_its_own_configuration_whatever_the_space_became(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, settings(points=[], space=SMALL))
    run(study, 3)
    own = [study.trial_config(entry) for entry in study.trials()]
    wider = StudyStore.open(tmp_path, settings(points=[], space=LARGE | {"model.cls": ["none", "after"]}))
    assert [wider.trial_config(entry) for entry in wider.trials()] == own
