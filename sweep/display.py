"""What a person sees while a sweep runs: a line for every trial that starts or ends, and a bar of what is going on."""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sweep.config import Config
from sweep.ledger import FILE, Entry, Ledger, is_drawn
from sweep.results import short_names

STYLE = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan"}


class Display:
    """Follows the ledger from a thread of its own; on a terminal it keeps a bar below the lines."""

    def __init__(self, console: Console, config: Config, folder: Path, every: float = 0.5) -> None:
        self.console, self.config, self.folder, self.every = console, config, folder, every
        self.progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} trials"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=config.search.trials)
        self.names = short_names(list(config.search.space))
        self.seen: dict[int, str] = {}
        self.ledger: Ledger | None = None
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
        if (self.folder / FILE).exists():
            self._update()
        self.progress.stop()

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        self.console.print(
            f"[dim]{time.monotonic() - self.started:6.1f} s[/dim]  {text}", highlight=False, soft_wrap=True
        )

    def _follow(self) -> None:
        while not self.ended.wait(self.every):
            if (self.folder / FILE).exists():
                self._update()

    def _update(self) -> None:
        self.ledger = ledger = self.ledger or Ledger.read(self.folder, self.config)
        entries = [entry for entry in ledger.entries() if is_drawn(self.folder, entry)]
        for entry in entries:
            self._tell(entry)
        done = sum(entry.state != "RUNNING" for entry in entries)
        best = ledger.best()
        parts = [f"#{entry.number} epoch {len(entry.curve)}" for entry in entries if entry.state == "RUNNING"]
        if best is not None:
            parts.insert(0, f"best {best.value:.3f} (#{best.number})")
        self.progress.update(self.task, completed=done, description=", ".join(parts))

    def _tell(self, entry: Entry) -> None:
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
