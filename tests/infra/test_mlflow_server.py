"""The server of `infra/mlflow` for real: PostgreSQL and MLflow on loopback, with the scripts that are shipped.

A sweep logs to it as an ordinary user while it is killed and comes back; everything is lost, and a backup brings it
back; who has no account, or another one, is kept out.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests import HTTPError

from data.shards.dataset import Shards
from sweep.search.study import StudyStore
from tests.infra.mlflow_site import INFRA, PUBLIC, ROOT, Site, acting, status
from tests.sweep.common import ask, complaint, report, sweep
from tests.sweep.mlflow_server import wait_for
from tests.sweep.stores import Postgres
from tests.sweep.tracked import CONFIG, append, track, written

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
User = dict[str, str]
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=5"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.end()


@pytest.fixture(scope="module")
def site(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"), postgres)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def anna(site: Site) -> User:
    return site.account("anna")


@pytest.fixture(scope="module")
def bob(site: Site) -> User:
    return site.account("bob")


def logged(user: User, experiment: str) -> str:
    """A run with a metric and an artifact in an experiment of the user's own."""
    with acting(user) as client:
        run = client.create_run(client.create_experiment(experiment)).info.run_id
        client.log_metric(run, "f1", 0.5, step=1)
        client.log_text(run, "words", "notes/said.txt")
    return str(run)


def denied(work: Callable[[], object]) -> bool:
    try:
        work()
    except (MlflowException, HTTPError) as error:
        return getattr(error, "error_code", "") == "PERMISSION_DENIED" or "403" in str(error)
    return False


def test_access_requires_an_account_and_the_right_host(site: Site, anna: User) -> None:
    for path in (
        "/",
        "/version",
        "/metrics",
        SEARCH,
        "/ajax-api/2.0/mlflow/experiments/search",
        "/ajax-api/3.0/jobs/1",
    ):
        assert status(site.uri + path) == 401, path
        assert status(site.uri + path, anna | {"MLFLOW_TRACKING_PASSWORD": "password1234"}) == 401, path
    assert status(f"{site.uri}/health") == 200
    assert status(site.uri + SEARCH, anna) == status(site.uri + SEARCH, anna, host=PUBLIC) == 200
    assert status(site.uri + SEARCH, anna, host="evil.example.org") == 403
    create, body = f"{site.uri}/api/2.0/mlflow/experiments/create", {"name": "from a page"}
    assert status(create, anna, body, host=PUBLIC, origin="https://evil.example.org") == 403
    assert status(create, anna, body, host=PUBLIC, origin=f"https://{PUBLIC}") == 200


def test_user_has_no_administrator_rights(site: Site, anna: User) -> None:
    body = {"username": "eve", "password": "long enough to be one"}
    assert status(f"{site.uri}/api/2.0/mlflow/users/create", anna, body) == 403
    assert status(f"{site.uri}/api/2.0/mlflow/users/get?username=admin", anna) == 403


def test_other_users_read_and_cannot_write(site: Site, anna: User, bob: User) -> None:
    run = logged(anna, "anna's")
    with acting(bob) as client:
        assert client.get_run(run).data.metrics == {"f1": 0.5}
        assert Path(client.download_artifacts(run, "notes/said.txt")).read_text() == "words"
        assert denied(lambda: client.log_metric(run, "f1", 0.9, step=2))
        assert denied(lambda: client.delete_run(run))
        assert denied(lambda: client.log_text(run, "others", "notes/said.txt"))
        assert denied(lambda: client.create_run(client.get_experiment_by_name("anna's").experiment_id))
    with acting(anna) as client:
        assert Path(client.download_artifacts(run, "notes/said.txt")).read_text() == "words"


def test_accounts_are_added_reset_and_removed(site: Site) -> None:
    first = site.account("carl")
    twice = site.call("account.sh", "add", "carl")
    assert (twice.returncode, twice.stdout) == (1, "")
    assert twice.stderr == "account.sh: carl: User (username=carl) already exists\n"
    second = first | dict([site.do("account.sh", "reset", "carl").split("=", 1)])
    assert [status(site.uri + SEARCH, user) for user in (first, second)] == [401, 200]
    site.do("account.sh", "remove", "carl")
    assert status(site.uri + SEARCH, second) == 401


def test_secrets_stay_secret_and_files_private(site: Site, anna: User) -> None:
    logged(anna, "private")
    backup = site.do("backup.sh")
    words = " ".join(word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or [])
    assert "mlflow.server.auth" in words
    stored = b"".join(
        path.read_bytes() for path in site.folder.rglob("*") if path.is_file() and site.secrets not in path.parents
    )
    for name in ("database-password", "admin-password", "secret-key"):
        assert site.secret(name) not in words
        assert site.secret(name).encode() not in stored
    assert anna["MLFLOW_TRACKING_PASSWORD"].encode() not in stored
    made = [path for place in (site.artifacts, Path(backup)) for path in (place, *place.rglob("*"))]
    assert len(made) > 5
    assert {path.stat().st_mode & 0o077 for path in made} == {0}


def test_backup_is_complete_or_absent_and_old_ones_rotate(site: Site) -> None:
    old = [f"mlflow-{year}0101T000000Z" for year in range(2001, 2016)]
    for name in (*old, ".unfinished-mlflow-20160101T000000Z"):
        (site.backups / name).mkdir(parents=True)
    site.configure("PGPORT=9")
    assert site.call("backup.sh").returncode != 0
    site.configure()
    before = sorted(path.name for path in site.backups.glob("mlflow-*"))
    newest = Path(site.do("backup.sh")).name
    assert before[:15] == old
    assert {path.name for path in site.backups.iterdir()} == {".lock", *[*before, newest][-14:]}


def test_gc_removes_what_was_deleted_long_ago(site: Site, anna: User) -> None:
    run, kept = logged(anna, "to delete"), logged(anna, "to keep")
    with acting(anna) as client:
        client.delete_run(run)
    site.do("gc.sh")
    assert [len(list(site.artifacts.rglob(f"{each}/artifacts/notes/said.txt"))) for each in (run, kept)] == [1, 1]
    site.do("gc.sh", "0d")
    assert [len(list(site.artifacts.rglob(f"{each}/artifacts/notes/said.txt"))) for each in (run, kept)] == [0, 1]
    with acting(anna) as client:
        assert denied(lambda: client.get_run(run)), "also of what there is not"
        assert client.get_run(kept).data.metrics == {"f1": 0.5}


# A sweep of the user's.


def config(folder: Path, models: Path, corpus: Shards, name: str) -> Path:
    """Two trials on text, a few seconds each."""
    content = {
        "name": name,
        "data": {"shards": str(corpus.folder), "history": 2, "reader": "local"},
        "model": {"modality": "text", "llm": {"path": str(models / "llm")}},
        "train": {"epochs": 2, "batch_size": 8},
        "search": {"trials": 2, "pruning": None, "space": {"train.learning_rate": [0.01, 0.003]}},
    }
    (path := folder / f"{name}.yaml").write_text(json.dumps(content))
    return path


@pytest.fixture
def begin() -> Iterator[Callable[[User, Path, Path], subprocess.Popen[str]]]:
    """`sweep run …` as a user types it; none outlives its test."""
    begun: list[subprocess.Popen[str]] = []

    def run(user: User, config: Path, out: Path) -> subprocess.Popen[str]:
        environment = {"HOME": str(out.parent), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "sweep", "run", str(config), "--out", str(out)]
        with (out.parent / "said").open("w") as said:
            begun.append(
                subprocess.Popen(command, cwd=out.parent, env=environment | user, stdout=said, stderr=said, text=True)
            )
        return begun[-1]

    yield run
    for each in begun:
        each.terminate()
        each.wait()


def shown(client: MlflowClient, name: str) -> dict[str, Any]:
    """All that the server has of a sweep: states, parameters, every point, every artifact."""
    found: dict[str, Any] = {}
    for run in client.search_runs([client.get_experiment_by_name(name).experiment_id]):
        histories = {metric: client.get_metric_history(run.info.run_id, metric) for metric in run.data.metrics}
        points = {metric: sorted((one.step, one.value) for one in history) for metric, history in histories.items()}
        place = Path(client.download_artifacts(run.info.run_id, ""))
        files = {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        key = run.data.tags["sweep.key"].partition("/")[2] or "sweep"
        if key == "sweep":  # its sums have a point for each moment at which some were sent
            points = {metric: of[-1] for metric, of in points.items()}
        found[key] = {"status": run.info.status, "params": run.data.params, "points": points, "files": files}
    return found


def test_sweep_without_write_access_is_refused_at_start(
    site: Site, anna: User, bob: User, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    own, out = config(tmp_path, models, corpus, "hers"), tmp_path / "out"
    with acting(anna | {"MLFLOW_TRACKING_PASSWORD": "not the right one"}):
        wrong = complaint(sweep("run", own, "--out", out))
    assert wrong.startswith(f"MLflow at {site.uri} rejects this user and password; set MLFLOW_TRACKING_USERNAME")
    with acting(anna) as client:
        client.create_experiment("hers")
    with acting(bob):
        other = complaint(sweep("run", own, "--out", out))
    assert "another user's; use another one, --set name=" in other
    assert (len(wrong.splitlines()), len(other.splitlines()), out.exists()) == (1, 1, False)


@pytest.mark.long
def test_server_that_dies_during_a_sweep_loses_nothing(
    site: Site, anna: User, begin: Any, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    own, out = config(tmp_path, models, corpus, "mine"), tmp_path / "mine"
    running = begin(anna, own, out)

    def begun(client: MlflowClient) -> bool:
        experiment = client.get_experiment_by_name("mine")
        return experiment is not None and len(client.search_runs([experiment.experiment_id])) > 1

    with acting(anna) as client:
        wait_for(lambda: running.poll() is not None or begun(client), 900)
        site.stop(signal.SIGKILL)
        assert running.poll() is None, (tmp_path / "said").read_text()
        site.start()
        # 75: the server took longer to come back than the sweep waits for it.
        assert running.wait() in (0, 75), (tmp_path / "said").read_text()
        assert sweep("run", own, "--out", out).code == 0
        found = shown(client, "mine")
    assert {key: run["status"] for key, run in found.items()} == dict.fromkeys(("sweep", "0", "1"), "FINISHED")
    for number in (0, 1):
        for name in ("loss", "macro_f1"):
            points = [(step, value) for step, _, value in written(out, number, name)]
            assert found[str(number)]["points"][name] == points
            assert points


def test_restored_backup_is_completed_by_the_sweep(site: Site, anna: User, tmp_path: Path) -> None:
    """The sweep is a study and the files of its trials: nothing trains here."""
    (folder := tmp_path / "sweep").mkdir()
    ask(study := StudyStore.open(folder, CONFIG), 2)
    append(folder, 0, (8, 1000.0, 0.4))
    append(folder, 0, (16, 1000.25, 0.5))
    with acting(anna) as client:
        track(folder, seconds=300)
        backup, before = site.do("backup.sh"), shown(client, CONFIG.name)
        assert before["0"]["points"]["loss"] == [(8, 0.4), (16, 0.5)]
        append(folder, 0, (32, 1001.5, 0.75))
        append(folder, 1, (16, 1002.0, 0.1))
        report(study, 0, 0.9, 0.8)
        study.complete(0)
        track(folder, seconds=300)
        whole = shown(client, CONFIG.name)
        assert whole["0"]["points"]["loss"] == [(8, 0.4), (16, 0.5), (32, 0.75)]
        assert whole["0"]["files"].keys() > before["0"]["files"].keys()

        assert "is not empty" in site.call("restore.sh", backup).stderr
        site.stop()
        site.lose_everything()
        site.make_database()
        site.do("restore.sh", backup)
        site.start()
        assert shown(client, CONFIG.name) == before
        track(folder, seconds=300)
        assert shown(client, CONFIG.name) == whole

        # The experiment is deleted permanently.
        client.delete_experiment(client.get_experiment_by_name(CONFIG.name).experiment_id)
        site.do("gc.sh", "0d")
        track(folder, seconds=300)
        assert shown(client, CONFIG.name) == whole


@pytest.mark.long
def test_artifacts_in_a_bucket_and_private_experiments(postgres: Postgres, tmp_path: Path) -> None:
    """An S3-like store whose keys only the server has; and a server where users do not see each other's data. It asks
    the database over a socket, without a password."""
    import boto3
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    endpoint = "http://{}:{}".format(*store.get_host_and_port())
    keys = {"aws_access_key_id": "key-of-the-server", "aws_secret_access_key": "secret-of-the-server"}
    bucket = boto3.resource("s3", endpoint_url=endpoint, region_name="us-east-1", **keys).create_bucket(Bucket="group")
    other = Site(tmp_path, postgres, "walls")
    (other.secrets / "aws").write_text("[default]\n" + "".join(f"{name} = {value}\n" for name, value in keys.items()))
    (tmp_path / "walls.ini").write_text((INFRA / "basic_auth.ini").read_text().replace("= READ", "= NO_PERMISSIONS"))
    more = (f"MLFLOW_S3_ENDPOINT_URL={endpoint}", f"MLFLOW_AUTH_CONFIG_PATH={tmp_path / 'walls.ini'}")
    other.configure(*more, MLFLOW_ARTIFACTS_DESTINATION="s3://group/mlflow", PGHOST=postgres.folder)
    (other.secrets / "database-password").unlink()
    try:
        other.start()
        anna, bob = other.account("anna"), other.account("bob")
        run = logged(anna, "hers")
        assert [item.key.endswith(f"{run}/artifacts/notes/said.txt") for item in bucket.objects.all()] == [True]
        with acting(anna) as client:
            assert Path(client.download_artifacts(run, "notes/said.txt")).read_text() == "words"
        with acting(bob) as client:
            assert denied(lambda: client.get_run(run))
            assert denied(lambda: client.get_experiment_by_name("hers"))
            assert client.search_experiments() == []
        assert "s3://group/mlflow is not copied" in other.call("backup.sh").stdout
    finally:
        other.stop()
        store.stop()
