"""Settings: every problem in one error that names key, value and rule; files, overrides and resolution."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data.config import AugmentConfig
from data.errors import ConfigError
from sweep.config.files import dump, load, presets
from sweep.config.resolve import MAKERS, ResolvedConfig, absolute, resolve

BAD = """
name: "a b"
sede: 1
data: {histroy: 2, reader: rya}
tasks: {clasify: 1, forecast: -1, response: .inf}
model: {modality: sound, lora: {rank: 0, targets: 3}, adapter: {pool: 8}}
train: {epochs: a, learning_rate: .nan}
search:
  pruning: {keeps: 0.5}
  budget: 100
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
tasks.clasify: unknown key; did you mean 'classify'?
tasks.forecast: -1: input should be greater than or equal to 0
tasks.response: inf: input should be a finite number
model.adapter.pool: unknown key; known here: kind, window, stride, rate, queries, query_layers, hidden
model.modality: 'sound': input should be 'text', 'speech' or 'text+speech'
model.lora.rank: 0: input should be greater than or equal to 1
model.lora.targets: 3: input should be a valid list
model.lora.targets: 3: input should be 'all-linear'
train.epochs: 'a': input should be a valid integer
train.learning_rate: nan: input should be a finite number
search.pruning.keeps: unknown key; did you mean 'keep'?
search.budget: 100: this is a section of settings, not a value; set its keys: gpu_hours, hours, steps, trials
search.space.train.epochs: {'low': 4, 'high': 2}: low (4) must be below high (2)
search.space.train.warmup: {'low': 0.0, 'high': 0.5, 'log': True}: a logarithmic range needs low above 0
search.space.model.cls: ['none', 'none']: choices must be a list of different values
search.space.model.lora.rank.chioces: unknown key; did you mean 'choices'?
search.space.data.history: {'low': 1}: give a list of choices, or low and high
search.space.model.lora.alpha: {'choices': [1], 'low': 2}: give either choices, or low and high
""".strip().splitlines()
Yaml = Callable[[str | bytes], str]


@pytest.fixture
def yaml(tmp_path: Path) -> Yaml:
    """Return a function that writes a YAML file and returns its name."""

    def write_text(text: str | bytes) -> str:
        path = tmp_path / "sweep.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write_text


def problems(name: str, *overrides: str) -> list[str]:
    """Return the lines of the error, its heading first."""
    with pytest.raises(ConfigError) as error:
        load(name, overrides)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()]


def test_all_problems_come_in_one_error(yaml: Yaml) -> None:
    heading, *lines = problems(name := yaml(BAD))
    assert heading == f"{name}: {len(PROBLEMS)} problems"
    missing = [start for start in PROBLEMS if sum(line.startswith(start) for line in lines) != 1]
    assert (missing, len(lines)) == ([], len(PROBLEMS))


def test_sharding_needs_workers_and_no_teacher(yaml: Yaml) -> None:
    _, alone, teacher = problems(yaml("name: a\nresources: {shard: true}\ntrain: {losses: {hidden: 1}}"))
    assert alone.startswith("resources.shard: true divides weights among the workers of a trial, and resources.workers")
    assert teacher.startswith("resources.shard: true divides the LLM, and the teacher of train.losses.distillation")
    load(yaml("name: a\nresources: {shard: true, workers: 2}"))


def test_settings_that_do_not_fit_a_base_are_refused(yaml: Yaml) -> None:
    model = "trainable: adapter+llm, llm: {load_in: 4bit, attention: flash_attention_2}"
    _, *lines = problems(yaml(f"name: a\nresources: {{shard: true, workers: 2}}\nmodel: {{{model}}}"))
    starts = (
        "model.llm.load_in: 4bit is for an LLM that stays frozen, and model.trainable (adapter+llm) trains it",
        "resources.shard: true divides weights that are not quantized, and model.llm.load_in is 4bit; set it to none",
        "model.llm.attention: flash_attention_2 needs a GPU, and resources.gpus_per_worker is 0; set auto, or give",
    )
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 3
    axes = {"load_in": "[none, 4bit]", "attention": "[auto, eager]", "gradient_checkpointing": "[false, true, 2]"}
    space = ", ".join(f"model.llm.{name}: {values}" for name, values in axes.items())
    assert len(load(yaml(f"name: a\nsearch: {{space: {{{space}}}}}")).search.space) == 3


UNKNOWN = ": no setting that a search may vary has this name"


@pytest.mark.parametrize(
    ("axis", "problem"),
    [
        ("train.learnng_rate: [1]", f"{UNKNOWN}; did you mean 'train.learning_rate'?"),
        ("resources.workers: [1]", UNKNOWN),
        ("data.shards: [a, b]", UNKNOWN),
        ("model.llm: [1]", f"{UNKNOWN}; did you mean 'model.llm.path'?"),
        ("train.epochs: [2, 0]", ": the axis has 0: input should be greater than or equal to 1"),
        ("train.epochs: [2, a]", ": the axis has 'a': input should be a valid integer, unable to parse"),
        ("train.epochs: {low: 1.0, high: 4.0}", ": the axis has 2.1"),
        ("train.learning_rate: {low: -1.0, high: 1.0}", ": the axis has -1.0: input should be greater than 0"),
        ("data.augment.speeds: ['0.9, 3']", ": the axis has ' 3': input should be less than or equal to 2"),
        ("train.epochs: {low: 1, high: 4, step: -1}", ": {'low': 1, 'high': 4, 'step': -1}: step (-1) must be above 0"),
        ("train.epochs: {low: 1, high: 4, step: 0.5}", ": {'low': 1, 'high': 4, 'step': 0.5}: step (0.5) must be"),
        ("model.cls: {choices: [none], when: {model.modalty: [text]}}", ".when.model.modalty: no such setting"),
        ("tasks.classify: [0, 1]", ": its values make classify or forecast the first task"),
    ],
)
def test_axis_that_does_not_fit_is_refused(axis: str, problem: str, yaml: Yaml) -> None:
    _, line = problems(yaml(f"name: a\ntasks: {{forecast: 1}}\nsearch: {{space: {{seed: [1, 2], {axis}}}}}"))
    assert line.startswith(f"search.space.{axis.partition(':')[0]}{problem}")


def test_rules_over_settings_are_checked_on_a_single_axis(yaml: Yaml) -> None:
    [_, line] = problems(yaml("name: a\nsearch: {space: {model.adapter.stride: [16]}}"))
    assert line.startswith("search.space.model.adapter.stride: model.adapter.stride: 16 is larger than")
    space = "search: {metric: forecast/macro_f1, space: {tasks.forecast: [1, 0]}}"
    assert problems(yaml(f"name: a\ntasks: {{forecast: 1}}\n{space}"))[1:] == [
        "search.space.tasks.forecast: search.metric: 'forecast/macro_f1' is not a metric of the task classify; choose "
        "from macro_f1, accuracy, weighted_f1, loss, ece"
    ]


def test_point_outside_its_axes_is_refused(yaml: Yaml) -> None:
    space = "{model.lora.rank: [2, 8], train.warmup: {low: 0.1, high: 0.5}, model.cls: [none, after]}"
    points = "[{model.lora.rank: 2, train.warmup: 0.1}, {model.lora.rank: 3, train.warmup: 0.6, train.epochs: 4}]"
    assert problems(yaml(f"name: a\nsearch: {{space: {space}, points: {points}}}"))[1:] == [
        "search.points[1].model.lora.rank: 3 lies outside its axis; choose from [2, 8]",
        "search.points[1].train.warmup: 0.6 lies outside its axis; choose from 0.1 to 0.5",
        "search.points[1].train.epochs: not an axis of search.space; add the axis or remove the key",
    ]


def test_missing_file_names_the_presets() -> None:
    assert problems("demmo") == [
        f"demmo: no such file, and no preset of that name (presets: {', '.join(presets())}); did you mean 'demo'?"
    ]
    assert "did you mean" not in problems("/nowhere/else.yaml")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: a\ndata:\n  history: [1\ntrain: {}\n", ":4: not valid YAML ("),
        ("name: a\nname: b\n", ":2: not valid YAML (found duplicate key name); fix the line"),
        ("name: a\ndata: {history: 1, history: 2}\n", ":2: not valid YAML (found duplicate key history)"),
        ("- a\n", ": not a mapping of settings; see the presets for the form"),
        ("name: ${seed}\n", ": ${…} is not filled in; write the value"),
        (b"3", ": not a mapping of settings"),
        (b"name: \xe9", ": not a YAML file of settings ("),
        (b"name: a\x01b", ": not a YAML file of settings ("),
    ],
)
def test_content_that_is_no_settings_names_file_and_line(content: str | bytes, message: str, yaml: Yaml) -> None:
    [line] = problems(name := yaml(content))
    assert line.startswith(name + message)


def test_override_sets_a_dotted_key(yaml: Yaml) -> None:
    name = yaml("name: a\ntrain: &t {epochs: 3, losses: {hidden: 1}}\n")
    changed = load(name, ["train.learning_rate=1e-3", "train.epochs=7", "model.lora.targets=[a,b]", "data.history=0"])
    assert (changed.train.learning_rate, changed.train.epochs, changed.data.history) == (0.001, 7, 0)
    assert changed.model.lora.targets == ["a", "b"]
    merged = load(name, ["train={epochs: 9, losses: {next_token: 2}}", "search.pruning=null"])
    assert (merged.train.epochs, merged.train.losses.next_token, merged.train.losses.hidden) == (9, 2, 1)
    assert merged.search.pruning is None
    assert problems(name, "train.epoch=3", "nmae=b", "train.epochs=x")[1:] == [
        "train.epochs: 'x': input should be a valid integer, unable to parse string as an integer",
        "train.epoch: unknown key; did you mean 'epochs'?",
        "nmae: unknown key; did you mean 'name'?",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "--set train.epochs: write it as key=value, e.g. --set train.epochs=3"),
        ("model.trainable=*", "--set model.trainable=*: not a value in YAML (while scanning an alias); quote it"),
        ("name=${HOME}", "--set name: ${…} is not filled in"),
        ("model.prompt.separator=[SEP]", "brackets make a list in YAML; quote them"),
        ("model.lora.targets=[]", "model.lora.targets: []"),
        ("model.lora.targets.0=q_proj", "{'0': 'q_proj'}: input should be a valid list; write the whole list, as in"),
        ("search.points.0.model.cls=none", "search.points: {'0': {'model': {'cls': 'none'}}}: input should be a valid"),
        ("search.pruning=none", "'none': this is a section of settings, not a value; write search.pruning.kind=none"),
        ("search.space.model.cls=none", "search.space.model.cls: 'none': give a list of choices, or a mapping with"),
    ],
)
def test_override_that_yaml_reads_otherwise_is_explained(override: str, message: str) -> None:
    assert message in " ".join(problems("demo", override))


def test_overridden_axis_leaves_the_search() -> None:
    config = load("demo", ["model.lora.rank=8", "model.modality=speech", "model.lora.targets=q_proj"])
    assert (config.model.lora.rank, config.model.modality, config.model.lora.targets) == (8, "speech", ["q_proj"])
    assert not {"model.lora.rank", "model.modality"} & config.search.space.keys()
    assert {"model.cls", "model.trainable"} <= config.search.space.keys()
    (point,) = config.search.points  # the other one is for text
    assert point["model.end_of_audio"] == "none"
    assert not {"model.lora.rank", "model.modality"} & point.keys()
    assert load("demo", ["model.cls=after"]).search.points == []


def axes(*overrides: str, name: str = "demo") -> dict[str, Any]:
    """Return the axes of a sweep as YAML would have them."""
    space = load(name, overrides).search.space
    return {key: axis.model_dump(exclude_defaults=True) for key, axis in space.items()}


RATE, CLS = "search.space.train.learning_rate", "search.space.model.cls"


@pytest.mark.parametrize(
    ("overrides", "key", "axis"),
    [
        ([f"{RATE}=[1e-4, 1e-3]"], "train.learning_rate", {"choices": [1e-4, 1e-3]}),
        (["search.space={train.learning_rate: [1e-4, 1e-3]}"], "train.learning_rate", {"choices": [1e-4, 1e-3]}),
        ([f"{RATE}.low=1e-6"], "train.learning_rate", {"low": 1e-6, "high": 1e-2, "log": True}),
        ([f"{RATE}={{low: 1e-5}}"], "train.learning_rate", {"low": 1e-5, "high": 1e-2, "log": True}),
        (["train.learning_rate=1e-3", f"{RATE}=[1e-3]"], "train.learning_rate", {"choices": [1e-3]}),
        ([f"{CLS}.when.model.modality=[text]"], "model.cls", {"when": {"model.modality": ["text"]}}),
        ([f"{CLS}.choices=[none]", f"{CLS}={{when: {{seed: [0]}}}}"], "model.cls", {"choices": ["none"]}),
        (["search.space.model.lora.targets=[all-linear, [q_proj]]"], "model.lora.targets", {}),
        (["search.space.data.history={low: 1, high: 4}"], "data.history", {"low": 1, "high": 4}),
    ],
)
def test_override_reaches_an_axis(overrides: list[str], key: str, axis: dict[str, Any]) -> None:
    changed = axes(*overrides)
    assert changed[key].items() >= axis.items()
    before = axes()
    assert {name: before[name] for name in before if name != key} == {n: a for n, a in changed.items() if n != key}


def test_override_clears_the_space_or_an_axis(yaml: Yaml) -> None:
    cleared = load("demo", ["search.space={}"]).search
    assert (cleared.space, cleared.points) == ({}, [])
    alone = axes("search.space={}", "search.space.model.lora.rank=[4, 8]")
    assert alone == {"model.lora.rank": {"choices": [4, 8]}}
    assert axes() == axes("model={}"), "a section that is cleared has its defaults, and its axes stay"
    assert "model.cls" not in axes(f"{CLS}=null")
    roles = yaml("name: a\nmodel: {prompt: {roles: {client: Patient}}}")
    assert load(roles, ["model.prompt.roles={}"]).model.prompt.roles == {}


def test_override_wins_over_axes_and_points() -> None:
    """Also as a part of a section, and of a setting that is a mapping."""
    assert "model.lora.rank" not in axes("model.lora={rank: 8, alpha: 4}")
    assert "model.lora.rank" in axes("model.lora={alpha: 4}")
    weighted = "search.space.train.class_weights=[equal, {classify: {change: 2}}]"
    assert "train.class_weights" in axes(weighted)
    assert "train.class_weights" not in axes(weighted, "train.class_weights.classify.change=3")
    weights = "train.class_weights={classify: {neutral: 3}}"
    again = load("demo", [weights, weighted, "train.class_weights={classify: {change: 2}}"]).train.class_weights
    assert again == {"classify": {"change": 2.0}}, "a choice is not merged with the setting"
    rates = load("demo", [f"{RATE}=[1e-4, 3e-3]"]).search
    assert len(rates.points) == 2
    assert load("demo", [f"{RATE}=[1e-4]"]).search.points == [], "the points have other rates"
    merged = ["search.points=[{model.cls: none}, {model.cls: none, model.lora.rank: 8}]", "model.lora.rank=8"]
    assert load("demo", merged).search.points == [{"model.cls": "none"}], "both are the same now"


def test_override_of_an_unknown_axis_is_explained() -> None:
    assert problems("demo", "search.space.model.lora.rnak=[4]")[1:] == [
        "search.space.model.lora.rnak: no setting that a search may vary has this name; did you mean 'model.lora.rank'?"
    ]
    assert problems("demo", f"{CLS}.chioces=[none]")[1:2] == [
        "search.space.model.cls.chioces: unknown key; did you mean 'choices'?"
    ]
    assert problems("demo", f"{RATE}={{low: 1, high: .inf}}")[1].endswith("low and high must be finite numbers")


STRIDE = "model.adapter.stride: 5 is larger than model.adapter.window (4), so frames would be skipped; lower it"
RULES = {
    "model: {adapter: {window: 4, stride: 5}}": STRIDE,
    "model: {trainable: ' + '}": "model.trainable: ' + ' names no part; name one, e.g. adapter+lora",
    "model: {trainable: []}": "model.trainable: '' names no part; name one, e.g. adapter+lora",
    "model: {encoder: {spec_augment: 0.1}}": "model.encoder.spec_augment: 0.1 has no effect on an encoder that stays",
    "model: {trainable: encoder+lora, encoder: {dtype: bfloat16}}": "model.encoder.dtype: bfloat16 is for an encoder",
    "train: {losses: {next_token: 0}}": "train.losses: all weights are 0, so there is nothing to minimise; raise one",
    "tasks: {classify: 0}": "tasks: all weights are 0, so nothing would be trained; raise one",
    "search: {metric: bleu}": "search.metric: 'bleu' is not a metric of the task classify; choose from macro_f1, accu",
    "tasks: {classify: 0, response: 1}\nsearch: {metric: macro_f1}": "search.metric: 'macro_f1' is not a metric of the "
    "task response; choose from loss, perplexity, bleu, rouge_l",
    "tasks: {response: 1}\nsearch: {metric: bleu}": "search.metric: 'bleu' is not a metric of the tasks classify, "
    "response; choose from total_loss, macro_f1, accuracy, weighted_f1, loss, ece, response/loss, response/perplexity",
}

TOGETHER = [rule for rule in RULES if rule.startswith(("train", "search"))]


@pytest.mark.parametrize("settings", [*([rule] for rule in RULES), TOGETHER])
def test_broken_rules_over_settings_are_a_line_each(settings: list[str], yaml: Yaml) -> None:
    lines = problems(yaml("\n".join(["name: a", *settings])))[1:]
    assert len(lines) == len(settings)
    assert all(line.startswith(RULES[rule]) for line, rule in zip(lines, settings, strict=True))


@pytest.mark.parametrize("preset", presets())
def test_preset_reads_back_as_it_was_dumped(preset: str, yaml: Yaml) -> None:
    assert load(yaml(dump(config := load(preset)))) == config


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
def test_default_objective_is_of_the_first_task(tasks: str, metric: str, yaml: Yaml) -> None:
    config = load(yaml(f"name: a\ntasks: {tasks}\nsearch: {{space: {{train.warmup: [0.1, 0.2]}}}}"))
    assert config.search.metric == metric
    assert load(yaml(dump(config))) == config
    assert config.with_values({"seed": 3}).search.metric == metric


def test_folds_are_listed_as_points_and_never_pruned(yaml: Yaml) -> None:
    search = "space: {data.fold: [0, 1, 2]}, points: [{data.fold: 0}, {data.fold: 2}]"
    assert load(yaml(f"name: a\nsearch: {{{search}, trials: 2, pruning: null}}")).search.trials == 2
    for more in ("trials: 3, pruning: null", "trials: 2"):
        [_, problem] = problems(yaml(f"name: a\nsearch: {{{search}, {more}}}"))
        assert problem.startswith("search.space.data.fold: a search would choose the easiest fold; ")


def test_lists_on_an_axis_are_written_as_text(yaml: Yaml) -> None:
    axes = {
        "data.sound": ["recorded", "zeroed"],
        "data.last_text": ["given", "omitted"],
        "tasks.forecast": [1, 2],
        "data.augment.speeds": [None, "0.9, 1.0, 1.1"],
        "data.augment.noise_db": [None, "5, 20"],
        "data.augment.noise_probability": {"low": 0.1, "high": 1},
        "train.sampling": ["none", "balanced"],
        "model.trainable": ["lora", "encoder+lora"],
    }
    config = load(yaml(json.dumps({"name": "a", "search": {"space": axes}})))
    drawn = config.with_values({key: axis.extremes()[1] for key, axis in config.search.space.items()})
    assert drawn.data.augment == AugmentConfig(speeds=(0.9, 1.0, 1.1), noise_db=(5, 20))
    assert load(yaml(dump(drawn))) == drawn
    joined = load(yaml("name: a\nmodel: {trainable: [encoder, lora]}"), ["model.encoder.spec_augment=0.1"])
    assert (joined.model.trainable, joined.model.patterns) == ("encoder+lora", ["encoder", "lora"])


def test_weights_by_label_are_a_setting(yaml: Yaml) -> None:
    weights = "{classify: {change: 2, 'yes': 0.5}}"
    config = load(yaml(f"name: a\ntrain: {{class_weights: {weights}}}"), [])
    assert config.train.class_weights == {"classify": {"change": 2.0, "yes": 0.5}}
    assert load(yaml(dump(config))) == config
    assert load(yaml(dump(config)), ["train.class_weights=balanced"]).train.class_weights == "balanced"
    assert load(yaml("name: a"), [f"train.class_weights={weights}"]) == config
    lines = problems(yaml("name: a\ntrain: {class_weights: {classify: {change: 0}}, sampling: often}"))[1:]
    assert "train.class_weights.classify.change: 0: input should be greater than 0" in lines
    assert "train.sampling: 'often': input should be 'none' or 'balanced'" in lines


def test_resolved_config_has_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job travels as JSON; changed values make a plain configuration again, which mypy keeps out of a trial."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    models = {"model.encoder.path": "org/encoder", "model.llm.path": "org/llm"}
    config = load("demo", ["data.shards=shards", *(f"{key}={name}" for key, name in models.items())])
    resolved = resolve(config)
    assert resolved.model_dump() == absolute(config).model_dump()
    assert (resolved.data.shards, resolved.model.llm.path) == (str(tmp_path / "shards"), "org/llm")
    assert ResolvedConfig.model_validate_json(resolved.model_dump_json()) == resolved
    changed: Any = resolved.for_trial({"seed": 1})
    assert not isinstance(changed, ResolvedConfig)
    assert (changed.seed, changed.search.space, changed.search.points) == (1, {}, [])
    with pytest.raises(
        ConfigError, match=r"data\.shards: builtin:nothing is not built in; use one of builtin:synthetic"
    ):
        resolve(config.with_values({"data.shards": "builtin:nothing"}))


def test_processes_that_need_an_input_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("SWEEP_CACHE", str(tmp_path))
    monkeypatch.setitem(MAKERS, "tiny-llama", make)
    config = load("demo").with_values({"data.shards": str(tmp_path), "model.encoder.path": str(tmp_path)})
    barrier = threading.Barrier(4)

    def resolve_at_once(_: int) -> ResolvedConfig:
        barrier.wait()
        return resolve(config)

    with ThreadPoolExecutor(4) as threads:
        resolved = list(threads.map(resolve_at_once, range(4)))
    assert len(made) == 1
    assert {Path(each.model.llm.path).parent for each in resolved} == {tmp_path}
