"""What holds of every container that the files of this project start, whatever starts it."""

import re
from typing import Any

# What a worker writes: models from the hub, tokenizers, measured costs, and what lasts as long as it does.
WRITTEN = {
    "/models",
    "/home/mmtad/.cache/mmtad/tokenizers",
    "/home/mmtad/.cache/mmtad/costs",
    "/tmp",
}


def check_service(service: dict[str, Any]) -> None:
    """Of a compose file."""
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert all(re.match(r"127\.0\.0\.1:", port) for port in service.get("ports", []))


def check_pod(spec: dict[str, Any]) -> None:
    """Of a Kubernetes manifest; it has one container."""
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    own = container["securityContext"]
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}


def check_decoding_pod(spec: dict[str, Any]) -> None:
    """Of a pod that has a worker: under its read-only root every folder that a worker writes is a volume."""
    check_pod(spec)
    (container,) = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    writable = {
        mount["mountPath"]
        for mount in container["volumeMounts"]
        if "emptyDir" in volumes[mount["name"]] and not mount.get("readOnly")
    }
    assert writable == WRITTEN
