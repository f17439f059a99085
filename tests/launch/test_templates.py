"""The scripts are clean; the manifest and the image say what the rest of the repository does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import jsonschema
import pytest
import yaml

from hybrid_rl.cli import read_command_line
from hybrid_rl.config_file import load_config

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = [
    *ROOT.glob("launch/*.sh"),
    ROOT / "launch" / "slurm.sbatch",
    *ROOT.glob(".ci/*"),
    ROOT / "tests" / "run.sh",
]


def pin(package: str, file: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (ROOT / "requirements" / file).read_text(), re.MULTILINE)
    assert found, f"{package} is not in {file}"
    return found[1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_has_nothing_to_say(script: Path):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "--shell=bash", "--external-sources", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string", "minLength": 1}


def fields(required: str, **properties: dict) -> dict:
    """An object of these fields alone."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


def several(item: dict) -> dict:
    return {"type": "array", "minItems": 1, "items": item}


# Of Kubernetes' core/v1 PodSpec and Container, the fields that are used.
COMMAND = fields("exec", exec=fields("command", command=several(TEXT)))
SECRET = fields("secretKeyRef", secretKeyRef=fields("name key", name=TEXT, key=TEXT, optional={"type": "boolean"}))
CONTAINER = fields(
    "name image securityContext resources",
    name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
    image=TEXT,
    env=several(
        {
            **fields(
                "name",
                name={"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
                value={"type": "string"},
                valueFrom=SECRET,
            ),
            "oneOf": [{"required": ["value"]}, {"required": ["valueFrom"]}],
        }
    ),
    securityContext=fields(
        "",
        allowPrivilegeEscalation={"type": "boolean"},
        capabilities=fields("", drop=several(TEXT), add=several(TEXT)),
    ),
    resources=fields(
        "limits", limits={"type": "object", "additionalProperties": {"pattern": r"^\d+(m|[KMGT]i)?$"} | TEXT}
    ),
    readinessProbe={
        **COMMAND,
        "properties": COMMAND["properties"]
        | {name: COUNT for name in ("initialDelaySeconds", "periodSeconds", "timeoutSeconds")},
    },
    lifecycle=fields("", preStop=COMMAND, postStart=COMMAND),
    volumeMounts=several(fields("name mountPath", name=TEXT, mountPath={"type": "string", "pattern": "^/[^:]*$"})),
)
POD = fields(
    "spec",
    spec=fields(
        "containers securityContext",
        restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
        terminationGracePeriodSeconds=COUNT,
        securityContext=fields(
            "",
            runAsNonRoot={"type": "boolean"},
            runAsUser=COUNT,
            runAsGroup=COUNT,
            fsGroup=COUNT,
            seccompProfile=fields("type", type={"enum": ["RuntimeDefault", "Localhost", "Unconfined"]}),
        ),
        containers=several(CONTAINER),
        volumes=several(
            {
                **fields(
                    "name",
                    name=TEXT,
                    persistentVolumeClaim=fields("claimName", claimName=TEXT),
                    emptyDir=fields("", medium={"enum": ["", "Memory"]}, sizeLimit=TEXT),
                ),
                "minProperties": 2,
                "maxProperties": 2,
            }
        ),
    ),
)
GROUP = {"rayStartParams": TEXTS, "template": POD}
RAY_JOB = {
    # Of KubeRay's ray.io/v1 RayJobSpec, RayClusterSpec, HeadGroupSpec and WorkerGroupSpec, the fields that are used.
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["entrypoint", "rayClusterSpec"],
            "properties": {
                "entrypoint": {"type": "string"},
                "backoffLimit": COUNT,
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": COUNT,
                "submitterPodTemplate": POD,
                "rayClusterSpec": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["headGroupSpec"],
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "authOptions": {"type": "object", "properties": {"mode": {"enum": ["disabled", "token"]}}},
                        "headGroupSpec": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": [*GROUP],
                            "properties": GROUP,
                        },
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["groupName", "minReplicas", "maxReplicas", *GROUP],
                                "properties": {
                                    "groupName": {"type": "string"},
                                    "replicas": COUNT,
                                    "minReplicas": COUNT,
                                    "maxReplicas": COUNT,
                                    **GROUP,
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def job() -> dict:
    return yaml.safe_load((ROOT / "launch" / "kuberay" / "rayjob.yaml").read_text())


def pods(job: dict) -> list[dict]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_manifest_is_a_ray_job(job: dict):
    jsonschema.validate(job, RAY_JOB)


def test_the_manifest_is_of_this_version(job: dict):
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pin("ray", "gpu.txt") == pin("ray", "cpu.lock")
    everywhere = [*pods(job), job["spec"]["submitterPodTemplate"]["spec"]]
    assert {pod["containers"][0]["image"] for pod in everywhere} == {f"hybrid-rl:{PROJECT['version']}-gpu"}


def test_what_a_pod_mounts_it_has(job: dict):
    for pod in pods(job):
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert sorted(volumes) == sorted({mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mountPath: /runs", "mountpath: /runs"),
        ("command: [wget", "comand: [wget"),
        ("sizeLimit: 64Gi", "sizelimit: 64Gi"),
        ('cpu: "32"', "cpu: many"),
        ("claimName: hybrid-rl-runs", "claim: hybrid-rl-runs"),
    ],
)
def test_a_misspelt_field_is_noticed(old: str, new: str):
    manifest = (ROOT / "launch" / "kuberay" / "rayjob.yaml").read_text()
    assert old in manifest
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(manifest.replace(old, new)), RAY_JOB)


def test_no_pod_is_root(job: dict):
    for pod in [*pods(job), job["spec"]["submitterPodTemplate"]["spec"]]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


def test_the_manifests_run_fits_its_pods(job: dict):
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[0] == "hybrid-rl"
    options = read_command_line(words[1:])
    assert options.auto_resume
    config = load_config(options.config.replace("/opt/hybrid-rl", str(ROOT)), options.overrides)
    limits = [pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for pod in pods(job)]
    assert config.learner.world_size + config.rollout.engines == sum(map(int, limits))
    for pod in pods(job):
        shared = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert any(Path(config.run.dir or "").is_relative_to(path) for path in shared)


def test_keys_come_from_a_secret(job: dict):
    for pod in pods(job):
        keys = [variable for variable in pod["containers"][0]["env"] if variable["name"].endswith("_KEY")]
        assert keys
        assert all(set(variable) == {"name", "valueFrom"} for variable in keys)


def instructions() -> list[tuple[str, str]]:
    """The image's, comments left out and continued lines joined."""
    lines = (ROOT / "docker" / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def test_the_image_is_pinned_and_not_root():
    found = dict(instructions())
    base = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-\w+", found["FROM"])
    assert base
    assert (int(base[1]), int(base[2])) >= (3, 11)
    assert PROJECT["requires-python"] == ">=3.11"
    assert int(found["USER"]) > 0
    assert "raylet" in found["HEALTHCHECK"]
    assert found["ENTRYPOINT"].endswith('"hybrid-rl"]')


def test_all_that_the_image_needs_is_sent_to_its_build():
    lines = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    sent = [line[1:] for line in lines if line.startswith("!")]
    assert lines[1] == "*", "nothing else is"
    assert all((ROOT / path).exists() for path in sent)
    for word, rest in instructions():
        if word == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                assert source == "." or any(fnmatch(Path(source).parts[0], path) for path in sent), source
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} <= set(sent)
    made = next(rest for word, rest in instructions() if word == "RUN" and "setup.sh" in rest)
    assert all(name.rstrip("*") in made for name in packages), (
        "a package that setup.sh does not find cannot be imported"
    )
