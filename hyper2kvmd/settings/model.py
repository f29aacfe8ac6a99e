"""The settings and their defaults: the only place a default is written.

It is long because it is that one document: whoever looks for a setting finds it here, and nowhere else.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hyper2kvmd.domain.model import attachment
from hyper2kvmd.manifest import wire

Seconds = Annotated[float, Field(ge=0)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:+-]*$")]  # as Slurm has names; no comma, no space
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _checked(target: str) -> str:
    attachment(target)
    return target


Network = Annotated[str, AfterValidator(_checked)]
# Where distributions put the drivers for Windows.
VIRTIO_WIN = Path("/usr/share/virtio-win")


_PORT = r"(\d{1,4}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5])"


class Section(BaseModel):
    """A group of settings: immutable, and strict about its keys.

    What describes a section and a key here is also what the shipped file and the manual say of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="after")
    @classmethod
    def _possible(cls, value: Any) -> Any:
        """Refuse a path that no file can have: whatever asked for it would end with an error that nobody expects."""
        for path in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and not str(path).isprintable():
                raise ValueError(f"{str(path)!a} holds characters that do not print; name another one")
        return value


class Watch(Section):
    """How the daemon sees new exports before the next scan, which finds all of them."""

    mode: Literal["auto", "inotify", "poll", "off"] = Field(
        default="auto",
        description="auto: inotify, but poll on network file systems, where other hosts write too. inotify: the kernel"
        " reports changes at once. poll: a scan every ten seconds. off: only the regular scans.",
    )


class Output(Section):
    """The disks that a job writes. A manifest can ask for something else; `pipeline` overrides both."""

    format: Literal["qcow2", "raw"] = Field(default="qcow2", description="Image format of the disks: qcow2 or raw.")
    compress: bool = Field(
        default=False, description="Whether to compress qcow2 disks: they are smaller, but slower to write and to read."
    )
    allowed_dirs: tuple[Path, ...] = Field(
        default=(),
        description="Directories, besides output_dir, that a manifest may ask for. The unit must allow them too"
        " (ReadWritePaths=).",
        examples=[["/srv/fast", "/srv/big"]],
    )


class Convert(Section):
    """How disks are converted."""

    engine: Literal["auto", "qemu-img"] = Field(
        default="auto",
        description="auto: hyper2kvmd reads sparse VMDKs itself, such as the streamOptimized ones of vSphere, once for"
        " the disk and its checksum. A raw disk that becomes raw on the same file system shares its blocks (reflink),"
        " if the file system supports that. qemu-img converts all other disks. qemu-img: it converts every disk.",
    )


class Libvirt(Section):
    """Where and how the job defines the domain."""

    uri: str = Field(default="qemu:///system", description="The libvirt in which domains are defined and booted.")
    import_: bool = Field(
        default=True,
        alias="import",
        description="Whether to define the VM in libvirt. If not, you get only its disks.",
    )
    network_map: dict[str, Network] = Field(
        default_factory=dict,
        description="From each network of the source to the new one: the name of a libvirt network, bridge:NAME, or"
        " ovs:NAME (Open vSwitch), each with @VLAN for a tagged one; or user (QEMU's own NAT, which needs no network of"
        " the host).",
        examples=[{"VM Network": "bridge:br0", "DMZ": "ovs:br1@20"}],
    )
    default_network: Network = Field(default="default", description="The new network for all others, in the same form.")
    pool: str | None = Field(
        default=None,
        description="The storage pool of output_dir. It must exist and be active, and is refreshed for each new disk."
        " null: any pool of that directory is refreshed.",
    )
    autostart: bool = Field(
        default=False,
        description="Whether the domain starts with the host. Off, because the source VM has the same addresses.",
    )
    start: bool = Field(
        default=False, description="Whether to start the domain after it is defined. Off for the same reason."
    )

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Guest(Section):
    """The libguestfs appliance: a small VM that inspects and fixes guests."""

    accel: Literal["auto", "kvm", "tcg"] = Field(
        default="auto",
        description="auto: KVM if it works, else emulation. kvm: only KVM; without it, the daemon retries the job"
        " later. tcg: always emulation, several times slower.",
    )
    memory_mb: int = Field(
        default=1280, ge=512, description="Memory of the appliance, in MiB. With luks_keys it gets more."
    )


class Fix(Section):
    """How guests are fixed, and what happens to guests that cannot be fixed."""

    allow_unsupported: bool = Field(
        default=False,
        description="Whether to convert a guest that cannot be fixed, with SATA and e1000e instead of virtio. If not,"
        " its job is blocked.",
    )
    luks_keys: dict[str, Path] = Field(
        default_factory=dict,
        description="Passphrases of encrypted guests: from the VM's name, or the UUID of a LUKS container, to a file"
        " that only the service's user can read.",
        examples=[{"web01": "/etc/hyper2kvmd/keys/web01"}],
    )
    serial_console: bool = Field(
        default=False,
        description="Whether the guest's kernel also writes to the first serial port, for `virsh console`.",
    )
    virtio_win: Path | None = Field(
        default=VIRTIO_WIN,
        description="The drivers for Windows: a directory or an ISO in the layout of virtio-win. The default may be"
        " missing. null: none.",
    )


class Validate(Section):
    """How the job checks its result, besides `qemu-img check`."""

    require_checksums: bool = Field(
        default=False,
        description="Whether every disk must have a checksum in the manifest. Without it, the job is blocked.",
    )
    compare: bool = Field(
        default=False,
        description="Whether to compare every byte of the result with the source and the fix. Reads both once more.",
    )
    test_boot: bool = Field(
        default=False,
        description="Whether to boot the result before the job succeeds: on a throw-away copy, without a network. A"
        " manifest can ask for it too.",
    )
    boot_seconds: float = Field(
        default=300,
        ge=1,
        le=7200,
        description="Time that a guest may take to boot on KVM, in seconds; under emulation four times that.",
    )
    boot_memory_mb: int = Field(
        default=2048, ge=128, description="The most memory that a guest gets in the boot test, in MiB."
    )
    boot_failure: Literal["fail", "warn"] = Field(
        default="fail",
        description="fail: if the guest does not boot, its job fails. warn: the job publishes it with a warning.",
    )


class Retry(Section):
    """How the daemon retries jobs whose cause passes by itself, such as a libvirt that does not answer."""

    max_attempts: int = Field(
        default=5,
        ge=1,
        description="The number of attempts in all. Attempts that wait for space or memory do not count.",
    )
    delay_seconds: Seconds = Field(
        default=60, description="Wait before the second attempt, in seconds; doubles with each one after it."
    )
    max_delay_seconds: Seconds = Field(default=3600, description="The longest wait, in seconds.")

    def delay(self, attempt: int) -> float:
        """Seconds to wait after attempt number `attempt` (counted from 1): doubles, up to the maximum."""
        return min(self.delay_seconds * 2.0 ** min(attempt - 1, 32), self.max_delay_seconds)


class StageSeconds(Section):
    """How long each stage may take, in seconds, before the daemon stops the job and retries it. These limits are far
    above what a stage needs: they end one that hangs.
    """

    plan: Seconds = Field(default=1800, description="Check all that can be known before the copy.")
    verify: Seconds = Field(default=172800, description="Compute the checksums of the exported disks.")
    inspect: Seconds = Field(default=3600, description="Find out what the guest is.")
    fix: Seconds = Field(default=14400, description="Change the guest, on an overlay.")
    convert: Seconds = Field(default=172800, description="Convert the disks.")
    commit: Seconds = Field(default=14400, description="Write the changes to the converted disks.")
    validate_: Seconds = Field(default=172800, alias="validate", description="Check the converted disks.")
    boot: Seconds = Field(default=36000, description="The boot test.")
    publish: Seconds = Field(default=3600, description="Flush the disks, and give them their names.")
    hook: Seconds = Field(default=3600, description="Run all hooks before the import.")
    import_: Seconds = Field(default=1800, alias="import", description="Define the domain.")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Limits(Section):
    """How much time and which share of the host one job may use."""

    stage_seconds: StageSeconds = StageSeconds()
    no_progress_seconds: Seconds = Field(
        default=7200,
        description="If a checksum, conversion, commit or comparison makes no progress for so many seconds, the daemon"
        " stops the job and retries it. The tools report each hundredth of a disk, so this must be longer than that"
        " takes. Other work has only its limit in stage_seconds.",
    )
    nice: int = Field(
        default=10, ge=0, le=19, description="CPU priority of jobs on the host: 0 (normal) to 19 (lowest)."
    )
    io_class: Literal["none", "best-effort", "idle"] = Field(
        default="best-effort",
        description="Priority of their disk accesses. none: normal. best-effort: the lowest of the normal ones. idle:"
        " only when nothing else uses the disk.",
    )


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{path} is not an absolute path; write one such as /etc/hyper2kvmd/report-key")
    return path


class Reports(Section):
    """The reports; docs/evidence.md has how they are signed and verified."""

    sign_key: Annotated[Path, AfterValidator(_absolute)] | None = Field(
        default=None,
        description="An SSH private key without a passphrase, for the service's user alone: it signs every report. null"
        " for none. The reports then have the digests of the published disks, for which each is read once more.",
    )


class Retention(Section):
    """What is kept of finished jobs. `hyper2kvmctl prune` removes the rest, and so does the daemon, every hour."""

    work_days: int = Field(
        default=7,
        ge=0,
        description="Days to keep unfinished disks in output_dir, and files in work_dir, whose export is not in"
        " exports_dir.",
    )
    log_days: int = Field(default=30, ge=0, description="Days to keep the log of a finished job.")
    old_reports: int = Field(default=10, ge=0, description="Number of reports of earlier runs to keep for each export.")


def _possible(choice: object) -> object:
    if choice in ("RequestClientCert", "RequireAnyClientCert"):
        raise ValueError(
            f"{choice} asks clients for certificates and then does not verify them, which Python's TLS cannot do;"
            " set RequireAndVerifyClientCert, or VerifyClientCertIfGiven to let in those without one"
        )
    return choice


class TlsServer(Section):
    """TLS for the address, with the keys and values of the Prometheus exporter toolkit. A path that is not absolute
    names a credential of systemd (LoadCredential=). `systemctl reload` loads renewed files.
    """

    cert_file: Path | None = Field(
        default=None,
        description="The server's certificate, in PEM, with the intermediate ones. Without it, there is no TLS.",
    )
    key_file: Path | None = Field(
        default=None,
        description="Its private key, in PEM, without a passphrase. The service's user must be able to read it.",
    )
    client_auth_type: Annotated[
        Literal["NoClientCert", "VerifyClientCertIfGiven", "RequireAndVerifyClientCert"], BeforeValidator(_possible)
    ] = Field(
        default="NoClientCert",
        description="NoClientCert: everybody may read. VerifyClientCertIfGiven: the same, but if a client has a"
        " certificate, it must be valid. RequireAndVerifyClientCert: only clients with a certificate that"
        " client_ca_file signed.",
    )
    client_ca_file: Path | None = Field(
        default=None, description="Certificates of the authorities that sign those of clients, in PEM."
    )
    min_version: Literal["TLS12", "TLS13"] = Field(default="TLS12", description="The oldest version of TLS.")

    @model_validator(mode="after")
    def _complete(self) -> TlsServer:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together: set both, or neither")
        if (self.client_ca_file is None) != (self.client_auth_type == "NoClientCert"):
            raise ValueError(
                "client_ca_file belongs to a client_auth_type that verifies: set client_ca_file and"
                " RequireAndVerifyClientCert, or neither"
            )
        if self.client_ca_file is not None and self.cert_file is None:
            raise ValueError("client_ca_file needs TLS: set cert_file and key_file, too")
        return self


class Metrics(Section):
    """The address of metrics for Prometheus (/metrics), of whether the daemon works (/healthz, /readyz), and of a page
    for people (/).
    """

    listen: str = Field(
        default="127.0.0.1:9878",
        pattern=rf"^(|[^:]+:{_PORT}|\[[0-9a-fA-F:]+\]:{_PORT})$",
        description='ADDRESS:PORT, or [IPV6-ADDRESS]:PORT; "" for none. If other hosts can reach it, it needs TLS.',
    )
    allow_insecure: bool = Field(
        default=False,
        description="Whether other hosts may connect without TLS: they can read the names of VMs.",
    )
    page: bool = Field(
        default=False,
        description="Whether / is a page for people with all VMs: their states, why they wait, and the notes of their"
        " plans. Whoever can read the metrics can read it.",
    )
    tls_server_config: TlsServer = TlsServer()

    @model_validator(mode="after")
    def _closed(self) -> Metrics:
        host = self.listen.rpartition(":")[0].strip("[]")
        if host and not _is_loopback(host) and self.tls_server_config.cert_file is None and not self.allow_insecure:
            raise ValueError(
                f"metrics.listen is {self.listen}, which other hosts can reach, and there is no TLS: set"
                " metrics.tls_server_config, or listen on 127.0.0.1, or set metrics.allow_insecure to true"
            )
        if self.page and not host:
            raise ValueError("metrics.page is true, and metrics.listen is empty: set an address, or no page")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_problem(url: str, *, allow_insecure: bool) -> tuple[str, str] | None:
    """What is wrong with the URL of a receiver, and the remedy; None if it is good. Its path may be a secret."""
    good = "write one such as https://chat.example.com/hooks/TOKEN"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "the URL has no host, or a port that is none", good
    if not re.fullmatch(r"[\x21-\x7e]+", url):
        return "the URL holds a space, or what is not ASCII", "write %XX for each such byte, and xn-- names of hosts"
    if parts.scheme not in ("https", "http") or not host:
        return "the URL is not one of https", good
    if parts.username is not None or parts.password is not None:
        return "the URL holds a user or a password", "take them out, and give an Authorization header by a credential"
    if parts.fragment or len(host) > 253 or not all(0 < len(label) < 64 for label in host.rstrip(".").split(".")):
        return "the URL has a # or a name of a host that cannot be one", good
    if parts.scheme == "http" and not allow_insecure and not _is_loopback(host):
        return (
            f"http://{host} would be sent everything unencrypted",
            "use https, or set allow_insecure beside it to true",
        )
    return None


Credential = Annotated[str, Field(pattern=r"^(/.*|[A-Za-z0-9][A-Za-z0-9._-]*)$")]


Ends = tuple[Literal["succeeded", "failed", "blocked", "rejected", "cancelled", "cutover"], ...]


class Receiver(Section):
    """An address that is called by HTTP.

    A credential is a file that systemd hands over, by its name (LoadCredential=), or one with an absolute path; others
    must not be able to read it.
    """

    url: str | None = Field(
        default=None,
        description="The URL to call; null for none. Plain http only to this host. One that is a secret, as that of a"
        " chat is, belongs into url_credential.",
    )
    url_credential: Credential | None = Field(default=None, description="The credential that holds the URL instead.")
    headers_credential: Credential | None = Field(
        default=None,
        description="The credential that holds headers to be sent, one `Header-Name: value` to a line.",
    )
    ca_file: Path | None = Field(
        default=None,
        description="Certificates of the authorities that may sign the receiver's, in PEM; null: those of the system.",
    )
    timeout_seconds: float = Field(default=30, ge=1, le=300, description="How long one attempt may take, in all.")
    allow_insecure: bool = Field(
        default=False,
        description="Whether the URL may be one of plain http to another host: everybody in between reads.",
    )

    @model_validator(mode="after")
    def _good(self) -> Receiver:
        # Of a kind of their own, with which the values, which may be secret, are not shown.
        if self.url is not None and self.url_credential is not None:
            raise PydanticCustomError("secret", "url and url_credential are both set; delete one of them")
        if self.url is not None and (problem := url_problem(self.url, allow_insecure=self.allow_insecure)):
            raise PydanticCustomError("secret", "{text}", {"text": f"url: {problem[0]}; {problem[1]}"})
        return self

    @property
    def is_set(self) -> bool:
        """Whether there is a receiver."""
        return self.url is not None or self.url_credential is not None


class Webhook(Receiver):
    """A message for every job that is over, sent as JSON by HTTP POST; docs/notify.md has its form.

    A credential is a file that systemd hands over, by its name (LoadCredential=), or one with an absolute path; others
    must not be able to read it.
    """

    events: Ends = Field(
        default=("succeeded", "failed", "blocked", "rejected", "cancelled", "cutover"),
        description="Of which ends of jobs there is a message, and whether of cutovers. A job that is retried is not"
        " at its end.",
    )
    max_attempts: int = Field(
        default=30,
        ge=1,
        description="After so many attempts, a message is given up. They are as far apart as those at jobs (`retry`):"
        " 30 take about a day.",
    )


class Apprise(Section):
    """A message for every job that is over, to mail and to chats, by the library apprise (`apt install apprise`)."""

    urls_credential: Credential | None = Field(
        default=None,
        description="The credential that holds the services, one URL of apprise to a line, such as"
        " `mailtos://USER:PASSWORD@example.com`; null for none.",
    )
    events: Ends = Field(
        default=("succeeded", "failed", "blocked", "rejected", "cancelled", "cutover"),
        description="Of which ends of jobs there is a message, and whether of cutovers.",
    )
    timeout_seconds: float = Field(
        default=60, ge=1, le=300, description="How long one attempt at one service may take."
    )
    max_attempts: int = Field(default=30, ge=1, description="After so many attempts, a message is given up.")


class Heartbeat(Receiver):
    """A URL that is called (GET) while all is well: a service such as healthchecks.io raises the alarm when no call
    comes. All is well while /healthz and /readyz say so.
    """

    interval_seconds: float = Field(default=300, ge=10, le=86400, description="How often it is called.")


class Notify(Section):
    """Who gets a message of finished jobs, and of a daemon that works."""

    webhook: Webhook = Webhook()
    apprise: Apprise = Apprise()
    heartbeat: Heartbeat = Heartbeat()


class Hooks(Section):
    """Programs to run before a domain is defined and after a job is over, with the report on standard input;
    docs/notify.md has the details.
    """

    directory: Path = Field(
        default=Path("/etc/hyper2kvmd/hooks.d"),
        description="Their directory, with pre-import/ and post-job/. They run in the order of their names.",
    )
    timeout_seconds: float = Field(
        default=300, ge=1, le=86400, description="Seconds that one may take before it is killed."
    )


class Ovf(Section):
    """Exports that hypersdk did not make: an OVF descriptor and its disks, from ovftool, govc or the vSphere client;
    docs/ovf.md says what is accepted.
    """

    accept: bool = Field(
        default=False,
        description="Whether a directory in exports_dir with one .ovf, or one .ova, and no manifest is an export. It is"
        " taken when every file that the .ovf names is there and settled.",
    )


class Hypersdk(Section):
    """The queue of hypersdk's exporters, and the directory where they wait for the answer; docs/hypersdk.md says how to
    set up both sides.
    """

    queue_dir: Path | None = Field(
        default=None,
        description="The directory into which exporters copy manifests, such as /var/lib/hyper2kvm/queue; null: none."
        " The daemon takes each manifest out at once.",
    )
    output_dir: Path | None = Field(
        default=None,
        description="The directory for the answers, such as /var/lib/hyper2kvm/output: VM.qcow2, a link to the boot"
        " disk, or VM.error. Set both, or neither.",
    )
    allowed_dirs: tuple[Path, ...] = Field(
        default=(),
        description="Directories, besides exports_dir, whose directories become exports when a manifest in the queue"
        " names their disks. The unit must allow them too (ReadWritePaths=).",
        examples=[["/srv/exports"]],
    )

    @model_validator(mode="after")
    def _complete(self) -> Hypersdk:
        if (self.queue_dir is None) != (self.output_dir is None):
            raise ValueError("queue_dir and output_dir belong together: set both, or neither")
        return self


class Slurm(Section):
    """What each job requests from Slurm; docs/hosts.md has a matching cluster."""

    partition: Word | None = Field(default=None, description="The partition; null for the cluster's default.")
    account: Word | None = Field(default=None, description="The account to charge; null for the user's default.")
    qos: Word | None = Field(default=None, description="The quality of service; null for the default.")
    features: tuple[Word, ...] = Field(
        default=(),
        description="Features (--constraint) that every host must have. With guest.accel kvm, jobs also request the"
        " feature kvm.",
        examples=[["site-a"]],
    )
    licenses: tuple[Word, ...] = Field(
        default=(),
        description="Licences that every job takes, as NAME:COUNT. They limit how many jobs read from one file server.",
        examples=[["filer1:1"]],
    )


PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


class DispatchCommand(Section):
    """Programs that act as an engine, each as a list of words, without a shell. A name in braces is replaced by its
    value; the word {words} is replaced by all words of the program to run.
    """

    submit: tuple[str, ...] = Field(
        default=(),
        description="Takes one job, prints its identifier as its last line, and ends at once. Of {name}, {log}, {cpus},"
        " {memory_mb}, {scratch_mb}, {priority}, {features}, {licenses} and {exclude}, the last three are joined by"
        " commas, and may be empty. It must run {words} somewhere, with its output at the end of the file {log}. Status"
        " 2: it refuses this job, which is then blocked. Any other status but 0: not now.",
        examples=[["/usr/local/bin/h2k-submit", "{name}", "{log}", "{exclude}", "{words}"]],
    )
    list: tuple[str, ...] = Field(
        default=(),
        description="Prints a line for each unfinished job: identifier, name, and `running` with its host or"
        " `waiting` with the reason, if known.",
        examples=[["/usr/local/bin/h2k-list"]],
    )
    cancel: tuple[str, ...] = Field(
        default=(),
        description="Cancels the job {id} if it waits. If it waits no longer, that is no error.",
        examples=[["/usr/local/bin/h2k-cancel", "{id}"]],
    )

    @property
    def is_set(self) -> bool:
        """Whether all three are there."""
        return bool(self.submit and self.list and self.cancel)

    @field_validator("submit", "list", "cancel")
    @classmethod
    def _words(cls, words: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known, needed = DISPATCH_PLACEHOLDERS[str(info.field_name)]
        for word in words:
            if "\0" in word:
                raise ValueError(f"{word!a} holds a null character, which no word can have")
            for name in PLACEHOLDER.findall(word):
                if name not in known:
                    names = ", ".join(f"{{{each}}}" for each in known) or "none"
                    raise ValueError(f"{{{name}}} in {word!r} is not known; known are: {names}")
            if "{words}" in word and word != "{words}":
                raise ValueError(f"{word!r}: {{words}} becomes several words, and has to be one by itself")
        if words and needed and not any(f"{{{needed}}}" in word for word in words):
            raise ValueError(f"without {{{needed}}} it cannot know {needed}; add it")
        return words


# The placeholders that each of those commands may have, and the one that it cannot do without.
DISPATCH_PLACEHOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "submit": (
        ("name", "log", "cpus", "memory_mb", "scratch_mb", "priority", "features", "licenses", "exclude", "words"),
        "words",
    ),
    "list": ((), ""),
    "cancel": (("id",), "id"),
}


class Dispatch(Section):
    """What decides on which host a job runs; docs/hosts.md compares the choices."""

    engine: Literal["local", "slurm", "command"] = Field(
        default="local",
        description="local: this daemon runs jobs on its own host, `workers` at a time. slurm: it submits every job"
        " to Slurm, which runs it on one of its nodes. command: the same, with your own programs.",
    )
    max_submitted: int = Field(
        default=100,
        ge=1,
        le=10000,
        description="The most jobs in the engine, waiting and running. The others wait in exports_dir.",
    )
    program: tuple[str, ...] = Field(
        default=("hyper2kvmd",),
        min_length=1,
        description="The program on the nodes. It reads their own settings files.",
    )
    cpus: int = Field(default=2, ge=1, le=1024, description="CPUs that a job requests.")
    memory_mb: int = Field(
        default=1024,
        ge=0,
        description="Memory that a job requests besides that of its appliance (guest.memory_mb), in MiB.",
    )
    scratch_mb: int = Field(
        default=0,
        ge=0,
        description="Space in work_dir that a job requests, in MiB; 0 for none. Slurm gets it as --tmp, and its nodes"
        " must have it (TmpDisk).",
    )
    timeout_seconds: float = Field(
        default=30, ge=1, le=600, description="Seconds that a command of the engine may take."
    )
    slurm: Slurm = Slurm()
    command: DispatchCommand = DispatchCommand()

    @model_validator(mode="after")
    def _complete(self) -> Dispatch:
        if self.engine == "command" and not self.command.is_set:
            raise ValueError("engine: command needs all of dispatch.command.submit, .list and .cancel; set them")
        return self


class Accept(Section):
    """Which exports this host accepts, if several hosts share exports_dir and each takes exports itself
    (`dispatch.engine: local`). `hyper2kvmctl list` shows why no host accepts an export.
    """

    largest_disk_gib: float | None = Field(
        default=None, gt=0, description="The largest file of an export, in GiB; null for no limit."
    )
    free_gib: float = Field(
        default=0,
        ge=0,
        description="GiB that must stay free in output_dir after the disks are written, if they are as large as the"
        " exported ones.",
    )
    kvm: bool = Field(default=False, description="Whether this host accepts nothing while KVM does not work on it.")
    tags: dict[str, str] = Field(
        default_factory=dict,
        description="Only exports whose manifests have all these tags. In a value, * stands for anything.",
        examples=[{"site": "berlin"}],
    )


class Rule(Section):
    """Settings for some VMs. A rule without `vm` and without `tags` is for all VMs."""

    vm: tuple[str, ...] = Field(
        default=(), description="Names of VMs, or of directories of exports; * stands for anything."
    )
    tags: dict[str, str] = Field(
        default_factory=dict, description="Tags that the manifest must have, all of them; * as above."
    )
    features: tuple[Word, ...] = Field(
        default=(), description="Features that a host must have, besides dispatch.slurm.features."
    )
    licenses: tuple[Word, ...] = Field(default=(), description="Licences, besides dispatch.slurm.licenses.")
    priority: int | None = Field(
        default=None, ge=-1000, le=1000, description="Jobs with a higher number start first; the others have 0."
    )
    libvirt_uri: str | None = Field(default=None, description="The libvirt for the domain, instead of libvirt.uri.")


def _time(value: object) -> object:
    """A time; without an offset, it is one of this host's clock."""
    try:
        time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError("expected a time such as 2026-12-05 20:00, or 2026-12-05 20:00+01:00") from None
    return time.astimezone() if time.tzinfo is None else time


Time = Annotated[datetime, BeforeValidator(_time)]


class Wave(Section):
    """The window of time in which the VMs of a wave may be migrated."""

    not_before: Time | None = Field(
        default=None, description="No job starts before this time, such as `2026-12-05 20:00` by this host's clock."
    )
    not_after: Time | None = Field(
        default=None,
        description="No job starts that would end later than this, by its estimate. A running job continues.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Wave:
        if self.not_before is not None and self.not_after is not None and self.not_after <= self.not_before:
            raise ValueError("not_after must be later than not_before")
        return self


class Vm(Section):
    """The virtual hardware of a VM, instead of what it had. For the plan of one VM, and for `hyper2kvmctl migrate
    --set`. In the settings file it is for every VM.
    """

    cpus: int | None = Field(default=None, ge=1, le=4096, description="Virtual CPUs; null: as many as it had.")
    memory_mb: int | None = Field(default=None, ge=16, description="Memory, in MiB; null: as much as it had.")
    networks: tuple[Network | None, ...] = Field(
        default=(),
        description="The networks of its cards, in their order, each in the form of `libvirt.default_network`. For"
        " null, `libvirt.network_map` decides.",
        examples=[["bridge:br0", None]],
    )
    mac: Literal["keep", "new"] = Field(
        default="keep",
        description="keep: the cards keep their MAC addresses. new: they get new ones. If the guest knows a card by its"
        " old address, its job is blocked.",
    )


class Log(Section):
    """What is logged."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least important messages to log: debug, info, warning or error."
    )


class Settings(Section):
    """Everything that can be configured, at its default; docs/settings.md says what each key does."""

    exports_dir: Path = Field(
        default=Path("/var/lib/hypersdk/exports"),
        description="The directory for exports, with one directory for each VM. Jobs change nothing in them: they add a"
        " lock file, a log and the report.",
    )
    output_dir: Path = Field(
        default=Path("/var/lib/libvirt/images"), description="The directory for the converted disks."
    )
    work_dir: Path = Field(
        default=Path("/var/lib/hyper2kvmd/work"),
        description="The directory in which a job keeps its overlays and the record of its finished steps, until it is"
        " over.",
    )
    manifest_names: tuple[FileName, ...] = Field(
        default=("manifest.json", "artifact-manifest.json", "manifest.yaml", "manifest.yml"),
        description="File names of manifests. The first one that exists counts.",
    )
    workers: int = Field(
        default=2,
        ge=1,
        le=256,
        description="Jobs at the same time. Each needs guest.memory_mb for its appliance, and about two cores.",
    )
    settle_seconds: Seconds = Field(
        default=5, description="A job starts when manifest and disks have not changed for so many seconds."
    )
    incomplete_grace_seconds: Seconds = Field(
        default=600,
        description="After so many seconds, an incomplete manifest or a missing disk is an error.",
    )
    scan_interval_seconds: float = Field(
        default=30,
        ge=0.1,
        le=3600,
        description="Seconds between two scans of all exports, with any `watch`.",
    )
    watch: Watch = Watch()
    output: Output = Output()
    pipeline: wire.Pipeline = Field(
        default=wire.Pipeline(),
        description="Overrides the `pipeline` of all manifests, with the same keys; null leaves it to the manifests.",
        examples=[{"convert": {"compression": True}, "validate": {"test_boot": True}}],
    )
    convert: Convert = Convert()
    libvirt: Libvirt = Libvirt()
    guest: Guest = Guest()
    fix: Fix = Fix()
    validate_: Validate = Field(default=Validate(), alias="validate")
    retry: Retry = Retry()
    limits: Limits = Limits()
    report: Reports = Reports()
    retention: Retention = Retention()
    cleanup_source: bool = Field(
        default=False,
        description="Whether to delete the exported disks after the migration. The manifest and the report stay.",
    )
    metrics: Metrics = Metrics()
    notify: Notify = Notify()
    hooks: Hooks = Hooks()
    ovf: Ovf = Ovf()
    hypersdk: Hypersdk = Hypersdk()
    accept: Accept = Accept()
    rules: tuple[Rule, ...] = Field(
        default=(),
        description="Settings for some VMs. If several rules match, the last one with a key counts, and features and"
        " licences add up. vm and tags say for which VMs a rule is (patterns, such as web*; all must match). features,"
        " licenses and priority say how an engine places their jobs (see dispatch). libvirt_uri says where their"
        " domains are defined.",
        examples=[[{"tags": {"site": "berlin"}, "features": ["berlin"], "licenses": ["filer1:1"], "priority": 10}]],
    )
    dispatch: Dispatch = Dispatch()
    vm: Vm = Vm()
    plan_dir: Path = Field(
        default=Path("/etc/hyper2kvmd/plan.d"),
        description="Where the plans of single VMs are: NAME.yaml, by the name of the export's directory. Several hosts"
        " need the same files: put the directory on shared storage.",
    )
    waves: dict[str, Wave] = Field(
        default_factory=dict,
        description="When the waves of a campaign may run, by their names. The plan of a VM says to which wave it"
        " belongs.",
        examples=[{"1": {"not_before": "2026-12-05 20:00", "not_after": "2026-12-06 06:00"}}],
    )
    log: Log = Log()

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @field_validator("hypersdk")
    @classmethod
    def _apart(cls, hypersdk: Hypersdk, info: ValidationInfo) -> Hypersdk:
        # A manifest in the queue must not look like an export, nor an answer like a disk.
        others: dict[str, Path] = {
            key: info.data[key] for key in ("exports_dir", "work_dir", "output_dir") if key in info.data
        }
        for key, directory in (("queue_dir", hypersdk.queue_dir), ("output_dir", hypersdk.output_dir)):
            if directory is None:
                continue
            for other, place in others.items():
                nested = directory in place.parents or place in directory.parents
                if directory == place or (nested and other != "output_dir"):
                    raise ValueError(
                        f"hypersdk.{key} ({directory}) and {other} ({place}) must not be the same, nor one in the"
                        f" other: set hypersdk.{key} to a directory of its own"
                    )
            others[f"hypersdk.{key}"] = directory
        return hypersdk
