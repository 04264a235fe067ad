"""Every shell script of the project passes shellcheck."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def scripts() -> list[str]:
    tracked = subprocess.run(["git", "ls-files", "infra", ".ci"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [
        name
        for name in tracked.stdout.split()
        if (ROOT / name).read_bytes().startswith((b"#!/bin/bash", b"#!/usr/bin/env bash"))
    ]


@pytest.mark.parametrize("name", scripts())
def test_script(name: str) -> None:
    check = shutil.which("shellcheck", path=Path(sys.executable).parent)
    found = subprocess.run(
        [str(check), "--external-sources", "--source-path=SCRIPTDIR", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
