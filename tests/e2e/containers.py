"""The container image: built by Podman as its recipe says, and run as the examples for Podman and Kubernetes say."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hyper2kvmd.options import DEFAULT_PATH
from hyper2kvmd.settings.load import DROP_INS, load_settings
from hyper2kvmd.settings.model import Settings
from tests import ROOT
from tests.conftest import disk_entry, report_of, write_manifest
from tests.e2e.conftest import fresh_system
from tests.e2e.container import wait_until
from tests.e2e.test_systemd import SETTINGS

CONTAINERFILE = ROOT / "packaging/container/Containerfile"
QUADLET = ROOT / "packaging/container/hyper2kvmd.container"
KUBERNETES = ROOT / "packaging/container/kubernetes.yaml"
IMAGE = "localhost/hyper2kvmd:latest"
NAME = "hyper2kvmd"
POD = f"{NAME}-0-{NAME}"  # as Podman names its container
SCALARS: dict[str, type] = {"str": str, "int": int, "bool": bool}
HYPER2KVM, HYPERSDK = 791, 790
EXPORTS, IMAGES = "/var/lib/hypersdk/exports", "/var/lib/libvirt/images"
QUADLET_SUITE = "trixie"  # the first whose Podman has it
debian12 = pytest.mark.parametrize("suite", ["bookworm"], indirect=True)

# Podman has all that is its own below $1, in memory, and nothing of what another one on this machine has. The shell is
# the init: it takes leave of what Podman leaves behind, and all ends with it. crun wants control groups of one kind.
_START = """
mount -t tmpfs -o mode=0755 engine "$1"
mount -t tmpfs -o mode=0755 engine /run
mount -t tmpfs -o mode=1777 engine /dev/shm
if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
ip link set lo up
mkdir "$1/tmp"
echo ready
sleep infinity &
wait
"""
# Not every root may raise its limits.
_CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
"""
# Debian's image has much the same.
_DPKG = (
    "force-unsafe-io\npath-exclude /usr/share/doc/*\npath-exclude /usr/share/man/*\npath-exclude /usr/share/locale/*\n"
)


# Podman, in namespaces of its own --------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A Podman that keeps everything in `scratch`. `leader` is the init of its namespaces, by its number outside."""

    leader: int
    scratch: Path

    def path(self, path: str | Path) -> Path:
        """A path below `scratch`, as seen from outside."""
        return Path(f"/proc/{self.leader}/root{self.scratch}", str(path).lstrip("/"))

    def run(self, *argv: str | Path, accept: tuple[int, ...] = (0,), timeout: float = 60) -> str:
        """Run a command in the namespaces, and return what it wrote to standard output."""
        done = subprocess.run(
            ["nsenter", f"--target={self.leader}", "-m", "-n", "-p", "--", *argv],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("LIBGUESTFS_")},
                "CONTAINERS_CONF": f"{self.scratch}/containers.conf",
                "CONTAINERS_STORAGE_CONF": f"{self.scratch}/storage.conf",
                "TMPDIR": f"{self.scratch}/tmp",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        words = " ".join(map(str, argv))
        assert done.returncode in accept, f"{words} exited {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def podman(self, *argv: str | Path, accept: tuple[int, ...] = (0,), timeout: float = 60) -> str:
        """Run Podman, and return what it wrote to standard output."""
        return self.run("podman", *argv, accept=accept, timeout=timeout)

    def inside(self, container: str, *argv: str, accept: tuple[int, ...] = (0,), timeout: float = 60) -> str:
        """Run a command in a container, as people do."""
        return self.podman("exec", container, *argv, accept=accept, timeout=timeout)

    def logs(self, container: str) -> str:
        """What a container has written."""
        return self.run("sh", "-c", f"podman logs {container} 2>&1")

    def ended(self, container: str) -> int:
        """The exit status of a container, once it has ended."""
        return int(self.podman("wait", container))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A Podman that has no image."""
    assert os.geteuid() == 0, "containers are started by root only: run the tests as root"
    scratch = tmp_path_factory.mktemp("engine")
    process = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private", "--net"),
            *("--pid", "--fork", "--kill-child=KILL", "--mount-proc", "bash", "-euc", _START, "bash", scratch),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        assert "ready\n" == process.stdout.readline()
        (leader,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        engine = Engine(int(leader), scratch)
        engine.path("containers.conf").write_text(_CONTAINERS_CONF)
        storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{scratch}/store"\nrunroot = "{scratch}/run"\n'
        engine.path("storage.conf").write_text(storage)
        yield engine
        engine.podman("pod", "rm", "--force", "--all")
        engine.podman("rm", "--force", "--all")
    finally:
        process.kill()
        process.wait()
        for group in Path("/sys/fs/cgroup").glob("*/libpod_parent"):
            with contextlib.suppress(OSError):  # somebody else's Podman has containers in it
                group.rmdir()


@pytest.fixture(scope="module")
def image(engine: Engine, suite: str, package: Path) -> Engine:
    """The engine with the image, built as the recipe says, from the package and what apt has in its cache."""
    system = fresh_system(suite)
    dpkg = engine.path("base/etc/dpkg/dpkg.cfg.d/docker")
    dpkg.parent.mkdir(parents=True)
    dpkg.write_text(_DPKG)
    base = "docker.io/library/debian:12-slim"
    left_out = "--exclude=./var/cache/apt/archives/*.deb --exclude=./var/lib/apt/lists/* --exclude=./usr/share/man/*"
    script = f'tar -c {left_out} -C "$1" . -C "$2" ./etc/dpkg/dpkg.cfg.d/docker | podman import --quiet - "$3"'
    engine.run("bash", "-euo", "pipefail", "-c", script, "bash", system, engine.scratch / "base", base, timeout=120)

    tree = engine.path("tree")
    shutil.copytree(ROOT / "packaging", tree / "packaging")
    (tree / "dist").mkdir()
    shutil.copy(package, tree / "dist")
    cache = ("var/cache/apt/archives", "var/lib/apt/lists")
    (command,) = re.findall(r"`?(podman build .*?)`?$", CONTAINERFILE.read_text(), re.MULTILINE)
    *words, dot = shlex.split(command)
    assert ["podman", "."] == [words.pop(0), dot]
    engine.podman(
        *words,
        *("--quiet", "--pull=never", "--layers=false", "--isolation=chroot"),
        *(f"--volume={system / directory}:/{directory}:O" for directory in cache),
        engine.scratch / "tree",
        timeout=400,
    )
    return engine


def drop_into(exports: Path, name: str, mode: int) -> Path:
    """Drop an export with one small disk, as the exporter's user."""
    directory = exports / f".{name}"
    directory.mkdir()
    disk = directory / f"{name}-disk-0.raw"
    disk.write_bytes(os.urandom(1 << 20))
    entry = disk_entry(disk, local_path=disk.name)
    write_manifest(directory, [entry], source={"provider": "vsphere", "vm_id": "vm-1", "vm_name": name})
    for path in (directory, *directory.iterdir()):
        os.chown(path, HYPERSDK, HYPERSDK)
    directory.chmod(mode)
    return directory.rename(exports / name)


def report(export: Path) -> dict[str, Any]:
    """The report of an export, once it is there."""
    wait_until((export / "migration-report.json").exists, f"{export.name} has a report")
    return report_of(export)


def is_same(export: Path, image: Path) -> bool:
    """Whether the result holds what the export's disk holds."""
    source = export / f"{export.name}-disk-0.raw"
    compare = ("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, image)
    return 0 == subprocess.run(compare, check=False, capture_output=True).returncode


# As the quadlet says ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The service that Podman 5 makes of the quadlet: from its keys to their values."""
    directory = tmp_path_factory.mktemp("quadlet")
    system = fresh_system(QUADLET_SUITE)
    (directory / "units").mkdir()
    shutil.copy(QUADLET, directory / "units")
    # As that release has it, over this machine's way to the network.
    apt = {"Etc::sourcelist": system / "etc/apt/sources.list", "Etc::sourceparts": "-"}
    apt |= {"State::Lists": system / "var/lib/apt/lists", "Cache": directory}
    options = ["--option=APT::Sandbox::User=root", *(f"--option=Dir::{name}={value}" for name, value in apt.items())]
    unpack = (
        'apt-get -qq "$@" download podman && dpkg-deb --fsys-tarfile podman_*.deb | tar -x ./usr/libexec/podman/quadlet'
    )
    subprocess.run(["bash", "-euo", "pipefail", "-c", unpack, "bash", *options], cwd=directory, check=True)
    done = subprocess.run(
        [directory / "usr/libexec/podman/quadlet", "-dryrun"],
        env={"QUADLET_UNIT_DIRS": str(directory / "units")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    keys: dict[str, list[str]] = {}
    for key, value in re.findall(r"(?m)^(\w+)=(.*)$", done.stdout):
        keys.setdefault(key, []).append(value)
    return keys


@pytest.fixture(scope="module")
def start(image: Engine, unit: dict[str, list[str]]) -> Callable[[], None]:
    """A function that starts the container as the quadlet's service does, the host's directories below `scratch`."""
    for path, owner, mode in (
        ("/etc/hyper2kvmd", 0, 0o755),
        ("/run/libvirt", 0, 0o755),
        (EXPORTS, HYPERSDK, 0o2770),
        (IMAGES, HYPER2KVM, 0o711),
        ("/var/lib/hyper2kvmd", HYPER2KVM, 0o700),
    ):
        directory = image.path(path)
        directory.mkdir(parents=True)
        os.chown(directory, owner, owner)
        directory.chmod(mode)
    image.path("/etc/hyper2kvmd/hyper2kvmd.yaml").write_text(yaml.safe_dump(SETTINGS))
    (command,) = unit["ExecStart"]
    words = shlex.split(re.sub(r" -v /", f" -v {image.scratch}/", command))
    assert ["/usr/bin/podman", "run"] == words[:2]
    # What ties it to systemd, which is not here.
    ours = [word for word in words[1:] if not re.match(r"--(rm|cidfile|cgroups|sdnotify)\b", word)]

    def start() -> None:
        image.podman(*ours)
        wait_until(lambda: "watching" in image.logs(NAME), "it is up")

    return start


@pytest.fixture
def running(image: Engine, start: Callable[[], None]) -> Iterator[Engine]:
    """The engine with the container started."""
    start()
    yield image
    print(image.logs(NAME))  # shown by pytest if the test failed


@debian12
def test_the_image_holds_no_leftovers(image: Engine) -> None:
    find = ("run", "--rm", "--entrypoint=find", IMAGE)
    assert "" == image.podman(*find, "/tmp", "/var/lib/apt/lists", "-mindepth", "1")
    assert "" == image.podman(*find, "/boot", "-name", "initrd*")


@debian12
def test_the_image_checks_settings(image: Engine) -> None:
    found = json.loads(image.podman("run", "--rm", IMAGE, "check-config", "--set", "workers=3"))
    assert (3, EXPORTS) == (found["workers"], found["exports_dir"])


@debian12
def test_it_runs_as_its_user_with_one_capability_on_a_root_that_cannot_be_written(running: Engine) -> None:
    assert (
        "791 790 hyper2kvm hypersdk" == running.inside(NAME, "sh", "-c", "echo $(id -u; id -g; id -un; id -gn)").strip()
    )
    status = dict(line.split(":\t") for line in running.inside(NAME, "cat", "/proc/1/status").splitlines())
    fowner = f"{1 << 3:016x}"
    assert [fowner, fowner, "1", "2"] == [status[key] for key in ("CapBnd", "CapEff", "NoNewPrivs", "Seccomp")]
    running.inside(NAME, "touch", "/usr/bin/other", accept=(1,))


@debian12
@pytest.mark.parametrize("mode", [0o2770, 0o755], ids=oct)
def test_an_export_is_migrated(running: Engine, mode: int) -> None:
    export = drop_into(running.path(EXPORTS), f"web{mode:o}", mode)
    document = report(export)
    assert "succeeded" == document["status"], document["error"]
    disk = running.path(IMAGES) / f"{export.name}-disk-0.qcow2"
    assert is_same(export, disk)
    assert (HYPER2KVM, 0o600) == (disk.stat().st_uid, disk.stat().st_mode & 0o777)
    assert export.name in running.inside(NAME, "hyper2kvmctl", "list")


@debian12
def test_the_health_check_tells_yes_from_no(running: Engine) -> None:
    running.podman("healthcheck", "run", NAME)
    assert "ok\n" == running.inside(NAME, "probe", "healthz")
    ready = running.inside(NAME, "probe", "readyz")
    assert set(ready.splitlines()) >= {"exports: ok", "locks: ok", "output: ok", "work: ok"}
    assert "no such page" in running.inside(NAME, "probe", "nothing", accept=(1,))
    running.podman("run", "--rm", "--entrypoint=probe", IMAGE, "healthz", accept=(1,))  # nobody listens


@debian12
def test_no_process_is_left_over_whose_parent_has_died(running: Engine) -> None:
    # Not before it is seen to be an orphan.
    script = "(while [ -e /tmp/orphan ]; do sleep 0.1; done) >/dev/null 2>&1 & echo $!"
    running.inside(NAME, "touch", "/tmp/orphan")
    process = f"/proc/{running.inside(NAME, 'sh', '-c', script).strip()}"
    assert "1" == running.inside(NAME, "cut", "-d ", "-f4", f"{process}/stat").strip()
    running.inside(NAME, "rm", "/tmp/orphan")
    gone = f"test -e {process} || echo gone"
    wait_until(lambda: "gone\n" == running.inside(NAME, "sh", "-c", gone), "the orphan is gone", 10)


@debian12
def test_everything_that_a_migration_needs_is_there(running: Engine) -> None:
    doctor = ("hyper2kvmctl", "doctor", "--json", "--set", "guest.accel=tcg")
    rows = json.loads(running.inside(NAME, *doctor, accept=(0, 1), timeout=240))
    assert {"libguestfs", "programs", "exports", "locks", "output", "work"} < {row["check"] for row in rows}
    no_drivers_for_windows = "windows"
    assert [] == [row for row in rows if row["result"] != "ok" and row["check"] != no_drivers_for_windows]


@debian12
def test_stopped_it_ends_in_order(running: Engine) -> None:
    running.podman("stop", NAME)
    assert 0 == running.ended(NAME)
    assert "stopped; the jobs that ran go on at the next start" in running.logs(NAME)


@debian12
def test_after_sigquit_it_ends_as_the_unit_expects(running: Engine, unit: dict[str, list[str]]) -> None:
    running.podman("kill", "--signal=QUIT", NAME)
    status = running.ended(NAME)
    assert 75 == status
    assert [str(status)] == unit["RestartForceExitStatus"] == unit["SuccessExitStatus"]


@debian12
def test_with_bad_settings_it_ends_as_the_unit_expects(image: Engine, unit: dict[str, list[str]]) -> None:
    image.podman(
        "run", "--rm", IMAGE, "run", "--set", "worker=2", accept=tuple(map(int, unit["RestartPreventExitStatus"]))
    )


# As the file for Kubernetes says ---------------------------------------------------------------------------


def documents() -> dict[str, Any]:
    """The objects of the file, by their kinds."""
    return {document["kind"]: document for document in yaml.safe_load_all(KUBERNETES.read_text())}


def pod() -> dict[str, Any]:
    """What a pod of the file is."""
    spec: dict[str, Any] = documents()["StatefulSet"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def played(image: Engine) -> Iterator[Path]:
    """The pod, as Podman plays it; the directory of its exports. The claims are volumes."""
    stateful, spec = documents()["StatefulSet"], pod()
    spec["containers"][0]["image"] = IMAGE
    for claim in stateful["spec"]["volumeClaimTemplates"]:
        name = claim["metadata"]["name"]
        spec["volumes"].append({"name": name, "persistentVolumeClaim": {"claimName": f"{name}-{NAME}-0"}})
    text = yaml.safe_dump_all(
        [documents()["ConfigMap"], {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"{NAME}-0"}, "spec": spec}]
    )
    image.path("pod.yaml").write_text(text)
    image.podman("play", "kube", "--network=none", image.scratch / "pod.yaml")
    yield image.path("store/volumes")
    print(image.logs(POD))
    image.podman("pod", "rm", "--force", f"{NAME}-0")
    image.podman("volume", "rm", "--all", "--force")


@debian12
def test_a_pod_migrates_an_export_and_stops_in_order(image: Engine, played: Path) -> None:
    wait_until(lambda: "watching" in image.logs(POD), "it is up")
    status = dict(line.split(":\t") for line in image.inside(POD, "cat", "/proc/1/status").splitlines())
    nothing = f"{0:016x}"
    assert [nothing, nothing, "1", "2"] == [status[key] for key in ("CapBnd", "CapEff", "NoNewPrivs", "Seccomp")]
    image.inside(POD, "touch", "/usr/bin/other", accept=(1,))
    for probe in ("livenessProbe", "readinessProbe"):
        image.inside(POD, *pod()["containers"][0][probe]["exec"]["command"])
    export = drop_into(played / "hypersdk-exports/_data", "web01", 0o2770)
    document = report(export)
    assert "succeeded" == document["status"], document["error"]
    assert is_same(export, played / "vm-images/_data/web01-disk-0.qcow2")
    image.podman("pod", "stop", f"{NAME}-0")
    assert 0 == image.ended(POD)


def problems(model: str, value: Any, where: str) -> list[str]:
    """What the Kubernetes API has against a value; `model` is the name of its type in the Python client."""
    models = importlib.import_module("kubernetes.client.models")
    if inner := re.fullmatch(r"list\[(.*)\]", model):
        found = [problems(inner[1], each, f"{where}[{n}]") for n, each in enumerate(value)]
    elif inner := re.fullmatch(r"dict\(str, (.*)\)", model):
        found = [problems(inner[1], each, f"{where}.{key}") for key, each in value.items()]
    elif model in SCALARS:
        found = [[] if type(value) is SCALARS[model] else [f"{where}: {value!r} is not of type {model}"]]
    else:
        kind = getattr(models, model)
        names = {theirs: ours for ours, theirs in kind.attribute_map.items()}
        found = [[f"{where}.{key}: unknown"] for key in value if key not in names]
        known = {names[key]: each for key, each in value.items() if key in names}
        try:
            kind(**known)
        except ValueError as error:  # what is required is not there
            found.append([f"{where}: {error}"])
        found += [problems(kind.openapi_types[ours], each, f"{where}.{ours}") for ours, each in known.items()]
    return [problem for part in found for problem in part]


@pytest.mark.filterwarnings("ignore:urllib3")
def test_the_kubernetes_api_has_nothing_against_the_file() -> None:
    assert {"ConfigMap", "Service", "StatefulSet"} == set(documents())
    for kind, document in documents().items():
        assert [] == problems(f"V1{kind}", document, kind)
    wrong = pod() | {"terminationGracePeriod": 90, "containers": [{"image": 1}]}
    assert ["unknown", "Invalid value for `name`, must not be `None`", "1 is not of type str"] == [
        problem.partition(": ")[2] for problem in problems("V1PodSpec", wrong, "pod")
    ]


def test_the_file_mounts_what_it_has_where_the_settings_have_it(tmp_path: Path) -> None:
    (tmp_path / DROP_INS).mkdir()
    for name, text in documents()["ConfigMap"]["data"].items():
        (tmp_path / DROP_INS / name).write_text(text)
    (tmp_path / "hyper2kvmd.yaml").touch()
    found = load_settings(tmp_path / "hyper2kvmd.yaml")
    container = pod()["containers"][0]
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    assert DEFAULT_PATH.parent / DROP_INS == mounts["settings"]
    assert (found.exports_dir, found.output_dir) == (mounts["exports"], mounts["images"])
    assert mounts["state"] in found.work_dir.parents
    claims = documents()["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert set(mounts) == {volume["name"] for volume in [*pod()["volumes"], *(claim["metadata"] for claim in claims)]}
    # For each worker a GiB for what is around its appliance; Kubernetes counts it all together.
    needed = found.workers * (found.guest.memory_mb + 1024)
    assert needed <= 1024 * int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
    assert str(2 * found.workers) == container["resources"]["requests"]["cpu"]


def test_every_file_has_the_same_numbers_addresses_and_times() -> None:
    recipe = CONTAINERFILE.read_text()
    numbers = {name: int(number) for name, number in re.findall(r"(?m)^ARG (\w+)=(\d+)$", recipe)}
    assert {"DEBIAN": 12, "HYPERSDK": HYPERSDK, "HYPER2KVM": HYPER2KVM} == numbers
    hosts = (ROOT / "docs/hosts.md").read_text()
    assert [str(HYPERSDK), str(HYPER2KVM)] == re.findall(r"(?m)^ *u \w+ (\d+) ", hosts)
    security = pod()["securityContext"]
    assert (HYPER2KVM, HYPERSDK) == (security["runAsUser"], security["runAsGroup"])
    host, _, port = Settings().metrics.listen.partition(":")
    assert f"/dev/tcp/{host}/{port}\n" in (CONTAINERFILE.parent / "probe").read_text()
    service = (ROOT / "systemd/hyper2kvmd.service").read_text()

    def of_service(key: str) -> str:
        (value,) = re.findall(rf"(?m)^{key}=(.*)$", service)
        return str(value)

    assert f"ENV {of_service('Environment')}\n" in recipe
    assert f"umask {of_service('UMask')} " in recipe
    assert of_service("TimeoutStopSec") == str(pod()["terminationGracePeriodSeconds"])
    quadlet = QUADLET.read_text()
    assert f"\nStopTimeout={of_service('TimeoutStopSec')}\n" in quadlet
    for key in ("Restart", "RestartPreventExitStatus", "RestartForceExitStatus", "SuccessExitStatus", "OOMPolicy"):
        assert f"\n{key}={of_service(key)}\n" in quadlet
