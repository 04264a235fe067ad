"""Recipes of images: linted, from the lock, without credentials; what they copy is enough to install the packages.

No image is built here: that takes Docker or Apptainer.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.infra.test_upload import SOURCES

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "infra/Dockerfile").read_text()
DEFINITION = (ROOT / "infra/sweep.def").read_text()


def installs(text: str) -> list[str]:
    return re.findall(r"^(?:RUN| +)\s*(pip install .*)$", text, re.MULTILINE)


def sections() -> dict[str, list[str]]:
    """Lines of the Apptainer definition by section; its header is ''."""
    found: dict[str, list[str]] = {"": []}
    for line in DEFINITION.splitlines():
        if line.startswith("%"):
            found[line[1:]] = []
        elif line.strip():
            found[list(found)[-1]].append(line.strip())
    return found


def copied() -> list[str]:
    return [
        source for source, _ in re.findall(r"^COPY (.+) (\S+)$", DOCKERFILE, re.MULTILINE) for source in source.split()
    ]


def test_the_dockerfile_is_clean() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, ROOT / "infra/Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    "damage", [("USER 1000:1000", "USER root"), ("--no-install-recommends ", ""), ("bookworm", "bookworm:")]
)
def test_the_linter_sees_faults(damage: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.replace(*damage))
    linter = Path(sys.executable).parent / "hadolint"
    assert subprocess.run([linter, tmp_path / "Dockerfile"], capture_output=True, check=False).returncode != 0


def test_both_images_install_the_lock_with_hashes_and_compile_it() -> None:
    lock, own = installs(DOCKERFILE)
    assert installs(DEFINITION) == [lock, own]
    assert "--require-hashes" in lock and lock.endswith("--requirement requirements.lock")
    assert "--no-deps --no-build-isolation" in own
    assert all("--compile" in line for line in (lock, own))
    assert re.search(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)[1] == sections()[""][1].removeprefix("From: ")  # type: ignore[index]


def test_the_image_runs_as_somebody_who_is_not_root() -> None:
    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert users == ["1000:1000"]
    assert DOCKERFILE.index("USER") > DOCKERFILE.rindex("RUN")


def test_only_what_the_image_copies_is_sent_to_the_builder() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines[1:] if line.startswith("!")} == set(copied())
    assert [line for line in lines[1:] if not line.startswith("!")] == ["**/__pycache__"]


def test_apptainer_definition_copies_what_docker_copies() -> None:
    found = sections()
    assert list(found) == ["", "help", "files", "post", "environment", "runscript", "test"]
    assert found[""][0] == "Bootstrap: docker"
    assert found["runscript"] == ['exec sweep "$@"']
    files = [line.split()[0] for line in found["files"]]
    assert set(files) == set(copied()) - {"infra/k8s/job.sh"}  # that is for Kubernetes


def test_what_is_copied_is_enough_to_install_the_packages_whole(tmp_path: Path) -> None:
    for name in copied():
        target = tmp_path / "context" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, target)
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, "."]
    subprocess.run([sys.executable, *words], cwd=tmp_path / "context", check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if ".dist-info/" not in name} == SOURCES


def test_no_address_of_a_registry_or_an_index_is_written() -> None:
    for text in (DOCKERFILE, DEFINITION):
        assert not re.search(r"://|--(extra-)?index-url|(FROM|From:) \S*/", text)
