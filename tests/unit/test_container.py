"""The container recipe and its two examples agree with each other and with the program."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from hyper2kvmd import __version__
from hyper2kvmd.options import DEFAULT_PATH
from hyper2kvmd.settings import Settings, load

ROOT = Path(__file__).parents[2]
FILES = ROOT / "packaging/container"
RECIPE = re.sub(r"\\\n\s*", "", (FILES / "Containerfile").read_text())
QUADLET = (FILES / "hyper2kvmd.container").read_text()
UNIT = (ROOT / "systemd/hyper2kvmd.service").read_text()
DOCUMENTS = {one["kind"]: one for one in yaml.safe_load_all((FILES / "kubernetes.yaml").read_text())}
POD: dict[str, Any] = DOCUMENTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def instruction(name: str) -> str:
    """The last instruction of a kind in the Containerfile, without its name."""
    found: str = re.findall(rf"(?m)^{name} (.*)$", RECIPE)[-1]
    return found


def directories() -> set[str]:
    """Where the program reads and writes, as the settings are by default."""
    settings = Settings()
    return {str(settings.exports_dir), str(settings.output_dir), "/var/lib/hyper2kvmd", "/var/cache/hyper2kvmd"}


def test_the_image_has_the_environment_of_the_unit() -> None:
    assert f"Environment={instruction('ENV')}\n" in UNIT
    assert "umask 0077;" in instruction("ENTRYPOINT")
    assert "UMask=0077\n" in UNIT
    assert "USER hyper2kvm\n" in RECIPE


def test_podman_ends_and_starts_it_as_systemd_does_without_it() -> None:
    for line in re.findall(
        r"(?m)^(?:Restart|RestartSec|RestartPreventExitStatus|SuccessExitStatus|RestartForceExitStatus|TimeoutStopSec)=.*$",
        UNIT,
    ):
        assert f"{line}\n" in QUADLET
    assert {"/tmp", "/var/tmp"} == set(re.findall(r"(?m)^Tmpfs=(.*)$", QUADLET))


def test_what_the_program_writes_to_is_a_volume_in_both_examples() -> None:
    podman = {line.split(":")[1] for line in re.findall(r"(?m)^Volume=(.*)$", QUADLET)}
    kubernetes = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert set() == directories() - podman
    assert set() == directories() - kubernetes
    assert {"/tmp", "/var/tmp"} < kubernetes, "its root is read-only"
    volumes = {volume["name"] for volume in POD["volumes"]}
    assert set() == {mount["name"] for mount in CONTAINER["volumeMounts"]} - volumes


def test_the_pods_numbers_are_those_of_the_image() -> None:
    numbers = {name: int(number) for name, number in re.findall(r"(?m)^ARG (\w+_ID)=(\d+)$", RECIPE)}
    security = POD["securityContext"]
    assert numbers["HYPER2KVM_ID"] == security["runAsUser"] == security["runAsGroup"] == security["fsGroup"]
    assert numbers["HYPERSDK_ID"] == security["supplementalGroups"][0]
    assert CONTAINER["image"].endswith(f":{__version__}")


def test_the_pods_settings_are_settings(tmp_path: Path) -> None:
    (mount,) = (mount for mount in CONTAINER["volumeMounts"] if mount["name"] == "settings")
    assert (str(DEFAULT_PATH), DEFAULT_PATH.name) == (mount["mountPath"], mount["subPath"])
    file = tmp_path / DEFAULT_PATH.name
    file.write_text(DOCUMENTS["ConfigMap"]["data"][DEFAULT_PATH.name])
    settings = load(file)
    memory = int(CONTAINER["resources"]["limits"]["memory"].removesuffix("Gi")) * 1024
    assert memory > settings.workers * settings.guest.memory_mb


def test_everybody_asks_for_health_in_the_same_way() -> None:
    image = json.loads(instruction("HEALTHCHECK").partition(" CMD ")[2])
    assert f"http://{Settings().metrics.listen}/healthz" in image[-1]
    assert image == CONTAINER["livenessProbe"]["exec"]["command"]
    assert [*image[:-1], image[-1].replace("healthz", "readyz")] == CONTAINER["readinessProbe"]["exec"]["command"]
