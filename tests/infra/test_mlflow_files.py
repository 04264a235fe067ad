"""The files of `infra/mlflow`: each one is checked, and the check must notice a broken copy."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.infra.mlflow_site import INFRA, ROOT, settings

SCRIPTS = ("account.sh", "backup.sh", "gc.sh", "restore.sh", "secrets.sh", "serve.sh")
NEEDED = ("MLFLOW_SECRETS", "MLFLOW_ARTIFACTS_DESTINATION", "PGHOST", "PGUSER", "PGDATABASE")
TEXT, TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}


def strict(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """A mapping with these keys and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def each(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": of}


# The keys that compose.yaml needs, as Compose's specification names them: all of what makes a service safe is required.
SAFE = ("read_only", "cap_drop", "security_opt", "pids_limit", "restart", "healthcheck", "networks")
SERVICE = strict(
    SAFE,
    image=TEXT,
    build=strict(("context", "dockerfile"), context=TEXT, dockerfile=TEXT),
    user={"type": "string", "not": {"pattern": "^(root|0)"}},
    init={"const": True},
    restart=TEXT,
    read_only={"const": True},
    cap_drop={"const": ["ALL"]},
    security_opt={"const": ["no-new-privileges:true"]},
    pids_limit={"type": "integer"},
    logging=strict(("driver",), driver={"const": "local"}),
    environment={**each(TEXT), "propertyNames": {"not": {"pattern": "(PASSWORD|SECRET_KEY)$"}}},
    secrets=TEXTS,
    tmpfs=TEXTS,
    volumes={"type": "array", "items": {"type": "string", "pattern": "^[a-z]+:/"}},  # named ones, no folder of the host
    ports={"type": "array", "items": {"type": "string", "pattern": r"^127\.0\.0\.1:"}},
    networks=TEXTS,
    depends_on=each(strict(("condition",), condition={"const": "service_healthy"})),
    healthcheck=strict(
        ("test",), test=TEXTS, interval=TEXT, timeout=TEXT, retries={"type": "integer"}, start_period=TEXT
    ),
)
COMPOSE = strict(
    ("name", "services", "networks", "volumes", "secrets"),
    **{"x-contained": {}},
    name=TEXT,
    services=each(SERVICE),
    networks=each(strict(internal={"const": True})),
    volumes=each(strict()),
    secrets=each(strict(("file",), file={"type": "string", "pattern": r"^\$\{MLFLOW_SECRETS"})),
)


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
    return loaded


def faults(content: dict[str, Any]) -> list[str]:
    """What is wrong with a compose file: its keys, names that lead nowhere, and a database that others can reach."""
    found = [
        f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(COMPOSE).iter_errors(content)
    ]
    for name, service in content["services"].items():
        for kind in ("secrets", "networks"):
            found += [f"{name}: no {kind} {one}" for one in service.get(kind, []) if one not in content[kind]]
        mounted = [volume.split(":")[0] for volume in service.get("volumes", [])]
        found += [f"{name}: no volume {one}" for one in mounted if one not in content["volumes"]]
    database = content["services"]["database"]
    inside = [content["networks"].get(name, {}).get("internal") for name in database.get("networks", [])]
    return found + (["the database can be reached"] if "ports" in database or inside != [True] else [])


BREAK: dict[str, Callable[[dict[str, Any]], object]] = {
    "a key is misspelt": lambda it: it["services"]["server"].update(enviroment={}),
    "a port is open to all": lambda it: it["services"]["server"].update(ports=["5000:5000"]),
    "the database is open": lambda it: it["services"]["database"].update(networks=["outside"]),
    "a password is in the environment": lambda it: it["services"]["server"]["environment"].update(PGPASSWORD="x"),
    "a service may write": lambda it: it["services"]["server"].pop("read_only"),
    "a service keeps rights": lambda it: it["services"]["database"].update(cap_drop=["NET_RAW"]),
    "root runs it": lambda it: it["services"]["database"].update(user="root"),
    "a secret is not declared": lambda it: it["secrets"].pop("secret-key"),
    "a folder of the host is mounted": lambda it: it["services"]["server"].update(volumes=["/:/host"]),
}


def test_compose_file_is_safe_and_its_broken_copies_are_not() -> None:
    assert faults(compose()) == []
    for name, damage in BREAK.items():
        damage(broken := compose())
        assert faults(broken), name


def test_compose_itself_accepts_its_file(tmp_path: Path) -> None:
    def runs(command: list[str], **environment: str) -> bool:
        env = {"PATH": "/usr/bin:/bin:/usr/local/bin", **environment}
        return subprocess.run(command, capture_output=True, check=False, env=env).returncode == 0

    commands = [["docker", "compose"], ["docker-compose"]]
    usable = [words for words in commands if shutil.which(words[0]) and runs([*words, "version"])]
    if not usable:
        pytest.skip("no docker compose here: install docker-compose-plugin, or docker-compose")
    command = [*usable[0], "-f", str(INFRA / "compose.yaml"), "config", "--quiet"]
    assert runs(command, MLFLOW_SECRETS=str(tmp_path))
    assert not runs(command), "without MLFLOW_SECRETS it would start without secrets"


def test_image_is_clean_and_gets_only_what_it_needs() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    found = subprocess.run([linter, INFRA / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("", 0)
    text = (INFRA / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (.+) \S+$", text, flags=re.MULTILINE)
    first, *kept = (INFRA / "Dockerfile.dockerignore").read_text().split()
    assert (first, {f"!{name}" for line in copied for name in line.split()}) == ("*", set(kept))
    assert re.findall(r"^USER (\d+)$", text, flags=re.MULTILINE) == ["10001"]
    [version] = re.findall(r"^UV_VERSION := (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert f"uv=={version} " in text


def complaints(folder: Path, *change: str) -> str:
    """Return what systemd says about the unit with a change, its hardening included."""
    text = (INFRA / "mlflow.service").read_text().replace("/opt/mlflow/", f"{ROOT}/")
    if change:
        assert change[0] in text
        text = text.replace(*change)
    (path := folder / "mlflow.service").write_text(text)
    analyze = ["systemd-analyze", "verify"], ["systemd-analyze", "security", "--offline=true", "--threshold=20"]
    verified, rated = (subprocess.run([*words, path], capture_output=True, text=True, check=False) for words in analyze)
    return verified.stderr + (rated.stdout if rated.returncode else "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here: install systemd")
def test_systemd_accepts_the_unit_and_no_broken_copy(tmp_path: Path) -> None:
    assert complaints(tmp_path) == ""
    for change in (
        ("ProtectSystem=", "ProtectSytem="),
        ("serve.sh", "server.sh"),
        ("CapabilityBoundingSet=\n", ""),
    ):
        assert complaints(tmp_path, *change), change


def test_every_setting_of_the_example_is_read() -> None:
    read = " ".join(path.read_text() for path in [*INFRA.glob("*.sh"), INFRA / "compose.yaml"])
    names = re.findall(r"^#?([A-Z_0-9]+)=", settings(), flags=re.MULTILINE)
    assert set(names) >= set(NEEDED)
    assert [name for name in names if name not in read and name != "PATH"] == []


def refusal(folder: Path, script: str, *words: str, **environment: str) -> str:
    """Return what a script prints that must not start anything."""
    env = {"PATH": "/usr/bin:/bin", "MLFLOW_SETTINGS": str(folder / "env"), **environment}
    done = subprocess.run([INFRA / script, *words], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    return done.stdout + done.stderr


@pytest.fixture
def complete(tmp_path: Path) -> dict[str, str]:
    """All settings and secrets that the server needs."""
    subprocess.run([INFRA / "secrets.sh", tmp_path / "secrets"], check=True)
    paths = {"MLFLOW_SECRETS": tmp_path / "secrets", "MLFLOW_ARTIFACTS_DESTINATION": tmp_path / "artifacts"}
    return {**dict.fromkeys(NEEDED, "127.0.0.1"), **{name: str(path) for name, path in paths.items()}}


def test_server_does_not_start_with_unsafe_settings(complete: dict[str, str], tmp_path: Path) -> None:
    """One line names a setting or secret that is missing, or a value that is unsafe."""
    cases = [(name, "", f"{name} is not set") for name in NEEDED]
    unsafe = [("PUBLIC_HOST", "*"), ("PUBLIC_HOST", "a,*"), ("ARTIFACTS_DESTINATION", "here")]
    cases += [(f"MLFLOW_{name}", value, f"MLFLOW_{name}={value}") for name, value in unsafe]
    for name, value, message in cases:
        [line] = refusal(tmp_path, "serve.sh", **complete | {name: value}).splitlines()
        assert line.startswith("serve.sh: ") and message in line
    for name in ("secret-key", "admin-password", "database-password"):  # the last one that is read comes first
        (tmp_path / "secrets" / name).unlink()
        assert f"secrets/{name}: no such secret" in refusal(tmp_path, "serve.sh", **complete)


def test_gc_keeps_for_a_month_what_was_deleted(complete: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mlflow").write_text("#!/bin/bash\necho $*\n")
    (tmp_path / "mlflow").chmod(0o755)
    env = complete | {"PATH": f"{tmp_path}:/usr/bin:/bin", "MLFLOW_SETTINGS": str(tmp_path / "env")}
    done = subprocess.run([INFRA / "gc.sh"], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "gc --backend-store-uri postgresql+psycopg:// --older-than 30d\n"


def test_secrets_are_made_once_and_for_their_owner(complete: dict[str, str], tmp_path: Path) -> None:
    def read() -> dict[str, str]:
        return {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}

    first = read()
    subprocess.run([INFRA / "secrets.sh", tmp_path / "secrets"], check=True)
    assert read() == first
    assert first.pop("aws") == ""
    assert len(set(first.values())) == 3
    assert all(len(value) == 40 for value in first.values())
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700


def test_damaged_backup_is_refused(complete: dict[str, str], tmp_path: Path) -> None:
    (backup := tmp_path / "backup").mkdir()
    assert "not the folder of a backup" in refusal(tmp_path, "restore.sh", str(backup), **complete)
    (backup / "database.dump").write_text("complete")
    subprocess.run("sha256sum database.dump > SHA256SUMS", shell=True, cwd=backup, check=True)
    (backup / "database.dump").write_text("half")
    assert "damaged; take another one" in refusal(tmp_path, "restore.sh", str(backup), **complete)


def test_commands_of_the_page_are_tested_or_marked() -> None:
    """What is neither a script nor a user's own command needs root or a Docker daemon, and says so."""
    page = (ROOT / "docs/mlflow.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    lines = [line for block in blocks if not block.startswith("# needs root\n") for line in block.splitlines()]
    unmarked = [line for line in lines if "# needs docker" not in line]
    known = re.compile(r"(infra/mlflow/(\S+\.sh) |export MLFLOW_|sweep run demo )")
    assert [line for line in unmarked if not known.match(line)] == []
    assert {found[2] for line in unmarked if (found := known.match(line)) and found[2]} == set(SCRIPTS) - {"serve.sh"}
    for words in re.findall(r"account\.sh (\w+) \w+", page):
        assert words in ("add", "reset", "remove")
