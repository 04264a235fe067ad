"""What processes import: commands that only read need no torch, Ray, MLflow or SciPy, and workers no torch compiler."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from data.shards.dataset import Shards
from sweep.analysis.leaderboard import leaderboard
from sweep.search.study import StudyStore
from tests.sweep import searched, tiny

HEAVY = (
    *("torch", "torchaudio", "transformers", "peft", "ray", "mlflow"),
    *("scipy", "sklearn", "pandas", "matplotlib", "plotly"),
)
# Runs commands one after another in one process, and prints after each which heavy packages are imported.
READER = f"""
import contextlib, io, json, shlex, sys
from sweep.cli.app import app, main
commands = json.loads(sys.argv[1])
names = [command.callback.__name__ for command in app.registered_commands]
for command in [*commands, "--help", *(f"{{name}} --help" for name in names), "cache --help", "cache ls --help"]:
    sys.argv, shown = ["sweep", *shlex.split(command)], io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([command, code, len(shown.getvalue()), sorted(set({HEAVY}) & sys.modules.keys())]))
import sweep.analysis.report.page, sweep.config.resolve  # of `sweep report`, and of making the built-in corpus
print(json.dumps(["imports of report", 0, 1, sorted({{"torch"}} & sys.modules.keys())]))
"""
# Trains and evaluates a trial, and prints which of some modules are imported then.
WORKER = """
import sys, pathlib
from sweep.execution import trial
config = trial.ResolvedConfig.model_validate_json(sys.argv[1])
trial.run_trial(config, pathlib.Path(sys.argv[2]), lambda epoch, metrics: None, "local", "cpu")
assert {"torch", "peft.tuners.lora", "transformers.models.llama.modeling_llama"} <= sys.modules.keys()
print(*sorted(set(sys.argv[3:]) & sys.modules.keys()))
"""
COMPILER = ("torch._dynamo.eval_frame", "torch._inductor", "torch.distributed.tensor", "networkx", "triton")
HELPERS = """
import sys, sweep.execution.worker_group, sweep.execution.mailbox, sweep.execution.cluster, sweep.execution.worker
print(*sorted(set(sys.argv[1:]) & sys.modules.keys()))
"""


def after_each(commands: list[str]) -> list[tuple[str, int, int, list[str]]]:
    """Return for each command, and then for each --help: its exit code, output length and imported heavy packages."""
    ran = subprocess.run(
        [sys.executable, "-c", READER, json.dumps(commands)], capture_output=True, text=True, timeout=120, check=True
    )
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('["')]


def test_readers_and_help_import_nothing_heavy(tmp_path: Path) -> None:
    config, folder = searched.settings(), tmp_path / "played"
    searched.played(config, folder)
    leaderboard(config, folder, StudyStore.of(folder).trials())  # the driver stores intervals when a trial ends
    (tmp_path / "cache/features/0123456789abcdef").mkdir(parents=True)
    path = shlex.quote(str(folder))
    reads = [f"status {path}", f"status {path} --json", f"best {path}", f"best {path} --json", f"best {path} --config"]
    results = after_each([*reads, f"cache ls {shlex.quote(str(tmp_path / 'cache'))}"])
    assert len(results) > 15
    assert {command: code for command, code, _, _ in results if code} == {}
    assert [command for command, _, length, _ in results if not length] == []
    assert {command: heavy for command, _, _, heavy in results if heavy} == {}


def test_training_worker_imports_no_compiler_and_no_statistics(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """A second of CPU each: torch's compiler, which transformers and optimizers only mention, and SciPy."""
    config = tiny.config(models, corpus, train={"epochs": 1}, model={"trainable": "encoder+new"})
    others = [name for name in HEAVY if name not in {"torch", "torchaudio", "transformers", "peft"}]
    avoided = [*COMPILER, "optuna", *others]
    command = [sys.executable, "-c", WORKER, config.model_dump_json(), str(tmp_path), *avoided]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout.split()) == (0, []), ran.stderr


def test_processes_around_workers_import_no_torch() -> None:
    avoided = ("torch", "transformers", "peft", "mlflow", "optuna", "scipy", "sklearn", "matplotlib")
    command = [sys.executable, "-c", HELPERS, *avoided]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.split() == []
