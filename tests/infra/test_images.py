"""Recipes of images: linted, from the lock, without credentials; what they copy is enough to install the packages.

No image is built here: that takes Docker or Apptainer.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.infra.test_upload import ROOT, SOURCES

DOCKERFILE = (ROOT / "infra/Dockerfile").read_text()
DEFINITION = (ROOT / "infra/sweep.def").read_text()
COPIED = {name for names in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in names.split()}


def test_dockerfile_is_clean_and_the_linter_sees_faults(tmp_path: Path) -> None:
    linter, faults = Path(sys.executable).parent / "hadolint", {"USER 1000:1000": "USER root", "bookworm": "bookworm:"}
    for old, new in {"": "", **faults, "--no-install-recommends ": ""}.items():
        (tmp_path / "Dockerfile").write_text(DOCKERFILE.replace(old, new))
        done = subprocess.run([linter, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
        assert (done.returncode == 0 and done.stdout == "") == (old == ""), done.stdout


def test_both_images_are_installed_alike_from_the_lock() -> None:
    """With its hashes, from the same base, compiled; by no address of a registry or an index; and not run by root."""

    def installs(text: str) -> list[str]:
        return re.findall(r"^(?:RUN| +)\s*(pip install .*)$", text, re.MULTILINE)

    lock, packages = installs(DOCKERFILE)
    assert installs(DEFINITION) == [lock, packages]
    assert "--require-hashes" in lock and lock.endswith("--requirement requirements.lock")
    assert "--no-deps --no-build-isolation" in packages
    assert all("--compile" in line for line in (lock, packages))
    [base] = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    assert f"From: {base}\n" in DEFINITION
    for text in (DOCKERFILE, DEFINITION):
        assert not re.search(r"://|--(extra-)?index-url|(FROM|From:) \S*/", text)
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE) == ["1000:1000"]
    assert DOCKERFILE.index("USER") > DOCKERFILE.rindex("RUN")


def test_builder_gets_only_what_the_image_copies() -> None:
    first, *lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == COPIED
    assert [line for line in lines if not line.startswith("!")] == ["**/__pycache__"]


def test_apptainer_definition_copies_what_docker_copies() -> None:
    header, *parts = re.split(r"^%", DEFINITION, flags=re.MULTILINE)
    sections = {name: [line.strip() for line in rest if line.strip()] for name, *rest in map(str.splitlines, parts)}
    assert list(sections) == ["help", "files", "post", "environment", "runscript", "test"]
    assert header.startswith("Bootstrap: docker\n")
    assert sections["runscript"] == ['exec sweep "$@"']
    # job.sh is for Kubernetes.
    assert {line.split()[0] for line in sections["files"]} == COPIED - {"infra/k8s/job.sh"}


def test_copied_files_install_the_packages_in_full(tmp_path: Path) -> None:
    for name in COPIED:
        (target := tmp_path / "context" / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, target)
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, "."]
    subprocess.run([sys.executable, *words], cwd=tmp_path / "context", check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == SOURCES | {f"{package}/py.typed" for package in ("data", "model", "sweep")}
