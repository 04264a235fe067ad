"""Runs at the start of every Python process of a sweep under fire, from PYTHONPATH: the product itself has no hooks.

It does three things, and nothing at all without KILL_FOLDER in the environment. It writes every optimizer step that a
trial has made to `steps.jsonl`, so that the harness knows what a kill cost. It lets a step last longer for as long as
there is a file `slow`, which costs no CPU: otherwise one slot would end the sweep while the other one recovers. And it
lets one process kill itself at a named file operation, once, when the harness has put its name into `armed.json`:
before the operation, or for "write" in the middle of it.
"""

# This wraps what pathlib stands on, so it does without it.
# ruff: noqa: PTH110, PTH115, PTH118, PTH119, PTH120, PTH123

import importlib.abc
import importlib.util
import io
import json
import os
import signal
import sys
import time

FOLDER = os.environ.get("KILL_FOLDER", "")
ARMED, FIRED, SLOW, STEPS = (os.path.join(FOLDER, name) for name in ("armed.json", "fired.json", "slow", "steps.jsonl"))
ROOT = os.path.dirname(FOLDER)
WRITES = 5  # of a checkpoint, after which "write" lets its writer die
passed = {}  # operations of the armed name that this process has let pass


def hit(operation, path):
    """Die here if this is the operation that was named."""
    if not os.path.exists(ARMED) or os.path.exists(FIRED):
        return
    path = os.fspath(path)
    path = path.decode() if isinstance(path, bytes) else path
    if not path.startswith(ROOT):
        return
    name = os.path.basename(path).partition(".unfinished")[0]
    if os.path.basename(os.path.dirname(path)) == "trials":
        name = "folder"
    if name.startswith("attempt-"):
        name = "attempt"
    with open(ARMED) as file:
        armed = json.load(file)
    if armed["at"] != f"{operation} {name}":
        return
    passed[armed["id"]] = passed.get(armed["id"], 0) + 1
    if passed[armed["id"]] > armed["skip"]:
        die(path)


def die(path):
    """Kill this process, if no other one was faster."""
    try:
        descriptor = os.open(FIRED, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    real_write(descriptor, json.dumps({"time": time.time(), "pid": os.getpid(), "path": path}).encode())
    os.close(descriptor)
    os.kill(os.getpid(), signal.SIGKILL)


class Torn(io.BufferedWriter):
    """A checkpoint that is being written."""

    writes = 0

    def write(self, content):
        written = super().write(content)
        self.writes += 1
        if self.writes == WRITES:
            self.flush()
            hit("write", self.raw.name)
        return written


real_open, real_write, real_fsync = io.open, os.write, os.fsync


def opened(file, mode="r", *more, **named):
    if mode == "wb" and "checkpoint" in os.path.basename(str(file)):
        hit("open", file)
        return Torn(io.FileIO(file, "w"))
    return real_open(file, mode, *more, **named)


def write(descriptor, content):
    if os.path.exists(ARMED):
        path = of(descriptor)
        if path.endswith("metrics.jsonl"):
            half = content[: len(content) // 2]
            if real_write(descriptor, half) == len(half):
                hit("write", path)
                return len(half) + real_write(descriptor, content[len(half) :])
    return real_write(descriptor, content)


def fsync(descriptor):
    if os.path.exists(ARMED):
        hit("fsync", of(descriptor if isinstance(descriptor, int) else descriptor.fileno()))
    return real_fsync(descriptor)


def of(descriptor):
    """The path of an open file; empty for what is none."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def before(operation, place):
    """Let an operation of `os` on paths be a fault point, by its argument of that place."""
    original = getattr(os, operation)

    def call(*paths, **named):
        hit(operation, paths[place])
        return original(*paths, **named)

    setattr(os, operation, call)


def note_steps(module):
    """Tell every optimizer step of a trial, by the process that writes its checkpoints."""
    original = module.Trainer._record_step

    def note(self, *args):
        original(self, *args)
        if self.rank == 0 and self.folder.path.name.isdigit():  # not a dry step
            made = {"trial": int(self.folder.path.name), "step": self.progress.total_steps}
            line = {"time": time.time(), "pid": os.getpid()} | made
            descriptor = os.open(STEPS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            real_write(descriptor, json.dumps(line).encode() + b"\n")
            os.close(descriptor)
            if os.path.exists(SLOW):
                time.sleep(0.3)

    module.Trainer._record_step = note


class Watcher(importlib.abc.MetaPathFinder):
    """Waits for the import of the training loop."""

    def find_spec(self, name, path, target=None):
        if name != "model.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def executed(module):
            execute(module)
            note_steps(module)

        spec.loader.exec_module = executed
        return spec


if FOLDER:
    io.open, os.write, os.fsync = opened, write, fsync
    for what, which in {"replace": 1, "link": 1, "unlink": 0}.items():
        before(what, which)
    sys.meta_path.insert(0, Watcher())
