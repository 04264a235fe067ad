"""Workers of a trial that divide the LLM, under Ray: a stopped trial is resumed with another number of workers.

The first trial begins with two and ends with one, the second one the other way; both end as one that nothing stopped.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.corpus import synthetic
from data.preparation.build import prepare
from model.checkpoints import checkpoint
from sweep.config.files import load
from sweep.config.paths import trial_folder
from sweep.config.resolve import resolve
from sweep.execution.trial import run_trial
from tests.model.common import close
from tests.sweep.cluster import epochs, settings, until

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(1200)]
ALONE, DIVIDED = ("1", "false"), ("2", "true")


def command(config: Path, out: Path, trials: int, workers: str, shard: str) -> list[str]:
    changed = {"resources.workers": workers, "resources.shard": shard, "search.trials": trials}
    options = [word for key, value in changed.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "sweep", "run", str(config), "--out", str(out), *options]


def stop_in(epoch: int, words: list[str], out: Path, log: Path) -> None:
    """Run until so many epochs of all trials are reported, and stop."""
    with log.open("ab") as file, subprocess.Popen(words, env=dict(os.environ), stdout=file, stderr=file) as process:
        try:
            until(lambda: epochs(out) >= epoch, 300, log.read_text)
            process.send_signal(signal.SIGTERM)
            assert process.wait(200) == 75, log.read_text()[-3000:]
        finally:
            process.kill()


def end(words: list[str]) -> None:
    ended = subprocess.run(words, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]


def test_trial_is_resumed_with_another_number_of_workers(models: Path, tmp_path: Path) -> None:
    shards = prepare(synthetic.corpus(sessions=12, turns=12, seed=5), tmp_path / "shards")
    out, path, log = tmp_path / "out", tmp_path / "sharded.yaml", tmp_path / "log"
    tree: dict[str, Any] = settings(models, shards.folder, 4, 2)
    tree["train"] |= {"learning_rate": 1e-4}
    tree["model"]["lora"] = {"dropout": 0}  # its draws depend on how a step is divided
    tree["search"]["space"] = {"train.warmup": [0.1, 0.2]}
    tree["search"]["points"] = [{"train.warmup": 0.1}, {"train.warmup": 0.2}]
    path.write_text(yaml.safe_dump(tree))
    stop_in(1, command(path, out, 1, *DIVIDED), out, log)
    end(command(path, out, 1, *ALONE))
    stop_in(5, command(path, out, 2, *ALONE), out, log)
    end(command(path, out, 2, *DIVIDED))
    for number in range(2):
        folder, again = trial_folder(out, number), tmp_path / f"again-{number}"
        again.mkdir()
        config = resolve(load(str(folder / "config.yaml")))
        run_trial(config, again, lambda epoch, metrics: None, "local", "cpu")
        states = [checkpoint.load(trial / "checkpoint.pt") for trial in (folder, again)]
        assert states[0]["progress"]["total_steps"] == states[1]["progress"]["total_steps"]
        found, expected = (state["progress"]["history"][-1][1]["loss"] for state in states)
        assert found == pytest.approx(expected, rel=1e-5)
        tensors = [state["tensors"] for state in states]
        assert all(close(tensors[0][name], tensors[1][name], 1e-4) for name in tensors[1])
