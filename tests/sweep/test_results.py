"""The leaderboard: its columns follow the tasks of the sweep, and its intervals are those of the first one."""

import json
from pathlib import Path
from typing import Any

from sweep.config import Config, parse
from sweep.ledger import Ledger, trial_folder
from sweep.results import leaderboard_rows
from tests.conftest import LABELS
from tests.sweep.common import CODE, REPLY, ask


def settings(tasks: dict[str, float]) -> Config:
    search = {"pruning": None, "space": {"model.lora.rank": [4]}}
    return parse({"name": "a", "tasks": tasks, "search": search}, "a")


def board(folder: Path, config: Config, metrics: dict[str, float], said: dict[str, Any]) -> list[tuple[str, str]]:
    """Header and only row of a sweep with one complete trial."""
    ask(ledger := Ledger.open(folder, config), 1)
    ledger.report(0, 1, metrics)
    ledger.complete(0)
    trial_folder(folder, 0).mkdir(parents=True)
    (trial_folder(folder, 0) / "predictions.json").write_text(json.dumps(said))
    header, [row] = leaderboard_rows(config, folder, ledger.entries())
    return list(zip(header, row, strict=True))


def test_replies_are_ranked_by_loss_beside_their_own_metrics(tmp_path: Path) -> None:
    metrics = {"loss": 2.5, "perplexity": 12.18, "bleu": 3.0, "rouge_l": 0.25, "eos_rate": 1.0}
    said = {"labels": {"response": []}, "records": [REPLY | {"id": "c/2"}]}
    assert board(tmp_path, settings({"classify": 0, "response": 1}), metrics, said)[1:] == [
        ("state", "COMPLETE"),
        ("loss", "2.500"),
        ("bleu", "3.000"),
        ("rouge_l", "0.250"),
        ("perplexity", "12.180"),
        ("rank", "4"),
    ]


def test_intervals_of_subsets_are_of_the_first_task(tmp_path: Path) -> None:
    right = CODE | {"subset": "clear", "prediction": "change"}
    records = [right | {"id": f"c/{place}", "conversation": f"c{place}"} for place in range(40)]
    wrong = [CODE | {"task": "forecast", "id": record["id"], "subset": "clear"} for record in records]
    metrics = {"macro_f1": 1.0, "accuracy": 1.0, "accuracy_clear": 1.0, "forecast/accuracy": 0.0}
    said = {"labels": {"classify": LABELS, "forecast": LABELS}, "records": records + wrong}
    found = dict(board(tmp_path, settings({"forecast": 1}), metrics, said))
    assert found["clear"] == "1.00 [0.91,1.00]"
    assert "forecast/accuracy" not in found
