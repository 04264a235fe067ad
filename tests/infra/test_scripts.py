"""Every shell script of the project passes shellcheck."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_shell_scripts_pass_shellcheck() -> None:
    tracked = subprocess.run(["git", "ls-files", "infra", ".ci"], cwd=ROOT, capture_output=True, text=True, check=True)
    shebangs = b"#!/bin/bash", b"#!/usr/bin/env bash"
    names = [name for name in tracked.stdout.split() if (ROOT / name).read_bytes().startswith(shebangs)]
    assert len(names) > 8
    command = [Path(sys.executable).parent / "shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
