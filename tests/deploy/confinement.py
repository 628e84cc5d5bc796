"""What holds of every container that the files of this project start, whatever starts it."""

import re
from typing import Any


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
