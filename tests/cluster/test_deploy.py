"""The files of deploy/: fields as documented, and command lines that jaxinfer takes.

The custom resources are held to the fields that they use, by kind and with none besides: a word
that is misspelt, or stands one level too deep, is found here and not by a cluster.
"""

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxinfer import config
from jaxinfer.cli import COMMANDS
from jaxinfer.cli.cluster import PORT, cluster, find_place
from jaxinfer.cluster.place import devices_each
from jaxinfer.v1 import inference_pb2

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
READY = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
LABELS = {str: str}
META = {"name?": str, "labels?": LABELS}
PROBE = {
    "grpc": {"port": int, "service?": str},
    "periodSeconds": int,
    "failureThreshold?": int,
}
CONTAINER = {
    "name": str,
    "image": str,
    "command?": [str],
    "args": [str],
    "ports?": [{"name": str, "containerPort": int}],
    "readinessProbe?": PROBE,
    "startupProbe?": PROBE,
    "livenessProbe?": PROBE,
    "resources": {"limits": {str: int}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly?": bool}],
}
POD = {
    "restartPolicy?": {"Never"},
    "terminationGracePeriodSeconds": int,
    "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "fsGroup": int},
    "containers": [CONTAINER],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim?": {"claimName": str, "readOnly": bool},
            "secret?": {"secretName": str, "defaultMode": int},
            "emptyDir?": {},
        }
    ],
}
TEMPLATE = {"metadata": META, "spec": POD}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": {"Indexed"},
    "backoffLimit": int,
    "template": TEMPLATE,
}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": META,
    "spec": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}
LEADER_WORKER_SET = {
    "apiVersion": {"leaderworkerset.x-k8s.io/v1"},
    "kind": {"LeaderWorkerSet"},
    "metadata": META,
    "spec": {
        "replicas": int,
        "leaderWorkerTemplate": {
            "size": int,
            "restartPolicy": {"None", "RecreateGroupOnPodRestart"},
            "leaderTemplate": TEMPLATE,
            "workerTemplate": TEMPLATE,
        },
    },
}
SERVICE = {
    "apiVersion": {"v1"},
    "kind": {"Service"},
    "metadata": META,
    "spec": {
        "selector": LABELS,
        "ports": [{"name": str, "port": int, "targetPort": str}],
    },
}
PEER = {"podSelector": {"matchLabels": LABELS}}
POLICY = {
    "apiVersion": {"networking.k8s.io/v1"},
    "kind": {"NetworkPolicy"},
    "metadata": META,
    "spec": {
        "podSelector": {"matchLabels": LABELS},
        "policyTypes": [{"Ingress"}],
        "ingress": [{"from": [PEER], "ports?": [{"protocol": {"TCP"}, "port": int}]}],
    },
}
KINDS = {"jobset": JOBSET, "leaderworkerset": LEADER_WORKER_SET}


def wrong(value: Any, shape: Any, where: str = "") -> list[str]:
    """What of a document is not of its shape: words, kinds, and keys that are missing or new."""
    match shape:
        case set():
            return [] if value in shape else [f"{where} is {value!r}, not of {shape}"]
        case [one]:
            if not isinstance(value, list):
                return [f"{where} is no list"]
            return [w for n, part in enumerate(value) for w in wrong(part, one, f"{where}[{n}]")]
        case dict() if not isinstance(value, dict):
            return [f"{where} is no mapping"]
        case dict() if str in shape:
            return [
                w for key, part in value.items() for w in wrong(part, shape[str], f"{where}.{key}")
            ]
        case dict():
            known = {key.removesuffix("?"): part for key, part in shape.items()}
            needed = {key for key in shape if not key.endswith("?")}
            found = [f"{where}.{key} is missing" for key in sorted(needed - value.keys())]
            found += [f"{where}.{key} is unknown" for key in sorted(value.keys() - known.keys())]
            return found + [
                w
                for key in value.keys() & known.keys()
                for w in wrong(value[key], known[key], f"{where}.{key}")
            ]
        case _:
            return [] if type(value) is shape else [f"{where} is {value!r}, no {shape.__name__}"]


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / f"{name}.yaml").read_text()))


def pods(name):
    """The specs of the leader's pod and of the others'."""
    set_ = documents(name)[0]["spec"]
    if name == "jobset":
        leader, workers = (one["template"]["spec"] for one in set_["replicatedJobs"])
        return leader["template"], workers["template"]
    template = set_["leaderWorkerTemplate"]
    return template["leaderTemplate"], template["workerTemplate"]


def command_of(pod, index=0):
    """The command line of a pod's container, as a shell would make it."""
    (container,) = pod["spec"]["containers"]
    if container.get("command") == ["sh", "-c"]:
        text = container["args"][0].replace("$((JOB_COMPLETION_INDEX + 1))", str(index + 1))
        assert "$" not in text
        words = shlex.split(text)
        assert words[:2] == ["exec", "jaxinfer"]
        return words[2:]
    return [part for word in container["args"] for part in word.split("=", 1)]


def options_of(words):
    """Flags of the command, and the settings that the rest makes."""
    assert words[0] in COMMANDS and len(words) % 2
    flags, sources = {}, []
    for name, value in zip(words[1::2], words[2::2], strict=True):
        match name:
            case "--config":
                sources.append(value)
            case "--set":
                sources.append(value)
            case "--model":
                sources.append(f"model={value}")
            case _ if "." in name:
                sources.append(f"{name}={value}")
            case _:
                flags[name.removeprefix("--")] = value
    assert flags.keys() <= inspect.signature(cluster).parameters.keys()
    return flags, config.load(*sources, environ={})


@pytest.mark.parametrize("name", KINDS)
def test_manifests_have_the_documented_fields_and_no_others(name):
    first, service, policy = documents(name)
    assert wrong(first, KINDS[name]) == []
    assert wrong(service, SERVICE) == []
    assert wrong(policy, POLICY) == []


def test_a_misspelt_field_is_found():
    first = documents("jobset")[0]
    del first["spec"]["network"]["enableDNSHostnames"]
    first["spec"]["network"]["enableDnsHostnames"] = True
    first["spec"]["replicatedJobs"][0]["replicas"] = "1"
    assert sorted(wrong(first, JOBSET)) == [
        ".spec.network.enableDNSHostnames is missing",
        ".spec.network.enableDnsHostnames is unknown",
        ".spec.replicatedJobs[0].replicas is '1', no int",
    ]


@pytest.mark.parametrize("name", KINDS)
def test_pods_of_manifests_are_one_group_that_fits_its_mesh(name):
    leader, worker = (options_of(command_of(pod)) for pod in pods(name))
    assert leader[1].mesh == worker[1].mesh
    assert leader[1].cluster.key_file == worker[1].cluster.key_file == "/secrets/key"
    size = 2 if name == "jobset" else documents(name)[0]["spec"]["leaderWorkerTemplate"]["size"]
    for pod in pods(name):
        limits = pod["spec"]["containers"][0]["resources"]["limits"]
        assert limits == {"nvidia.com/gpu": devices_each(leader[1], size)}
    if name == "jobset":
        places = [
            find_place(None, int(flags["rank"]), int(flags["size"]), flags["leader"])
            for flags, _ in (leader, worker)
        ]
        assert [one.ranks for one in places] == [(0,), (1,)]
        first = documents(name)[0]
        job = first["spec"]["replicatedJobs"][0]["name"]
        host = f"{first['metadata']['name']}-{job}-0-0.{first['metadata']['name']}"
        assert {one.leader for one in places} == {host}


@pytest.mark.parametrize("name", KINDS)
def test_ports_and_probes_are_those_of_the_server(name):
    leader, worker = pods(name)
    (container,) = leader["spec"]["containers"]
    settings = options_of(command_of(leader))[1]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports == {
        "grpc": settings.server.port,
        "log": settings.cluster.port or PORT,
        "jax": settings.cluster.coordinator_port,
    }
    assert container["readinessProbe"]["grpc"] == {"port": ports["grpc"], "service": READY}
    assert container["livenessProbe"]["grpc"] == {"port": ports["grpc"]}
    assert not {"readinessProbe", "livenessProbe"} & worker["spec"]["containers"][0].keys()
    _, service, policy = documents(name)
    labels = leader["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert not service["spec"]["selector"].items() <= worker["metadata"]["labels"].items()
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    strangers = policy["spec"]["ingress"][-1]
    assert [one["port"] for one in strangers["ports"]] == [ports["grpc"]]


def test_the_batch_file_of_slurm_starts_one_process_a_node():
    text = (DEPLOY / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"
    call = text[text.index("srun ") :].replace("\\\n", " ")
    call = re.sub(r"\$\{(\w+):.[^}]*\}", r"\1", call)
    words = shlex.split(call)
    words = words[words.index("jaxinfer") + 1 :]
    flags, settings = options_of(words)
    assert flags == {} and settings.cluster.key_file == "KEY_FILE"
    size = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    assert devices_each(settings, size) == int(asked["gpus-per-node"])


def test_envoy_asks_for_the_health_that_servers_tell():
    found = yaml.safe_load((DEPLOY / "envoy.yaml").read_text())["static_resources"]
    (replicas,) = found["clusters"]
    (check,) = replicas["health_checks"]
    assert check["grpc_health_check"]["service_name"] == READY
    (listener,) = found["listeners"]
    (link,) = listener["filter_chains"][0]["filters"]
    (host,) = link["typed_config"]["route_config"]["virtual_hosts"]
    (route,) = host["routes"]
    assert route["route"]["cluster"] == replicas["name"]
    assert route["route"]["timeout"] == "0s"  # of a whole stream; the default ends it after 15 s


def test_the_container_has_all_that_it_copies_and_runs_as_nobody():
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert all((ROOT / one).exists() for one in copied)
    assert {"pyproject.toml", "constraints.txt", "jaxinfer", "configs"} <= set(copied)
    user = next(line.split()[1] for line in lines if line.startswith("USER "))
    for name in KINDS:
        for pod in pods(name):
            assert pod["spec"]["securityContext"]["runAsUser"] == int(user)
    assert 'ENTRYPOINT ["jaxinfer"]' in lines
    cache = next(line.split("=")[1] for line in lines if line.startswith("ENV JAXINFER_CACHE_DIR"))
    made = lines.index(f'    && install -d -o {user} -g {user} "$JAXINFER_CACHE_DIR"')
    assert made < lines.index(f"VOLUME {cache}")  # or the folder is root's, and nothing is kept
