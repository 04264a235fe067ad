"""`--set` with any value at any key gives settings that read back as they were written, or one clear error."""

import random
from pathlib import Path

import pytest

from data.corpus.config import CorpusConfig
from sweep.config.files import dump, load
from sweep.config.loader import flat, load_settings
from sweep.config.schema import DEFAULTS
from tests.security.mutations import check_variety, outcome

# One a line, as a shell passes them.
VALUES = r"""
null
true
3
-1
0
1e400
1.5
.nan
.inf
-.inf
abc
''
"\0"
{}
[]
[1, a]
[[1], {a: b}]
{a: 1}
{1: 2}
{null: 1}
{true: [1]}
{a: {b: {c: 1}}}
{? [1, 2] : 3}
{? {a: 1} : 3}
{[1]: 2}
{a:[1]}
{a: &b {c: *b}}
{!!bool x: 1}
{<<: {a: 1}}
{<<: 1}
{<<: [1]}
{…}
!!binary aGFsbG8=
!!binary ä
!!set {a, b}
!!set [a]
!!python/object:os.system {}
!!omap [a: 1]
!!pairs [a]
!!timestamp 2020-01-01
!!timestamp x
!!int abc
!!int ''
!!float x
!!bool x
!!null x
!!str [1]
!!map 1
!!seq a
!a b
2020-01-01
&a [*a]
*a
<<: 1
%
@a
`
|
? a
a: b: c
...
0x
0o8
1_000
1__
1:30
190:20:30.15
{low: 1}
{low: 1, high: .inf}
{low: 1, high: 1e400}
{low: -.inf, high: 1.0}
{low: 1, high: 99999999999999999999999}
{low: 1.0, high: 2, step: 1e-300}
{choices: [1]}
{choices: [[1]]}
{choices: [{a: 1}, [2], null]}
{choices: [.nan]}
[.inf, 1]
{when: {a: [1]}}
{choices: [1], when: {seed: [0]}}
{train.learning_rate: [1e-4, 1e-3]}
""".strip().splitlines()
VALUES += ["", "- a\n- b", "---\n1\n---\n2", "\ufeff1", "\ud800", "\0", "a" * 300, "9" * 400, "[" * 2000]
AXES = ("seed", "train.learning_rate", "model.cls", "model.lora.targets", "train.class_weights", "data.augment.speeds")
AXES += ("model.prompt.roles", "model.encoder.path", "resources.slots", "a", "")
PARTS = ("", ".low", ".step", ".choices", ".choices.0", ".when", ".when.model.modality", ".when.train", ".x")
ODD_KEYS = ["", ".", "a", "..", " a", "ä", "search.points.0", "search.points.0.seed", "model.lora.targets.0", "name.x"]
ODD_KEYS += ["train.class_weights.classify.change", "search.pruning.keep.x", "model.prompt.roles.client", "train.x.y"]


def keys(settings: dict[str, object]) -> list[str]:
    """Return every setting, every section, and keys that are neither."""
    sections = {key.rsplit(".", depth)[0] for key in settings for depth in (1, 2, 3) if key.count(".") >= depth}
    return [*settings, *sorted(sections), *ODD_KEYS]


def check(path: Path, override: str) -> str:
    def work() -> None:
        loaded = load(str(path), [override])
        (path.with_name("b.yaml")).write_text(dump(loaded), encoding="utf-8")
        assert load(str(path.with_name("b.yaml"))) == loaded

    return outcome(work)


def write(folder: Path) -> Path:
    path = folder / "a.yaml"
    path.write_text("name: a\nsearch: {space: {model.cls: [none, after], train.warmup: {low: 0.0, high: 0.5}}}\n")
    return path


def cases(count: int, seed: int) -> list[str]:
    """Return overrides of every key, each with some values."""
    draw = random.Random(seed)
    every = keys(DEFAULTS) + [f"search.space.{axis}{part}" for axis in AXES for part in PARTS]
    return [f"{key}={value}" for key in every for value in draw.sample(VALUES, count)]


def test_any_override_loads_or_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    check_variety([check(path, case) for case in cases(1, 0)])


@pytest.mark.long
def test_every_override_loads_or_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    check_variety([check(path, case) for case in cases(len(VALUES), 1)])


def test_every_value_is_tried_on_an_axis(tmp_path: Path) -> None:
    path = write(tmp_path)
    wide = [f"search.space={value}" for value in VALUES] + [f"search.space.seed={value}" for value in VALUES]
    check_variety([check(path, case) for case in wide])


def test_overrides_of_a_corpus_load_or_are_refused() -> None:
    draw = random.Random(0)
    cases = [f"{key}={value}" for key in keys(flat(CorpusConfig())) for value in draw.sample(VALUES, 2)]
    check_variety([outcome(lambda case=case: load_settings(CorpusConfig, None, [case])) for case in cases])
