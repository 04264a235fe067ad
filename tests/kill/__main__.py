"""Kill sweeps and report the result: a table of kills, one of what must hold, and one of what a kill costs.

python -m tests.kill [--kills 25] [--sweeps 4] [--seed 0] [--json FILE]
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> int:
    """Return 1 if something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=25, help="total number")
    parser.add_argument("--sweeps", type=int, default=4, help="of one and two ranks, fed by both readers")
    parser.add_argument("--seed", type=int, default=0, help="of the kills and their moments")
    parser.add_argument("--no-calm", action="store_true", help="leave out the undisturbed sweeps")
    parser.add_argument("--json", type=Path, help="file for all results")
    asked = parser.parse_args()
    from tests.kill.report import content, show
    from tests.kill.run import run

    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {text}", file=sys.stderr, flush=True)

    results = run(asked.kills, asked.sweeps, asked.seed, say, calm=not asked.no_calm)
    show(results, Console(width=None if sys.stdout.isatty() else 180))
    if asked.json:
        asked.json.write_text(json.dumps(content(results), indent=1))
    return int(any(result.faults for result in results))


if __name__ == "__main__":
    sys.exit(main())
