"""Write a table of the trials of a finished sweep, each of which is a configuration: values at the end, of one seed.

    python -m tests.bench.tables.finished FOLDER

The table `annomi` is the sweep of docs/results.md over rank, scale and learning rate of LoRA: SmolLM2-135M-Instruct on
237 client turns of AnnoMI. Its axis `model.lora.alpha` follows from the scale, so it is left out here.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from sweep.analysis.predictions import objective_error
from sweep.search.study import StudyStore
from tests.bench.tables.table import Table, write

METRIC, RATE, RATIO = "loss", "train.learning_rate", "model.lora.alpha_ratio"
RATES = [3e-4, 1e-3, 3e-3]
SPACE: dict[str, Any] = {
    "model.lora.rank": {"choices": [2, 32]},
    RATIO: {"choices": [2.0, None]},
    "model.lora.rslora": {"choices": [False, True], "when": {RATIO: [None]}},
    RATE: {"low": RATES[0], "high": RATES[-1], "log": True},
}


def main(folder: Path) -> None:
    """Write the table `annomi`."""
    trials = [trial for trial in StudyStore.of(folder).trials() if trial.state == "COMPLETE"]
    points = [
        {key: trial.params[key] for key in SPACE if "when" not in SPACE[key] or trial.params[RATIO] is None}
        for trial in trials
    ]
    losses = np.array([trial.metrics[METRIC] for trial in trials])[None, None, :, None]
    errors = np.array([objective_error(folder, trial.number, METRIC) for trial in trials])[None, None, :, None]
    write(
        Table(
            name="annomi",
            about="SmolLM2-135M-Instruct on 237 client turns of AnnoMI, one epoch: values at the end",
            metric=METRIC,
            space=SPACE,
            grid={RATE: RATES},
            points=points,
            seeds=[0],
            shares=[1.0],
            values_SFPE=losses,
            errors_SFPE=errors,
            losses_SFPE=losses,
            steps_FPE=np.array([[[trial.steps] for trial in trials]]),
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
