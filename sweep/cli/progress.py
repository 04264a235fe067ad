"""What the user sees while a sweep runs: a line for every trial that starts or ends, and the progress of the sweep.

The progress is a bar on a terminal. Elsewhere, as in the log of a batch job, it is a line now and then.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data.formats import format_value
from sweep.analysis.results import progress, short_names
from sweep.cli.console import console as terminal
from sweep.cli.show import show_model
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config
from sweep.execution.waiting import cleaning_up
from sweep.search.stopping import total_trials
from sweep.search.study import StudyStore, TrialRecord, has_started
from sweep.search.study_storage import has_study

STYLE = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan", "PAUSED": "blue"}
LOG_SECONDS = 60.0  # between two lines about the progress
JOIN_SECONDS = 10.0  # for the last look, which may wait for a database
LOOK_SECONDS = 0.5  # between two looks at the study


class ConsoleListener:
    """Show what a sweep tells while it runs; see `sweep.runner.Listener`."""

    def __init__(self, console: Console = terminal) -> None:
        self.console = console
        self.started: float | None = None  # since when trials run; their lines begin with the time

    def say(self, line: str) -> None:
        """Show a line."""
        self._print(escape(line))

    def warn(self, line: str) -> None:
        """Show a line in red."""
        self._print(f"[red]{escape(line)}[/red]")

    def status(self, text: str) -> AbstractContextManager[object]:
        """Show a spinner on a terminal."""
        return self.console.status(text) if self.console.is_terminal else contextlib.nullcontext()

    def checked(self, resolved: ResolvedConfig) -> None:
        """Show the parts of the model."""
        show_model(resolved)

    @contextlib.contextmanager
    def running(self, config: Config, folder: Path) -> Iterator[None]:
        """Show the trials from a thread while the block runs."""
        self.started = time.monotonic()
        display, ended = TrialDisplay(self, config, folder), threading.Event()

        def follow() -> None:
            while not ended.wait(LOOK_SECONDS):
                display.update()

        thread = threading.Thread(target=follow, daemon=True, name="display")
        try:
            with display.bar:
                thread.start()
                try:
                    yield
                finally:
                    ended.set()
                    thread.join(JOIN_SECONDS)
                    with cleaning_up("show the last trials", self.warn):
                        display.update()
        finally:
            self.started = None

    def _print(self, markup: str) -> None:
        since = "" if self.started is None else f"[dim]{time.monotonic() - self.started:6.1f} s[/dim]  "
        self.console.print(since + markup, highlight=False, soft_wrap=True)


class TrialDisplay:
    """Show what is new in the study of a sweep."""

    def __init__(self, listener: ConsoleListener, config: Config, folder: Path) -> None:
        self.listener, self.config, self.folder = listener, config, folder
        self.bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=listener.console,
            disable=not listener.console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=total_trials(config, []))
        self.names = short_names(list(config.search.space))
        self.states: dict[int, str] = {}  # last shown, by trial
        self.line, self.line_at = "", time.monotonic()  # the last line about the progress
        self.study: StudyStore | None = None

    def update(self) -> None:
        """Show what is new. A study that cannot be read now is shown at the next call."""
        if not has_study(self.folder, self.config):
            return
        with contextlib.suppress(Exception):
            self.study = self.study or StudyStore.read(self.folder, self.config)
            trials = [trial for trial in self.study.trials() if has_started(self.folder, trial)]
            for trial in trials:
                self._show_trial(trial)
            summary = progress(self.config, trials)
            running = [f"#{trial.number} epoch {len(trial.curve)}" for trial in trials if trial.state == "RUNNING"]
            line = " │ ".join([summary.line(), *([", ".join(running)] if running else [])])
            self.bar.update(self.task, total=summary.target, completed=summary.done, description=escape(line))
            now = time.monotonic()
            if self.bar.disable and line != self.line and now - self.line_at >= LOG_SECONDS:
                self.line, self.line_at = line, now
                self.listener.say(line)

    def _show_trial(self, trial: TrialRecord) -> None:
        before, epoch, say = self.states.get(trial.number), len(trial.curve), self.listener._print
        self.states[trial.number] = trial.state
        if trial.state == "RUNNING" and before in (None, "FAIL", "PAUSED"):
            params = ", ".join(
                f"{name} {format_value(trial.params[key])}" for key, name in self.names.items() if key in trial.params
            )
            verb = f"resumes after epoch {epoch}" if epoch else "starts"
            say(f"trial {trial.number} [cyan]{verb}[/cyan]{': ' if params else ''}{escape(params)}")
        elif trial.state not in (before, "RUNNING"):
            style = STYLE[trial.state]
            value = "" if trial.value is None else f"{self.config.search.metric} {trial.value:.3f}, "
            say(f"trial {trial.number} [{style}]{trial.state}[/{style}]: {value}{escape(trial.why)}")
