"""Check Kubernetes manifests without a cluster: `python infra/k8s/validate.py [FILE …] [--crd ray.io_rayjobs.yaml]`.

Core objects, and the pod templates within a RayJob, are checked strictly against Kubernetes' own schema; a RayJob
against the models below, which know the keys that are used here and no others. `--crd` takes KubeRay's own
definition (from its Helm chart) and checks against that as well. Exit codes: 0 sound, 2 problems, one a line.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import kubernetes_validate
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

HERE = Path(__file__).resolve().parent
LOCK = HERE.parents[1] / "requirements.lock"
SECRET_NAME = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL|_KEY$", re.IGNORECASE)
SECRET_URL = re.compile(r"://[^/\s]*:[^/\s]*@")
Yaml = dict[str, Any]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """Knows its keys, spelt as KubeRay spells them; all others are mistakes."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", strict=True)


class Metadata(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$")]
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class AuthOptions(Strict):
    mode: Literal["token"]


class Autoscaler(Strict):
    version: Literal["v2"]
    idle_timeout_seconds: Count
    security_context: Yaml
    resources: Yaml


class GcsStorage(Strict):
    size: str


class GcsFaultTolerance(Strict):
    backend: Literal["rocksdb"]
    storage: GcsStorage


class Head(Strict):
    ray_start_params: dict[str, str]
    template: Yaml


class Workers(Head):
    group_name: str
    replicas: Count
    min_replicas: Count
    max_replicas: Count


class RayCluster(Strict):
    ray_version: str
    auth_options: AuthOptions
    enable_in_tree_autoscaling: Literal[True]
    autoscaler_options: Autoscaler
    gcs_fault_tolerance_options: GcsFaultTolerance | None = None
    head_group_spec: Head
    worker_group_specs: list[Workers]


class SubmitterConfig(Strict):
    backoff_limit: Count


class Spec(Strict):
    entrypoint: str
    backoff_limit: Count
    active_deadline_seconds: Count
    shutdown_after_job_finishes: Literal[True]  # Kueue insists
    ttl_seconds_after_finished: Count
    submitter_config: SubmitterConfig
    submitter_pod_template: Yaml
    ray_cluster_spec: RayCluster


class RayJob(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: Spec


def problems(document: Yaml) -> list[str]:
    """What is wrong with a manifest, a line each; the first kind of problem that there is."""
    if document.get("kind") == "RayJob":
        try:
            job = RayJob.model_validate(document)
        except ValidationError as error:
            return [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        found = [line for name, template in _templates(job) for line in _pod_problems(name, template)]
        found += _version_problems(job)
    else:
        found = _core_problems(document, "")
    return found + list(_secrets(document))


def _templates(job: RayJob) -> Iterator[tuple[str, Yaml]]:
    cluster = job.spec.ray_cluster_spec
    yield "submitter", job.spec.submitter_pod_template
    yield "head", cluster.head_group_spec.template
    for group in cluster.worker_group_specs:
        yield group.group_name, group.template


def _pod_problems(name: str, template: Yaml) -> list[str]:
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    found = _core_problems(pod, f"{name}: ")
    if found:
        return found
    for container in template["spec"]["containers"]:
        limits = container.get("resources", {}).get("limits", {})
        found += [f"{name}: {container['name']}: no limit of {key}" for key in ("cpu", "memory") if key not in limits]
    return found


def _core_problems(document: Yaml, prefix: str) -> list[str]:
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{prefix}{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def _version_problems(job: RayJob) -> list[str]:
    """Ray refuses a client of another version, so the image, the manifest and the lock must agree."""
    locked = re.search(r"^ray==(\S+)", LOCK.read_text(), re.MULTILINE)
    assert locked, "the lock has no ray"
    version, declared = locked[1], job.spec.ray_cluster_spec.ray_version
    found = [] if declared == version else [f"rayVersion {declared}: requirements.lock has {version}"]
    images = {container["image"] for _, template in _templates(job) for container in template["spec"]["containers"]}
    wrong = sorted(image for image in images if not image.endswith(f"ray{version}"))
    return found + [f"image {image}: its tag does not end in ray{version}" for image in wrong]


def _secrets(value: Any, place: str = "") -> Iterator[str]:
    """Values that belong into a Secret object, which is made from the command line and never in a file."""
    if isinstance(value, dict):
        if value.get("kind") == "Secret":
            yield f"{place or 'document'}: a Secret in a file"
        if SECRET_NAME.search(str(value.get("name", ""))) and "value" in value:
            yield f"{place}: {value['name']} has its value in the manifest; take it from a Secret"
        for key, inner in value.items():
            yield from _secrets(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _secrets(inner, f"{place}.{index}")
    elif isinstance(value, str) and SECRET_URL.search(value):
        yield f"{place}: an address with a password"


def crd_problems(document: Yaml, definition: Yaml) -> list[str]:
    """What KubeRay's own definition says about a RayJob."""
    version = next(one for one in definition["spec"]["versions"] if one["name"] == "v1")
    schema = _closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    errors = jsonschema.Draft7Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in errors]


def _closed(schema: Any) -> Any:
    """The schema as JSON Schema, without a place for unknown keys."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: value if key in ("enum", "default") else _closed(value) for key, value in schema.items()}
    if found.get("x-kubernetes-int-or-string") is True:
        found = {"type": ["integer", "string"]}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        found.setdefault("additionalProperties", found.get("x-kubernetes-preserve-unknown-fields", False))
    return found


def main(
    files: Annotated[list[Path] | None, typer.Argument(help="Manifests; those beside this file by default.")] = None,
    crd: Annotated[Path | None, typer.Option(help="KubeRay's definition of RayJob: ray.io_rayjobs.yaml.")] = None,
) -> None:
    """Check Kubernetes manifests without a cluster."""
    definition, sound = yaml.safe_load(crd.read_text()) if crd else None, True
    for file in files or sorted(HERE.glob("*.yaml")):
        for document in filter(None, yaml.safe_load_all(file.read_text())):
            found = problems(document)
            if definition and document.get("kind") == "RayJob":
                found += crd_problems(document, definition)
            for line in found or ["sound"]:
                typer.echo(f"{file.name}: {document.get('kind')}: {line}")
            sound = sound and not found
    sys.exit(0 if sound else 2)


if __name__ == "__main__":
    typer.run(main)
