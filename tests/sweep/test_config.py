"""Settings: every problem in one error that names key, value and rule; files, overrides, and the sweep's folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.config import AugmentConfig
from data.errors import ConfigError
from sweep.config import files
from sweep.config.diff import claim_folder
from sweep.config.files import dump, load, presets, write

BAD = """
name: "a b"
sede: 1
data: {histroy: 2, reader: rya, sound: loud}
tasks: {clasify: 1, forecast: -1, response: .inf}
model: {modality: sound, lora: {rank: 0, targets: 3}, adapter: {pool: 8}, encoder: {trainable: true}}
train: {epochs: a, learning_rate: .nan, momentum_of_all: 1, losses: {next_token: -1}, schedule: step}
search:
  trials: 0
  space:
    train.epochs: {low: 4, high: 2}
    train.warmup: {low: 0.0, high: 0.5, log: true}
    model.cls: [none, none]
    model.lora.rank: {chioces: [1]}
    data.history: {low: 1}
    model.lora.alpha: {choices: [1], low: 2}
"""
PROBLEMS = """
name: 'a b': string should match pattern
sede: unknown key; did you mean 'seed'?
data.histroy: unknown key; did you mean 'history'?
data.reader: 'rya': input should be 'ray', 'local' or 'auto'
data.sound: 'loud': input should be 'recorded', 'zeroed', 'shuffled' or 'noisy'
tasks.clasify: unknown key; did you mean 'classify'?
tasks.forecast: -1: input should be greater than or equal to 0
tasks.response: inf: input should be a finite number
model.adapter.pool: unknown key; known here: kind, window, stride, hidden, init_from, init_partial
model.encoder.trainable: unknown key; known here: path, dtype
model.modality: 'sound': input should be 'text', 'speech' or 'text+speech'
model.lora.rank: 0: input should be greater than or equal to 1
model.lora.targets: 3: input should be a valid list
model.lora.targets: 3: input should be 'all-linear'
train.epochs: 'a': input should be a valid integer
train.learning_rate: nan: input should be a finite number
train.losses.next_token: -1: input should be greater than or equal to 0
train.schedule: 'step': input should be 'linear', 'cosine' or 'constant'
train.momentum_of_all: unknown key; known here: epochs, patience, batch_size
search.trials: 0: input should be greater than or equal to 1
search.space.train.epochs: {'low': 4, 'high': 2}: low (4) must be below high (2)
search.space.train.warmup: {'low': 0.0, 'high': 0.5, 'log': True}: a logarithmic range needs low above 0
search.space.model.cls: ['none', 'none']: choices must be a list of different values
search.space.model.lora.rank.chioces: unknown key; did you mean 'choices'?
search.space.data.history: {'low': 1}: give a list of choices, or low and high
search.space.model.lora.alpha: {'choices': [1], 'low': 2}: give either choices, or low and high
""".strip().splitlines()


@pytest.fixture
def yaml(tmp_path: Path) -> Any:
    """Writes a YAML file, returns its name."""

    def write_text(text: str | bytes) -> str:
        path = tmp_path / "sweep.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write_text


def problems(name: str, *overrides: str) -> list[str]:
    """The lines of the error, its heading first."""
    with pytest.raises(ConfigError) as error:
        load(name, overrides)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()]


def test_all_problems_come_in_one_error(yaml: Any) -> None:
    heading, *found = problems(name := yaml(BAD))
    assert heading == f"{name}: {len(PROBLEMS)} problems"
    missing = [start for start in PROBLEMS if sum(line.startswith(start) for line in found) != 1]
    assert (missing, len(found)) == ([], len(PROBLEMS))


AXES = [
    (
        "train.learnng_rate: [1]",
        ": no setting that a search may vary has this name; did you mean 'train.learning_rate'?",
    ),
    ("resources.workers: [1]", ": no setting that a search may vary has this name"),
    ("model.llm: [1]", ": no setting that a search may vary has this name; did you mean 'model.llm.path'?"),
    ("train.epochs: [2, 0]", ": the axis holds 0: input should be greater than or equal to 1"),
    ("train.epochs: [2, a]", ": the axis holds 'a': input should be a valid integer, unable to parse"),
    ("train.learning_rate: {low: -1.0, high: 1.0}", ": the axis holds -1.0: input should be greater than 0"),
    ("train.warmup: {low: 0.0, high: 1.0}", ": the axis holds 1.0: input should be less than 1"),
    ("model.cls: {choices: [none], when: {model.modalty: [text]}}", ".when.model.modalty: no such setting"),
]


@pytest.mark.parametrize(("axis", "problem"), AXES)
def test_an_axis_must_fit_the_configuration(axis: str, problem: str, yaml: Any) -> None:
    found = problems(yaml(f"name: a\nsearch: {{space: {{seed: [1, 2], {axis}}}}}"))
    assert len(found) == 2, found
    assert found[1].startswith(f"search.space.{axis.partition(':')[0]}{problem}")


def test_a_point_must_lie_on_its_axes(yaml: Any) -> None:
    space = "{model.lora.rank: [2, 8], train.warmup: {low: 0.1, high: 0.5}, model.cls: [none, after]}"
    points = "[{model.lora.rank: 2, train.warmup: 0.1}, {model.lora.rank: 3, train.warmup: 0.6, train.epochs: 4}]"
    assert problems(yaml(f"name: a\nsearch: {{space: {space}, points: {points}}}"))[1:] == [
        "search.points[1].model.lora.rank: 3 lies outside its axis; choose from [2, 8]",
        "search.points[1].train.warmup: 0.6 lies outside its axis; choose from 0.1 to 0.5",
        "search.points[1].train.epochs: not an axis of search.space; add the axis or remove the key",
    ]


@pytest.mark.parametrize(
    "axis",
    [
        "train.epochs: {low: 1, high: 4, step: -1}",
        "train.epochs: {low: 1, high: 4, step: 0.5}",
        "train.epochs: {low: 1.0, high: 4.0}",
        "model.adapter.stride: [16]",
    ],
)
def test_an_axis_that_can_only_fail_is_refused(axis: str, yaml: Any) -> None:
    problems(yaml(f"name: a\nsearch: {{space: {{{axis}}}}}"))


def test_a_missing_file_names_the_presets() -> None:
    assert problems("demmo") == [
        f"demmo: no such file, and no preset of that name (presets: {', '.join(presets())}); did you mean 'demo'?"
    ]
    assert "did you mean" not in problems("/nowhere/entirely-else.yaml")[0]


def test_a_yaml_error_names_file_and_line(yaml: Any) -> None:
    name = yaml("name: a\ndata:\n  history: [1\ntrain: {}\n")
    assert problems(name)[0].startswith(f"{name}:4: not valid YAML (")
    assert problems(yaml("name: a\nname: b\n"))[0].startswith(f"{name}:2: not valid YAML (found duplicate key name)")
    assert problems(yaml("- a\n"))[0] == f"{name}: not a mapping of settings; see the presets for the form"
    assert problems(yaml("name: ${seed}\n"))[0].startswith(f"{name}: ${{…}} is not filled in; write the value")


@pytest.mark.parametrize("content", [b"3", b"name: \xe9", b"name: a\x01b"])
def test_a_file_that_is_no_yaml_text_at_all_is_a_config_error(content: bytes, yaml: Any) -> None:
    problems(yaml(content))


def test_overrides(yaml: Any) -> None:
    name = yaml("name: a\ntrain: {epochs: 3}")
    changed = load(name, ["train.learning_rate=1e-3", "train.epochs=7", "model.lora.targets=[a,b]", "data.history=0"])
    assert (changed.train.learning_rate, changed.train.epochs, changed.data.history) == (0.001, 7, 0)
    assert changed.model.lora.targets == ["a", "b"]
    assert problems(name, "train.epochs") == ["--set train.epochs: write it as key=value, e.g. --set train.epochs=3"]
    assert problems(name, "train.epoch=3", "nmae=b")[1:] == [
        "train.epoch: unknown key; did you mean 'epochs'?",
        "nmae: unknown key; did you mean 'name'?",
    ]
    assert problems(name, "train.epochs=x")[1].startswith("train.epochs: 'x': input should be a valid integer")


@pytest.mark.parametrize("preset", presets())
def test_a_preset_reads_back_as_it_was_dumped(preset: str, yaml: Any) -> None:
    config = load(preset)
    assert load(yaml(dump(config))) == config


RULES = {
    "model: {adapter: {window: 4, stride: 5}}": """
model.adapter.stride: 5 is larger than model.adapter.window (4), so frames would be skipped; lower it""",
    "model: {trainable: ' + '}": "model.trainable: ' + ' names no part; name one, e.g. adapter+lora",
    "model: {trainable: []}": "model.trainable: '' names no part; name one, e.g. adapter+lora",
    "model: {encoder: {spec_augment: 0.1}}": """
model.encoder.spec_augment: 0.1 has no effect on an encoder that stays frozen; set 0, or add encoder to model.trainable
""",
    "model: {trainable: encoder+lora, encoder: {dtype: bfloat16}}": """
model.encoder.dtype: bfloat16 is for an encoder that stays frozen; set float32 and model.precision=bfloat16, or take the
encoder out of model.trainable""",
    "train: {losses: {next_token: 0}}": """
train.losses: all weights are 0, so there is nothing to minimise; raise one""",
    "tasks: {classify: 0}": "tasks: all weights are 0, so there is nothing to learn; raise one",
    "search: {metric: bleu}": """
search.metric: 'bleu' is no metric of the task classify; choose from macro_f1, accuracy, weighted_f1, loss, ece""",
    "tasks: {classify: 0, response: 1}\nsearch: {metric: macro_f1}": """
search.metric: 'macro_f1' is no metric of the task response; choose from loss, perplexity, bleu, rouge_l""",
    "tasks: {response: 1}\nsearch: {metric: bleu}": """
search.metric: 'bleu' is no metric of the tasks classify, response; choose from total_loss, macro_f1, accuracy,
weighted_f1, loss, ece, response/loss, response/perplexity, response/bleu, response/rouge_l""",
}


def one_line(rule: str) -> str:
    return " ".join(rule.split())


@pytest.mark.parametrize("settings", RULES)
def test_a_rule_over_several_settings_is_one_line(settings: str, yaml: Any) -> None:
    assert problems(yaml(f"name: a\n{settings}"))[1:] == [one_line(RULES[settings])]


def test_rules_over_several_settings_come_together(yaml: Any) -> None:
    broken = [settings for settings in RULES if settings.startswith(("train", "search"))]
    assert problems(yaml("\n".join(["name: a", *broken])))[1:] == [one_line(RULES[settings]) for settings in broken]


def test_a_list_of_parts_is_joined(yaml: Any) -> None:
    config = load(yaml("name: a\nmodel: {trainable: [encoder, lora]}"), ["model.encoder.spec_augment=0.1"])
    assert (config.model.trainable, config.model.patterns) == ("encoder+lora", ["encoder", "lora"])


@pytest.mark.parametrize(
    ("tasks", "metric"),
    [
        ("{}", "macro_f1"),
        ("{classify: 0, forecast: 1}", "macro_f1"),
        ("{classify: 0, response: 1}", "loss"),
        ("{classify: 0, response: 1, quality: 1}", "loss"),
        ("{response: 1}", "macro_f1"),
    ],
)
def test_the_default_metric_is_one_of_the_first_task(tasks: str, metric: str, yaml: Any) -> None:
    config = load(yaml(f"name: a\ntasks: {tasks}\nsearch: {{space: {{train.warmup: [0.1, 0.2]}}}}"))
    assert config.search.metric == metric
    assert load(yaml(dump(config))) == config
    assert config.with_values({"seed": 3}).search.metric == metric


def test_an_axis_of_tasks_must_keep_the_metric(yaml: Any) -> None:
    space = "search: {metric: forecast/macro_f1, space: {tasks.forecast: [1, 0]}}"
    assert problems(yaml(f"name: a\ntasks: {{forecast: 1}}\n{space}"))[1:] == [
        "search.space.tasks.forecast: search.metric: 'forecast/macro_f1' is no metric of the task classify; choose "
        "from macro_f1, accuracy, weighted_f1, loss, ece"
    ]


def test_controls_and_task_weights_can_be_searched_and_the_corpus_cannot(yaml: Any) -> None:
    axes = (
        "data.sound: [recorded, zeroed], data.snr_db: [0, 10], data.last_text: [given, omitted], tasks.forecast: [1, 2]"
    )
    assert len(load(yaml(f"name: a\nsearch: {{space: {{{axes}}}}}")).search.space) == 4
    for axis in ("data.shards: [a, b]", "data.reader: [ray, local]"):
        assert "no setting that a search may vary" in problems(yaml(f"name: a\nsearch: {{space: {{{axis}}}}}"))[1]


def test_folds_are_gone_through_and_not_searched(yaml: Any) -> None:
    """Their trials are no rivals, so each must be a point, and none is pruned."""
    search = "space: {data.fold: [0, 1, 2]}, points: [{data.fold: 0}, {data.fold: 2}]"
    assert load(yaml(f"name: a\nsearch: {{{search}, trials: 2, pruning: null}}")).search.trials == 2
    for more in ("trials: 3, pruning: null", "trials: 2"):
        [_, problem] = problems(yaml(f"name: a\nsearch: {{{search}, {more}}}"))
        assert problem.startswith("search.space.data.fold: a search would choose the easiest fold; ")


def test_augmentation_and_imbalance_can_be_searched(yaml: Any) -> None:
    """A value of an axis is no list: numbers are written in one string."""
    axes = {
        "data.augment.speeds": [None, "0.9, 1.0, 1.1"],
        "data.augment.noise_db": [None, "5, 20"],
        "data.augment.noise_probability": {"low": 0.1, "high": 1},
        "train.sampling": ["none", "balanced"],
    }
    config = load(yaml(json.dumps({"name": "a", "search": {"space": axes}})))
    drawn = config.with_values({key: axis.extremes()[1] for key, axis in config.search.space.items()})
    assert drawn.data.augment == AugmentConfig(speeds=(0.9, 1.0, 1.1), noise_db=(5, 20))
    assert load(yaml(dump(drawn))) == drawn
    axes["data.augment.speeds"] = ["0.9, 3"]
    assert problems(yaml(json.dumps({"name": "a", "search": {"space": axes}})))[1:] == [
        "search.space.data.augment.speeds: the axis holds ' 3': input should be less than or equal to 2"
    ]


def test_numbers_by_label_are_a_setting(yaml: Any) -> None:
    weights = "{classify: {change: 2, 'yes': 0.5}}"
    config = load(yaml(f"name: a\ntrain: {{class_weights: {weights}}}"), [])
    assert config.train.class_weights == {"classify": {"change": 2.0, "yes": 0.5}}
    assert load(yaml(dump(config))) == config
    assert load(yaml(dump(config)), ["train.class_weights=balanced"]).train.class_weights == "balanced"
    assert load(yaml("name: a"), [f"train.class_weights={weights}"]) == config
    found = problems(yaml("name: a\ntrain: {class_weights: {classify: {change: 0}}, sampling: often}"))[1:]
    assert "train.class_weights.classify.change: 0: input should be greater than 0" in found
    assert "train.sampling: 'often': input should be 'none' or 'balanced'" in found


def test_a_folder_keeps_its_settings_but_takes_more_trials(tmp_path: Path) -> None:
    config, folder = load("demo"), tmp_path / "sweep"
    claim_folder(config, folder)
    claim_folder(load("demo", ["search.trials=40", "resources.slots=3", "resources.workers=2"]), folder)
    kept = load(str(folder / "config.yaml"))
    assert (kept.search.trials, kept.resources.workers) == (40, 2)
    before = (folder / "config.yaml").read_bytes()
    for override, shown in {
        "train.epochs=5": "train.epochs: 4 → 5",
        "storage.ledger=sqlite:///x.db": "storage.ledger: None → 'sqlite:///x.db'",
        "search.startup_trials=2": "search.startup_trials: 6 → 2",
        "seed=1": "seed: 0 → 1",
    }.items():
        with pytest.raises(ConfigError, match=f"started with other settings \\({shown}\\); use --out"):
            claim_folder(load("demo", [override, "search.trials=40", "resources.workers=2"]), folder)
    assert (folder / "config.yaml").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(load("demo"), path := tmp_path / "config.yaml")
    before = path.read_bytes()
    monkeypatch.setattr(files, "dump", lambda config: "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        write(load("demo"), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("values", ["[0, 1]", "[1, 0, 0.5]"])
def test_an_axis_must_not_change_what_metrics_without_a_prefix_speak_of(values: str) -> None:
    axis = [f"search.space={{tasks.classify: {values}}}", "search.points=[]", "tasks.forecast=1"]
    with pytest.raises(ConfigError, match=r"search\.space\.tasks\.classify: its values make classify or forecast the"):
        load("demo", axis)
    load("demo", ["search.space={tasks.forecast: [0, 1]}", "search.points=[]"])


def test_a_setting_given_on_the_command_line_is_no_axis_any_more() -> None:
    config = load("demo", ["model.lora.rank=8", "model.modality=speech"])
    assert (config.model.lora.rank, config.model.modality) == (8, "speech")
    assert not {"model.lora.rank", "model.modality"} & config.search.space.keys()
    assert {"model.cls", "model.trainable"} <= config.search.space.keys()
    (point,) = config.search.points  # the other one is for text
    assert point["model.end_of_audio"] == "none"
    assert not {"model.lora.rank", "model.modality"} & point.keys()
    assert load("demo", ["model.cls=after"]).search.points == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.trainable=*", r"--set model\.trainable=\*: not a value in YAML .*; quote it"),
        ("model.prompt.separator=[SEP]", "brackets make a list in YAML; quote them"),
        ("model.lora.targets=[]", r"model\.lora\.targets"),
    ],
)
def test_a_value_that_yaml_reads_otherwise_is_explained(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("demo", [override])
    assert load("demo", ["model.lora.targets=q_proj"]).model.lora.targets == ["q_proj"]
