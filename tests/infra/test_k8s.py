"""Manifests for Kubernetes: sound by its schema and ours, safe, in step with the lock; their broken copies are not."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
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


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_every_manifest_is_sound(name: str) -> None:
    assert checker().problems(read(name)) == []


def test_with_fault_tolerance_it_is_sound_as_well() -> None:
    job, patch = rayjob(), read("patches/gcs-fault-tolerance.yaml")
    cluster(job).update(patch["spec"]["rayClusterSpec"])
    assert checker().problems(job) == []


def misspelt_key(job: Yaml) -> None:
    job["spec"]["backOffLimit"] = job["spec"].pop("backoffLimit")


def misspelt_key_of_the_cluster(job: Yaml) -> None:
    cluster(job)["authOption"] = {"mode": "token"}


def misspelt_key_of_a_group(job: Yaml) -> None:
    cluster(job)["workerGroupSpecs"][0]["maxReplica"] = 8


def wrong_enum(job: Yaml) -> None:
    cluster(job)["autoscalerOptions"]["version"] = "v3"


def no_token(job: Yaml) -> None:
    cluster(job)["authOptions"]["mode"] = "disabled"


def wrong_type(job: Yaml) -> None:
    job["spec"]["backoffLimit"] = "5"


def missing_key(job: Yaml) -> None:
    del cluster(job)["headGroupSpec"]["template"]


def missing_limit(job: Yaml) -> None:
    del pods(job)["gpu-spot"]["containers"][0]["resources"]["limits"]["memory"]


def unknown_field_of_a_pod(job: Yaml) -> None:
    pods(job)["head"]["terminationGracePeriod"] = 120


def unknown_field_of_a_container(job: Yaml) -> None:
    pods(job)["gpu-spot"]["containers"][0]["lifecycle"]["prestop"] = {}


def inline_secret(job: Yaml) -> None:
    pods(job)["head"]["containers"][0]["env"].append({"name": "MLFLOW_TRACKING_PASSWORD", "value": "s3cret"})


def inline_secret_in_an_address(job: Yaml) -> None:
    pods(job)["head"]["containers"][0]["env"].append({"name": "LEDGER", "value": "postgresql://me:s3cret@host/db"})


def another_ray(job: Yaml) -> None:
    cluster(job)["rayVersion"] = "2.59.0"


def another_ray_in_the_image(job: Yaml) -> None:
    pods(job)["gpu-spot"]["containers"][0]["image"] = "speech-llm-sweep:0.1.0-ray2.59.0"


BROKEN: dict[Callable[[Yaml], None], str] = {
    misspelt_key: "spec.backOffLimit: Extra inputs are not permitted",
    misspelt_key_of_the_cluster: "spec.rayClusterSpec.authOption: Extra inputs",
    misspelt_key_of_a_group: "spec.rayClusterSpec.workerGroupSpecs.0.maxReplica: Extra inputs",
    wrong_enum: "spec.rayClusterSpec.autoscalerOptions.version: Input should be 'v2'",
    no_token: "spec.rayClusterSpec.authOptions.mode: Input should be 'token'",
    wrong_type: "spec.backoffLimit: Input should be a valid integer",
    missing_key: "spec.rayClusterSpec.headGroupSpec.template: Field required",
    missing_limit: "gpu-spot: ray-worker: no limit of memory",
    unknown_field_of_a_pod: "head: spec: Additional properties are not allowed ('terminationGracePeriod'",
    unknown_field_of_a_container: "('prestop' was unexpected)",
    inline_secret: "MLFLOW_TRACKING_PASSWORD has its value in the manifest",
    inline_secret_in_an_address: "an address with a password",
    another_ray: "rayVersion 2.59.0: requirements.lock has",
    another_ray_in_the_image: "image speech-llm-sweep:0.1.0-ray2.59.0: its tag does not end in ray",
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.items(), ids=[damage.__name__ for damage in BROKEN])
def test_broken_copy_is_refused_with_reason(damage: Callable[[Yaml], None], message: str) -> None:
    job = rayjob()
    damage(job)
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


def test_the_definition_of_kuberay_is_used_if_one_has_it(tmp_path: Path) -> None:
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


def test_the_image_is_this_version_of_the_project() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    ray = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert version and ray
    image = f"speech-llm-sweep:{version[1]}-ray{ray[1]}"
    assert {container["image"] for pod in pods(rayjob()).values() for container in pod["containers"]} == {image}
    assert f"--tag {image} ." in (ROOT / "infra/Dockerfile").read_text()
    for cloud in ("aws", "gcp"):
        launcher = yaml.safe_load((ROOT / f"infra/ray-cluster.{cloud}.yaml").read_text())
        assert launcher["docker"]["image"] == image


def test_pods_run_as_nobody_special() -> None:
    for name, pod in pods(rayjob()).items():
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
        # The autoscaler runs in the head's pod, with the token of an account that KubeRay makes for it.
        assert pod.get("automountServiceAccountToken", True) == (name == "head")


def test_only_the_driver_has_the_credentials_of_mlflow() -> None:
    held = {
        name: [source["secretRef"]["name"] for source in pod["containers"][0].get("envFrom", [])]
        for name, pod in pods(rayjob()).items()
    }
    assert held == {"submitter": [], "head": ["mlflow", "huggingface"], "gpu-spot": ["huggingface"]}


def test_the_head_is_never_on_a_spot_node_and_workers_always_are() -> None:
    def terms(pod: Yaml) -> list[Yaml]:
        affinity = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        found: list[Yaml] = affinity["nodeSelectorTerms"]
        return found

    found = pods(rayjob())
    spot = [expression for term in terms(found["gpu-spot"]) for expression in term["matchExpressions"]]
    assert {expression["operator"] for expression in spot} == {"In"}
    for name in ("head", "submitter"):
        (term,) = terms(found[name])
        assert term["matchExpressions"] == [expression | {"operator": "NotIn"} for expression in spot]


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


def test_sweep_requests_as_many_trials_as_workers() -> None:
    job = rayjob()
    (group,) = cluster(job)["workerGroupSpecs"]
    assert f"--set resources.slots={group['maxReplicas']}" in job["spec"]["entrypoint"]


def test_the_policy_is_for_all_pods_of_the_sweep() -> None:
    policy, job = read("network-policy.yaml")["spec"], rayjob()
    chosen = policy["podSelector"]["matchLabels"]
    templates = [job["spec"]["submitterPodTemplate"], cluster(job)["headGroupSpec"]["template"]]
    templates += [group["template"] for group in cluster(job)["workerGroupSpecs"]]
    assert all(template["metadata"]["labels"] == chosen for template in templates)
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert all("ports" in rule or rule["to"] == [{"podSelector": {"matchLabels": chosen}}] for rule in policy["egress"])


def test_every_volume_is_defined_or_documented() -> None:
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods(rayjob()).values()
        for volume in pod.get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    assert claims == {read("storage.yaml")["metadata"]["name"]}


def test_the_page_says_what_its_commands_need_and_the_others_run() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    here = [block for block in blocks if not block.startswith("# needs ")]
    assert here == ["python infra/k8s/validate.py\n"]
    done = subprocess.run([sys.executable, *here[0].split()[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count(": sound\n")) == (0, len(list(FOLDER.glob("*.yaml"))))
    for name in set(re.findall(r"(?<![\w/])infra/[\w./-]+[a-z]", PAGE)):
        assert (ROOT / name).exists(), name


def test_the_page_makes_what_the_manifest_asks_for() -> None:
    job = rayjob()
    head = pods(job)["head"]
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
