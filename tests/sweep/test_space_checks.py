"""What a search asks for is done, or refused: each in a line with key, value, rule and what to do."""

from pathlib import Path
from typing import Any

import pytest

from data.errors import ConfigError
from sweep.config.diff import claim_folder
from sweep.config.files import load, presets
from sweep.config.schema import Config, parse
from sweep.search.space_checks import check_requests, notes, refusals
from tests.sweep.common import complaint, refused, sweep

MODALITY, END, RANK = "model.modality", "model.end_of_audio", "model.lora.rank"
SPEECH = {MODALITY: ["speech", "text"], END: {"choices": ["none", "learned"], "when": {MODALITY: ["speech"]}}}
STRIDE = "model.adapter.stride: 5 is larger than model.adapter.window (4), so frames would be skipped; lower it"
LATER = {"train.learning_rate": {"low": 1e-4, "high": 1e-2}}


def config(space: dict[str, Any], points: list[dict[str, Any]] | None = None, **search: Any) -> Config:
    return parse({"name": "a", "search": {"space": space, "points": points or [], **search}}, "a")


@pytest.mark.parametrize(
    ("space", "points", "problem"),
    [
        (
            SPEECH,
            [{MODALITY: "text", END: "learned"}],
            f"search.points[0].{END}: 'learned' would not be used, because {MODALITY} is 'text' and the axis is varied "
            f"only where it is 'speech'; remove the value, or change {MODALITY}",
        ),
        (
            {END: SPEECH[END] | {"when": {"model.lora.enabled": [False]}}},
            [{END: "learned"}],
            f"search.points[0].{END}: 'learned' would not be used, because model.lora.enabled is True and the axis is "
            "varied only where it is False; remove the value, or change model.lora.enabled",
        ),
        (
            SPEECH,
            [{MODALITY: "text"}, {MODALITY: "speech"}, {MODALITY: "text"}],
            "search.points[2]: {'model.modality': 'text'} are the values of search.points[0], and nothing is trained "
            "twice; remove one of them, or vary `seed` to repeat a trial",
        ),
        (
            {RANK: {"low": 4, "high": 8, "step": 10}},
            [],
            f"search.space.{RANK}.step: 10 is larger than the range from 4 to 8, so only 4 would be drawn; lower the "
            f"step, or set {RANK} to 4",
        ),
        (
            {END: {"choices": ["none", "learned"], "when": {MODALITY: ["speach"]}}},
            [],
            f"search.space.{END}.when.{MODALITY}: 'speach' is no value of {MODALITY}: input should be 'text', 'speech' "
            "or 'text+speech'; correct it",
        ),
        (
            {RANK: [8, "8"]},
            [],
            f"search.space.{RANK}: 8 and '8' are the same setting, and nothing is trained twice; remove one of them",
        ),
        (
            {"model.lora.targets": ["q_proj", ["q_proj"]]},
            [],
            "search.space.model.lora.targets: 'q_proj' and ['q_proj'] are the same setting, and nothing is trained "
            "twice; remove one of them",
        ),
        (
            {"model.adapter.window": [4], "model.adapter.stride": [4, 5]},
            [],
            f"search.space.model.adapter.stride: no trial can use 5: {STRIDE}",
        ),
        (
            {"model.adapter.window": [4, 8], "model.adapter.stride": [4, 5]},
            [{"model.adapter.window": 4, "model.adapter.stride": 5}],
            "search.points[0]: no trial can use {'model.adapter.window': 4, 'model.adapter.stride': 5}: " + STRIDE,
        ),
    ],
)
def test_request_that_no_trial_does_is_refused(space: Any, points: Any, problem: str) -> None:
    found = list(refusals(asked := config(space | LATER if not points else space, points)))
    assert found == [problem]
    with pytest.raises(ConfigError) as error:
        check_requests(asked, Path("nowhere"))
    assert str(error.value) == f"a: 1 problem\n  - {problem}"


@pytest.mark.parametrize(
    ("search", "note"),
    [
        (
            {"space": SPEECH, "points": [{MODALITY: "text"}, {MODALITY: "speech"}], "trials": 1},
            "search.points: 2 points, and search.trials is 1, so those from search.points[1] on do not run; set "
            "search.trials to 2 to run them all",
        ),
        (
            {"space": LATER | {END: {"choices": ["none"], "when": {MODALITY: ["text"]}}}},
            f"search.space.{END}: never varied, because {MODALITY} is 'speech', not 'text'; change that, or remove the "
            "axis",
        ),
        (
            {"space": LATER | {MODALITY: ["text"], END: SPEECH[END]}},
            f"search.space.{END}: never varied, because {MODALITY} is never 'speech'; change that, or remove the axis",
        ),
        (
            {"space": LATER | {RANK: {"low": 4, "high": 32, "step": 8}}},
            f"search.space.{RANK}.high: 32 is not on the steps of 8 from 4, so the largest value is 28; set high to "
            "it, or change the step",
        ),
        (
            {"space": SPEECH, "trials": 12},
            "search.trials: 12, and search.space has 3 different trials, after which the sweep ends, since nothing is "
            "trained twice; widen search.space, or set search.trials to 3",
        ),
        (
            {"space": SPEECH | LATER, "points": [{MODALITY: "speech"}] * 2, "trials": 3},
            "search.points[1]: equal to search.points[0]; both run, and the axes that they leave out are drawn "
            "differently",
        ),
        (
            {"space": LATER, "pruning": {"first_epoch": 9}},
            "search.pruning.first_epoch: 9 is not before the last epoch, so no trial is pruned; lower it, or set "
            "search.pruning to null",
        ),
    ],
)
def test_request_that_is_done_in_part_is_a_note(search: Any, note: str) -> None:
    asked = config(**search)
    assert (list(refusals(asked)), list(notes(asked))) == ([], [note])


def test_presets_ask_for_what_is_done() -> None:
    """The presets that search text models keep the axes of speech for those who set the modality."""
    for preset in presets():
        assert list(refusals(load(preset))) == []
        assert all("never varied" in note for note in notes(load(preset))), preset


def test_started_sweep_may_keep_what_is_refused_now(tmp_path: Path) -> None:
    """A sweep of a former version resumes with its configuration; what is added to it is checked."""
    old = config(SPEECH, [{MODALITY: "text", END: "learned"}] * 2, trials=3)
    with pytest.raises(ConfigError, match="2 problems"):
        check_requests(old, tmp_path)
    claim_folder(old, tmp_path)
    check_requests(old, tmp_path)
    worse = config(SPEECH, [*old.search.points, {MODALITY: "text", END: "none"}], trials=4)
    with pytest.raises(ConfigError, match=r"1 problem\n  - search.points\[2\]"):
        check_requests(worse, tmp_path)


POINT = "search.points=[{model.modality: text, model.end_of_audio: learned}]"
AXES = "search.space={model.modality: [text+speech, text], model.end_of_audio: {choices: [none, learned], when: {%s}}}"


def test_dry_run_and_run_refuse_alike(here: Path) -> None:
    sets = ("--set", AXES % "model.modality: [text+speech]", "--set", POINT)
    for dry in ((), ("--dry-run",)):
        message = refused(here, "run", "good.yaml", "--out", "new", *sets, *dry)
        assert message.startswith("t: 1 problem\n  - search.points[0].model.end_of_audio: 'learned' would not be used")


def test_dry_run_refuses_a_list_that_matches_no_layer(here: Path) -> None:
    """A value that no trial can use fails before the first trial, and so does one in a list."""
    axis = "search.space={model.lora.targets: [all-linear, [q_proj, nope_proj]], train.warmup: [0, 0.1]}"
    outcome = sweep("run", "good.yaml", "--out", "new", "--set", axis, "--dry-run")
    assert complaint(outcome).startswith("model.lora.targets: nope_proj match no linear layer")
    assert not Path("new").exists()
