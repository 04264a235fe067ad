"""The server of `infra/mlflow` for real: PostgreSQL and MLflow on loopback, with the scripts that are shipped.

A sweep logs to it as an ordinary user while it is killed and comes back; everything is lost, and a backup brings it
back; a user without an account, or with another one, is kept out.
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

from data.errors import UserError
from data.shards.dataset import Shards
from sweep.search.study import StudyStore
from sweep.tracking.access import check_access
from tests.infra.mlflow_site import INFRA, PUBLIC, ROOT, Site, acting, status
from tests.sweep.common import ask, report, sweep
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
    return site.quick_account("anna")


@pytest.fixture(scope="module")
def bob(site: Site) -> User:
    return site.quick_account("bob")


def logged(user: User, experiment: str) -> str:
    """Return a run with a metric and an artifact in an experiment of the user's own."""
    with acting(user) as client:
        run = client.create_run(client.create_experiment(experiment)).info.run_id
        client.log_metric(run, "f1", 0.5, step=1)
        client.log_text(run, "words", "notes/note.txt")
    return str(run)


def denied(work: Callable[[], object]) -> bool:
    try:
        work()
    except (MlflowException, HTTPError) as error:
        return getattr(error, "error_code", "") == "PERMISSION_DENIED" or "403" in str(error)
    return False


def test_access_requires_an_account_and_the_right_host(site: Site, anna: User) -> None:
    wrong, api = anna | {"MLFLOW_TRACKING_PASSWORD": "password1234"}, f"{site.uri}/api/2.0/mlflow"
    other_apis = "/ajax-api/2.0/mlflow/experiments/search", "/ajax-api/3.0/jobs/1"
    for path in ("/", "/version", "/metrics", SEARCH, *other_apis):
        assert [status(site.uri + path, user) for user in (None, wrong)] == [401, 401], path
    assert status(f"{site.uri}/health") == 200
    assert status(site.uri + SEARCH, anna) == status(site.uri + SEARCH, anna, host=PUBLIC) == 200
    assert status(site.uri + SEARCH, anna, host="evil.example.org") == 403
    create, body = f"{api}/experiments/create", {"name": "from a page"}
    for origin, code in (("evil.example.org", 403), (PUBLIC, 200)):
        assert status(create, anna, body, host=PUBLIC, origin=f"https://{origin}") == code
    # No administrator's rights, either.
    assert status(f"{api}/users/create", anna, {"username": "eve", "password": "long enough to be one"}) == 403
    assert status(f"{api}/users/get?username=admin", anna) == 403


def test_other_users_read_and_cannot_write(site: Site, anna: User, bob: User) -> None:
    """`sweep run` says so in one line before its first trial."""
    run = logged(anna, "anna's")
    with acting(bob) as client:
        assert client.get_run(run).data.metrics == {"f1": 0.5}
        assert Path(client.download_artifacts(run, "notes/note.txt")).read_text() == "words"
        assert denied(lambda: client.log_metric(run, "f1", 0.9, step=2))
        assert denied(lambda: client.delete_run(run))
        assert denied(lambda: client.log_text(run, "others", "notes/note.txt"))
        assert denied(lambda: client.create_run(client.get_experiment_by_name("anna's").experiment_id))
        with pytest.raises(UserError, match=r"another user's; use another one, --set name="):
            check_access(site.uri, "anna's")
    with acting(anna) as client:
        assert Path(client.download_artifacts(run, "notes/note.txt")).read_text() == "words"
    with acting(anna | {"MLFLOW_TRACKING_PASSWORD": "wrong"}), pytest.raises(UserError) as refused:
        check_access(site.uri, "anna's")
    assert f"{site.uri} rejects this user and password; set MLFLOW_TRACKING_USERNAME" in str(refused.value)


def test_accounts_are_added_reset_and_removed(site: Site) -> None:
    first = site.account("carl")
    twice = site.call("account.sh", "add", "carl")
    assert (twice.returncode, twice.stdout) == (1, "")
    assert twice.stderr == "account.sh: carl: User (username=carl) already exists\n"
    second = first | dict(line.split("=", 1) for line in site.succeed("account.sh", "reset", "carl"))
    assert [status(site.uri + SEARCH, user) for user in (first, second)] == [401, 200]
    site.succeed("account.sh", "remove", "carl")
    assert status(site.uri + SEARCH, second) == 401


def test_backup_is_private_and_complete_or_absent(site: Site, anna: User) -> None:
    """It holds no secret, and nor does any other file or command line; the newest fourteen are kept."""
    logged(anna, "private")
    old = [f"mlflow-{year}0101T000000Z" for year in range(2001, 2016)]
    for name in (*old, ".unfinished-mlflow-20160101T000000Z"):
        (site.backups / name).mkdir(parents=True)
    site.configure("PGPORT=9")
    assert site.call("backup.sh").returncode != 0
    site.configure()
    assert sorted(path.name for path in site.backups.glob("mlflow-*")) == old
    backup = Path(site.succeed("backup.sh")[-1])
    assert {path.name for path in site.backups.iterdir()} == {".lock", *old[-13:], backup.name}

    words = " ".join(word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or [])
    assert "mlflow.server.auth" in words
    files = [path for path in site.folder.rglob("*") if path.is_file() and site.secrets not in path.parents]
    stored = b"".join(path.read_bytes() for path in files)
    names = ("database-password", "admin-password", "secret-key")
    for secret in (*map(site.secret, names), anna["MLFLOW_TRACKING_PASSWORD"]):
        assert secret not in words
        assert secret.encode() not in stored
    made = [path for folder in (site.artifacts, backup) for path in (folder, *folder.rglob("*"))]
    assert len(made) > 5
    assert {path.stat().st_mode & 0o077 for path in made} == {0}


def shown(client: MlflowClient, name: str) -> dict[str, Any]:
    """Return all that the server has of a sweep: states, parameters, every point, every artifact."""
    runs: dict[str, Any] = {}
    for run in client.search_runs([client.get_experiment_by_name(name).experiment_id]):
        histories = {metric: client.get_metric_history(run.info.run_id, metric) for metric in run.data.metrics}
        points = {
            metric: sorted((point.step, point.value) for point in history) for metric, history in histories.items()
        }
        folder = Path(client.download_artifacts(run.info.run_id, ""))
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        key, points = run.data.tags["sweep.key"].partition("/")[2] or "sweep", run.data.metrics
        if key != "sweep":  # whose sums have a point for each moment at which some were sent
            points = {
                name: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
                for name in points
            }
        runs[key] = {"status": run.info.status, "params": run.data.params, "points": points, "files": files}
    return runs


@pytest.mark.long
def test_restored_backup_is_completed_by_the_sweep(site: Site, anna: User, tmp_path: Path) -> None:
    """The sweep is a study and the files of its trials: nothing trains here. At the end, `gc.sh` removes for good what
    was deleted, and nothing else; of a deleted sweep everything is sent again."""
    (folder := tmp_path / "sweep").mkdir()
    ask(study := StudyStore.open(folder, CONFIG), 2)
    append(folder, 0, (8, 1000.0, 0.4))
    append(folder, 0, (16, 1000.25, 0.5))
    run, kept = logged(anna, "to delete"), logged(anna, "to keep")
    with acting(anna) as client:
        track(folder, seconds=300)
        [*_, backup], before = site.succeed("backup.sh"), shown(client, CONFIG.name)
        assert before["0"]["points"]["loss"] == [(8, 0.4), (16, 0.5)]
        append(folder, 0, (32, 1001.5, 0.75))
        append(folder, 1, (16, 1002.0, 0.1))
        report(study, 0, 0.9, 0.8)
        study.complete(0)
        track(folder, seconds=300)
        complete = shown(client, CONFIG.name)
        assert complete["0"]["points"]["loss"] == [(8, 0.4), (16, 0.5), (32, 0.75)]
        assert complete["0"]["files"].keys() > before["0"]["files"].keys()

        assert "is not empty" in site.call("restore.sh", backup).stderr
        site.stop()
        site.lose_everything()
        site.make_database()
        site.succeed("restore.sh", backup)
        site.start()
        assert shown(client, CONFIG.name) == before
        track(folder, seconds=300)
        assert shown(client, CONFIG.name) == complete

        client.delete_run(run)
        client.delete_experiment(client.get_experiment_by_name(CONFIG.name).experiment_id)
        assert all(list(site.artifacts.rglob(f"{each}/artifacts/notes/note.txt")) for each in (run, kept))
        site.succeed("gc.sh", "0d")
        assert [len(list(site.artifacts.rglob(f"{each}/artifacts/notes/note.txt"))) for each in (run, kept)] == [0, 1]
        assert denied(lambda: client.get_run(run)), "the same answer as for a run that never existed"
        assert client.get_run(kept).data.metrics == {"f1": 0.5}
        track(folder, seconds=300)
        assert shown(client, CONFIG.name) == complete


@pytest.mark.long
def test_server_that_dies_during_a_sweep_loses_nothing(
    site: Site, anna: User, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    """`sweep run` as a user types it: two trials on text."""
    content = {
        "name": "mine",
        "data": {"shards": str(corpus.folder), "history": 2, "reader": "local"},
        "model": {"modality": "text", "llm": {"path": str(models / "llm")}},
        "train": {"epochs": 2, "batch_size": 8},
        "search": {"trials": 2, "pruning": None, "space": {"train.learning_rate": [0.01, 0.003]}},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(content))
    command = [sys.executable, "-m", "sweep", "run", "mine.yaml", "--out", "mine"]
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **anna}
    output, out = tmp_path / "output", tmp_path / "mine"

    def has_trials(client: MlflowClient) -> bool:
        experiment = client.get_experiment_by_name("mine")
        return experiment is not None and len(client.search_runs([experiment.experiment_id])) > 1

    with output.open("w") as file:
        running = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=file, stderr=file)
    try:
        with acting(anna) as client:
            wait_for(lambda: running.poll() is not None or has_trials(client), 900)
            site.stop(signal.SIGKILL)
            assert running.poll() is None, output.read_text()
            site.start()
            # 75: the server took longer to come back than the sweep waits for it.
            assert running.wait() in (0, 75), output.read_text()
            assert sweep("run", tmp_path / "mine.yaml", "--out", out).code == 0
            runs = shown(client, "mine")
    finally:
        running.terminate()
        running.wait()
    assert {key: run["status"] for key, run in runs.items()} == dict.fromkeys(("sweep", "0", "1"), "FINISHED")
    for number in (0, 1):
        for name in ("loss", "macro_f1"):
            points = [(step, value) for step, _, value in written(out, number, name)]
            assert runs[str(number)]["points"][name] == points
            assert points


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
        assert [item.key.endswith(f"{run}/artifacts/notes/note.txt") for item in bucket.objects.all()] == [True]
        with acting(anna) as client:
            assert Path(client.download_artifacts(run, "notes/note.txt")).read_text() == "words"
        with acting(bob) as client:
            assert denied(lambda: client.get_run(run))
            assert denied(lambda: client.get_experiment_by_name("hers"))
            assert client.search_experiments() == []
        assert "s3://group/mlflow is not copied" in other.call("backup.sh").stdout
    finally:
        other.stop()
        store.stop()
