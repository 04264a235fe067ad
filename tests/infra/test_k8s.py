"""Manifests for Kubernetes: sound by its schema and ours, safe, in step with the lock; their broken copies are not."""

import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra/k8s"
PAGE = (ROOT / "docs/kubernetes.md").read_text()
Yaml = dict[str, Any]


@cache
def checker() -> ModuleType:
    specification = importlib.util.spec_from_file_location("validate", FOLDER / "validate.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def read(name: str) -> Yaml:
    """A manifest without YAML's aliases, so that a broken copy is broken in one place."""
    found: Yaml = json.loads(json.dumps(yaml.safe_load((FOLDER / name).read_text())))
    return found


def rayjob() -> Yaml:
    return read("rayjob.yaml")


def cluster(job: Yaml) -> Yaml:
    found: Yaml = job["spec"]["rayClusterSpec"]
    return found


def pods(job: Yaml) -> dict[str, Yaml]:
    groups = {group["groupName"]: group["template"]["spec"] for group in cluster(job)["workerGroupSpecs"]}
    head = cluster(job)["headGroupSpec"]["template"]["spec"]
    return {"submitter": job["spec"]["submitterPodTemplate"]["spec"], "head": head, **groups}


def test_every_manifest_is_valid() -> None:
    for path in FOLDER.glob("*.yaml"):
        assert checker().problems(read(path.name)) == []
    job, patch = rayjob(), read("patches/gcs-fault-tolerance.yaml")
    cluster(job).update(patch["spec"]["rayClusterSpec"])
    assert checker().problems(job) == []


WORKER, HEAD = "workerGroupSpecs.0.template.spec.containers.0", "headGroupSpec.template.spec"
REMOVED = object()
# Path below spec.rayClusterSpec (or below spec, after a slash); the value it gets; the problem that is reported.
BROKEN: list[tuple[str, Any, str]] = [
    ("/backOffLimit", 5, "spec.backOffLimit: Extra inputs are not permitted"),
    ("authOption", {"mode": "token"}, "spec.rayClusterSpec.authOption: Extra inputs"),
    ("workerGroupSpecs.0.maxReplica", 8, "spec.rayClusterSpec.workerGroupSpecs.0.maxReplica: Extra inputs"),
    ("autoscalerOptions.version", "v3", "spec.rayClusterSpec.autoscalerOptions.version: Input should be 'v2'"),
    ("authOptions.mode", "disabled", "spec.rayClusterSpec.authOptions.mode: Input should be 'token'"),
    ("/backoffLimit", "5", "spec.backoffLimit: Input should be a valid integer"),
    ("headGroupSpec.template", REMOVED, "spec.rayClusterSpec.headGroupSpec.template: Field required"),
    (f"{WORKER}.resources.limits.memory", REMOVED, "gpu-spot: ray-worker: no limit of memory"),
    (f"{HEAD}.terminationGracePeriod", 120, "head: spec: Additional properties are not allowed ('terminationGraceP"),
    (f"{WORKER}.lifecycle.prestop", {}, "('prestop' was unexpected)"),
    (
        f"{HEAD}.containers.0.env.0",
        {"name": "MLFLOW_TRACKING_PASSWORD", "value": "s3cret"},
        "MLFLOW_TRACKING_PASSWORD has its value in the manifest",
    ),
    (
        f"{HEAD}.containers.0.env.0",
        {"name": "LEDGER", "value": "postgresql://me:s3cret@host/db"},
        "an address with a password",
    ),
    ("rayVersion", "2.59.0", "rayVersion 2.59.0: requirements.lock has"),
    (
        f"{WORKER}.image",
        "speech-llm-sweep:0.1.0-ray2.59.0",
        "image speech-llm-sweep:0.1.0-ray2.59.0: its tag does not end in ray",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), BROKEN, ids=[message[-40:] for *_, message in BROKEN])
def test_broken_copy_is_refused_with_reason(path: str, value: Any, message: str) -> None:
    job = rayjob()
    node: Any = job["spec"] if path[0] == "/" else cluster(job)
    *parents, key = [int(part) if part.isdigit() else part for part in path.strip("/").split(".")]
    for part in parents:
        node = node[part]
    if value is REMOVED:
        del node[key]
    else:
        node[key] = value
    assert message in "\n".join(checker().problems(job))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("storage.yaml", {"spec": {"accessMode": ["ReadWriteMany"]}}),
        ("network-policy.yaml", {"spec": {"podSelector": {}, "ingres": []}}),
        ("storage.yaml", {"kind": "Secret", "spec": None, "stringData": {"password": "s3cret"}}),
    ],
)
def test_core_objects_are_checked_strictly(name: str, change: Yaml) -> None:
    document = {key: value for key, value in (read(name) | change).items() if value is not None}
    assert checker().problems(document)


def test_kuberays_own_definition_is_used_where_given(tmp_path: Path) -> None:
    definition = tmp_path / "crd.yaml"
    known = {"type": "object", "properties": {"entrypoint": {"type": "string"}}}
    shape = {"type": "object", "properties": {name: {"type": "string"} for name in ("apiVersion", "kind")}}
    shape["properties"] |= {"metadata": {"type": "object"}, "spec": known}
    version = {"name": "v1", "schema": {"openAPIV3Schema": shape}}
    definition.write_text(yaml.safe_dump({"spec": {"versions": [version]}}))
    words = [sys.executable, FOLDER / "validate.py", FOLDER / "rayjob.yaml"]
    done = subprocess.run([*words, "--crd", definition], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "rayjob.yaml: RayJob: spec: Additional properties are not allowed" in done.stdout
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_image_is_tagged_with_the_projects_version() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    ray = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert version and ray
    image = f"speech-llm-sweep:{version[1]}-ray{ray[1]}"
    assert {container["image"] for pod in pods(rayjob()).values() for container in pod["containers"]} == {image}
    assert f"--tag {image} ." in (ROOT / "infra/Dockerfile").read_text()
    for cloud in ("aws", "gcp"):
        launcher = yaml.safe_load((ROOT / f"infra/ray-cluster.{cloud}.yaml").read_text())
        assert launcher["docker"]["image"] == image


def test_pods_have_few_rights_and_credentials() -> None:
    """Only the driver has MLflow's; KubeRay gives the autoscaler, in the head's pod, the token of an account."""
    held = {}
    for name, pod in pods(rayjob()).items():
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            rights = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == rights
        assert pod.get("automountServiceAccountToken", True) == (name == "head")
        held[name] = [source["secretRef"]["name"] for source in pod["containers"][0].get("envFrom", [])]
    assert held == {"submitter": [], "head": ["mlflow", "huggingface"], "gpu-spot": ["huggingface"]}


def test_workers_alone_are_on_spot_nodes() -> None:
    def expressions(name: str) -> list[Yaml]:
        affinity = pods(rayjob())[name]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        return [each for term in affinity["nodeSelectorTerms"] for each in term["matchExpressions"]]

    spot = expressions("gpu-spot")
    assert {expression["operator"] for expression in spot} == {"In"}
    for name in ("head", "submitter"):
        assert expressions(name) == [expression | {"operator": "NotIn"} for expression in spot]


def test_pods_have_time_for_checkpoints_before_they_end() -> None:
    from sweep.cli.submit import STOP_SECONDS

    found = pods(rayjob())
    head, worker = found["head"], found["gpu-spot"]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(STOP_SECONDS)} in head["containers"][0]["env"]
    assert head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sweep-job", "--stop"]
    assert head["terminationGracePeriodSeconds"] > STOP_SECONDS
    hook = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert "--reason DRAIN_NODE_REASON_PREEMPTION" in hook
    assert worker["terminationGracePeriodSeconds"] > int(hook.rpartition(" ")[2])


def test_network_policy_covers_all_pods_of_the_sweep() -> None:
    policy, job = read("network-policy.yaml")["spec"], rayjob()
    chosen = policy["podSelector"]["matchLabels"]
    templates = [job["spec"]["submitterPodTemplate"], cluster(job)["headGroupSpec"]["template"]]
    templates += [group["template"] for group in cluster(job)["workerGroupSpecs"]]
    assert all(template["metadata"]["labels"] == chosen for template in templates)
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert all("ports" in rule or rule["to"] == [{"podSelector": {"matchLabels": chosen}}] for rule in policy["egress"])


def test_commands_of_the_page_run_or_say_their_needs() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    here = [block for block in blocks if not block.startswith("# needs ")]
    assert here == ["python infra/k8s/validate.py\n"]
    done = subprocess.run([sys.executable, *here[0].split()[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count(": sound\n")) == (0, len(list(FOLDER.glob("*.yaml"))))
    for name in set(re.findall(r"(?<![\w/])infra/[\w./-]+[a-z]", PAGE)):
        assert (ROOT / name).exists(), name


def test_page_and_storage_make_what_the_manifest_refers_to() -> None:
    job = rayjob()
    head = pods(job)["head"]
    (group,) = cluster(job)["workerGroupSpecs"]
    assert f"--set resources.slots={group['maxReplicas']}" in job["spec"]["entrypoint"]
    volumes = [volume for pod in pods(job).values() for volume in pod.get("volumes", [])]
    claims = {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in volumes} - {None}
    assert claims == {read("storage.yaml")["metadata"]["name"]}
    (config,) = [volume["configMap"]["name"] for volume in head["volumes"] if "configMap" in volume]
    assert f"create configmap {config} --from-file=sweep.yaml" in PAGE
    (needed,) = [
        source["secretRef"]["name"]
        for source in head["containers"][0]["envFrom"]
        if not source["secretRef"].get("optional")
    ]
    assert f"create secret generic {needed} --from-env-file" in PAGE
    assert f"job/{job['metadata']['name']} " in PAGE
    commands = PAGE.split("five commands", 1)[1].split("```bash\n", 1)[1].split("```", 1)[0].splitlines()
    assert len([line for line in commands if not line.startswith("#")]) == 5
