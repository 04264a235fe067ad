"""What a person sees while a sweep runs: a line for every trial that starts or ends, and how far the whole is.

The latter is a bar on a terminal, and elsewhere, as in the log of a batch job, a line now and then.
"""

import contextlib
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sweep.analysis.results import progress, short_names
from sweep.config.schema import Config
from sweep.search.study import StudyStore, TrialRecord, is_drawn
from sweep.search.study_storage import has_study

STYLE = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan"}
QUIET = 60.0  # seconds between two lines about the whole


class Display:
    """Follows the ledger from a thread of its own; on a terminal it keeps a bar below the lines."""

    def __init__(self, console: Console, config: Config, folder: Path, every: float = 0.5) -> None:
        self.console, self.config, self.folder, self.every = console, config, folder, every
        self.slots: int | None = None  # trials at a time, once somebody knows
        self.told, self.told_at = "", time.monotonic()
        self.progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=config.search.trials)
        self.names = short_names(list(config.search.space))
        self.seen: dict[int, str] = {}
        self.study: StudyStore | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True, name="display")
        self.started = time.monotonic()

    def __enter__(self) -> Self:
        self.progress.start()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()
        self._look()
        self.progress.stop()

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        self.console.print(
            f"[dim]{time.monotonic() - self.started:6.1f} s[/dim]  {text}", highlight=False, soft_wrap=True
        )

    def _follow(self) -> None:
        while not self.ended.wait(self.every):
            self._look()

    def _look(self) -> None:
        """Show what is new. What cannot be read now is shown later, and stops nobody."""
        if has_study(self.folder, self.config):
            with contextlib.suppress(Exception):
                self._update()

    def _update(self) -> None:
        self.study = study = self.study or StudyStore.read(self.folder, self.config)
        entries = [entry for entry in study.trials() if is_drawn(self.folder, entry)]
        for entry in entries:
            self._tell(entry)
        found = progress(self.config, entries, self.slots)
        parts = [f"#{entry.number} epoch {len(entry.curve)}" for entry in entries if entry.state == "RUNNING"]
        line = " │ ".join([found.line(), *([", ".join(parts)] if parts else [])])
        self.progress.update(self.task, total=found.target, completed=found.done, description=escape(line))
        self._tell_all(line)

    def _tell_all(self, line: str) -> None:
        """How far the whole is, where there is no bar: when it changed, and not too often."""
        now = time.monotonic()
        if not self.console.is_terminal and line != self.told and now - self.told_at >= QUIET:
            self.told, self.told_at = line, now
            self.say(escape(line))

    def _tell(self, entry: TrialRecord) -> None:
        known, epoch = self.seen.get(entry.number), len(entry.curve)
        self.seen[entry.number] = entry.state
        if known is None:
            params = ", ".join(f"{name} {entry.params[key]}" for key, name in self.names.items() if key in entry.params)
            verb = f"goes on after epoch {epoch}" if epoch and entry.state == "RUNNING" else "starts"
            if entry.state == "RUNNING":
                self.say(f"trial {entry.number} [cyan]{verb}[/cyan]: {escape(_short(params))}")
                return
        if entry.state not in (known, "RUNNING"):
            value = "" if entry.value is None else f"{self.config.search.metric} {entry.value:.3f}, "
            style = STYLE[entry.state]
            self.say(f"trial {entry.number} [{style}]{entry.state}[/{style}]: {value}{escape(entry.why)}")


def _short(params: str) -> str:
    """Floats drawn by the sampler, with a readable number of digits."""
    words = []
    for word in params.split(" "):
        bare = word.rstrip(",")
        try:
            short = f"{float(bare):.3g}" if "." in bare or "e" in bare else bare
        except ValueError:
            short = bare
        words.append(short + word[len(bare) :])
    return " ".join(words)
