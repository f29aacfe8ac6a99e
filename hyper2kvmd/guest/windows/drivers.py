"""The drivers for Windows that the setting fix.virtio_win names: a directory or an ISO in the layout of virtio-win.

Such as `viostor/2k22/amd64/viostor.inf`: the driver, the family of Windows, the architecture. Nothing of it comes with
hyper2kvmd. A package is taken whole, for exactly the family that the guest is of, or not at all.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from hyper2kvmd.errors import Code, Collected, Finding, MigrationError
from hyper2kvmd.files import explained, remedy
from hyper2kvmd.guest.windows.inf import Inf, InfError, Service, parse
from hyper2kvmd.guest.windows.iso import Iso, IsoError, Node
from hyper2kvmd.guest.windows.program import architecture
from hyper2kvmd.settings.model import VIRTIO_WIN
from hyper2kvmd.text import plain, size

FIELD = "fix.virtio_win"
FILE_LIMIT = 64 << 20
NAMES_SHOWN = 6

Signature = Literal["attested", "test-signed", "unknown"]


@dataclass(frozen=True)
class Family:
    """The newest Windows that a directory is for, to see whether what is there is for any: its build and its type of
    product. signed: from which build of virtio-win on who signed is known, and how.
    """

    build: int
    product_type: int
    signed: tuple[int, Signature] | None = None


_ATTESTED: tuple[int, Signature] = (204, "attested")
_TEST_SIGNED: tuple[int, Signature] = (186, "test-signed")
FAMILIES = {
    "2k8": Family(6003, 3),
    "w7": Family(7601, 1),
    "2k8R2": Family(7601, 3),
    "w8": Family(9200, 1, _TEST_SIGNED),
    "2k12": Family(9200, 3, _TEST_SIGNED),
    "w8.1": Family(9600, 1, _TEST_SIGNED),
    "2k12R2": Family(9600, 3, _TEST_SIGNED),
    "w10": Family(19045, 1, _ATTESTED),
    "2k16": Family(14393, 3, _ATTESTED),
    "2k19": Family(17763, 3, _ATTESTED),
    "2k22": Family(20348, 3, _ATTESTED),
    "w11": Family(26100, 1, _ATTESTED),
    "2k25": Family(26100, 3, _ATTESTED),
}
# The directory for each architecture of a guest.
_ARCHS = {"x86_64": "amd64", "i386": "x86", "aarch64": "ARM64"}

_GET = "Name a whole virtio-win: the directory of the package, or the ISO"


@dataclass(frozen=True)
class Package:
    """A driver for one Windows, whole.

    path: its directory, for people. models: the install section for each device id, in upper case. files: the `.inf`,
    the catalog and all that the `.inf` names, by their names, with their bytes; sha256: the hash of each.
    """

    driver: str
    family: str
    arch: str
    path: str
    inf_name: str
    inf: Inf
    models: Mapping[str, str]
    service: Service
    files: Mapping[str, bytes]
    sha256: Mapping[str, str]
    signature: Signature

    @property
    def sys_name(self) -> str:
        """The name of the service's program among the files."""
        return next(name for name in self.files if name.lower() == self.service.file.lower())


class _Place(Protocol):
    """Where drivers are: directories by their path from the top, "" for that. All raise OSError and IsoError."""

    def children(self, path: str) -> Mapping[str, bool]:
        """The names in a directory, and whether each is a directory; none if there is no such directory."""
        ...

    def read(self, path: str) -> bytes:
        """A file of a directory that children() told of."""
        ...


class _Directory:
    def __init__(self, path: Path) -> None:
        self._path = path

    def children(self, path: str) -> Mapping[str, bool]:
        try:
            with os.scandir(self._path / path) as entries:
                return {entry.name: entry.is_dir() for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def read(self, path: str) -> bytes:
        with _open(self._path / path) as file:
            return file.read(FILE_LIMIT + 1)


class _Image:
    def __init__(self, file: BinaryIO) -> None:
        self._iso = Iso(file)
        self._known: dict[str, dict[str, Node]] = {}

    def _of(self, path: str) -> dict[str, Node]:
        if path not in self._known:
            node = self._iso.root
            if path:
                above, _, name = path.rpartition("/")
                node = self._of(above).get(name, Node(0, 0, False))
            self._known[path] = self._iso.children(node) if node.directory else {}
        return self._known[path]

    def children(self, path: str) -> Mapping[str, bool]:
        return {name: node.directory for name, node in self._of(path).items()}

    def read(self, path: str) -> bytes:
        above, _, name = path.rpartition("/")
        node = self._of(above)[name]
        return self._iso.read(Node(node.sector, min(node.size, FILE_LIMIT + 1), False))


class Catalogue:
    """The drivers in a directory or an ISO. Each file is read once."""

    def __init__(self, path: Path, place: _Place) -> None:
        self.path = path
        self._place = place
        self._read: dict[str, bytes] = {}
        self._packages: dict[tuple[str | int, ...], Package | None] = {}

    @classmethod
    @contextmanager
    def open(cls, path: Path | None) -> Iterator[Catalogue | None]:
        """The drivers that the setting names; None for null, and where the default is not there.

        A directory may be that of the RPM, which has them further down. Raise MigrationError (drivers_unusable).
        """
        opened = cls._opened(path) if path is not None else None
        if opened is None:
            yield None
            return
        path, file = opened
        with file or nullcontext():
            yield cls._of(path, file)

    @staticmethod
    def _opened(path: Path) -> tuple[Path, BinaryIO | None] | None:
        """Where the drivers are, and the file if that is an ISO; None where nothing needs to be."""
        try:
            if path == VIRTIO_WIN and not path.exists():
                return None
            for inner in (path, path / "drivers/by-driver", path / "virtio-win.iso"):
                if (inner / "viostor").is_dir() or inner.is_file():
                    path = inner
                    break
            return path, None if path.is_dir() else _open(path)
        except OSError as error:
            raise _unreadable(path, error) from None

    @classmethod
    def _of(cls, path: Path, file: BinaryIO | None) -> Catalogue:
        try:
            catalogue = cls(path, _Directory(path) if file is None else _Image(file))
        except (OSError, IsoError) as error:
            raise _unreadable(path, error) from None
        if catalogue._spelt("", "viostor") is None:
            names = ", ".join(plain(name, 30) for name in catalogue._names("")[:NAMES_SHOWN])
            raise MigrationError(
                Code.DRIVERS_UNUSABLE,
                f"{path} is not a virtio-win: there is no viostor in it, but {names or 'nothing'}",
                f"{_GET} (virtio-win.iso), in {FIELD}.",
                field=FIELD,
            )
        return catalogue

    def find(self, driver: str, family: str, arch: str, build: int, product_type: int) -> Package | None:
        """A driver such as viostor, vioserial or NetKVM for just this Windows; None if there is none.

        family: as the directory is called. arch: x86_64, i386 or aarch64. product_type: as Windows has it, 1 for a
        workstation. Raise MigrationError (drivers_unusable) for a package that is there, and damaged or mixed up.
        """
        asked = (driver, family, arch, build, product_type)
        if asked not in self._packages:
            self._packages[asked] = self._find(*asked)
        return self._packages[asked]

    def _find(self, driver: str, family: str, arch: str, build: int, product_type: int) -> Package | None:
        directory = self._directory(driver, family, arch)
        if directory is None:
            return None
        inf_name = self._inf_name(driver, directory)
        try:
            inf = parse(self._bytes(f"{directory}/{inf_name}"))
            models = inf.models(arch, build, product_type)
            if not models:
                return None
            services = {inf.service(install) for install in models.values()}
            names = [inf.catalog(arch), *inf.sources(arch)]
            copied = {name.lower() for install in models.values() for name in inf.copied(install)}
            number = inf.version.number
        except InfError as error:
            raise self._unusable(f"{directory}/{inf_name} cannot be used: {plain(str(error), 200)}") from None
        service = services.pop()
        if service is None or services:
            raise self._unusable(f"{directory}/{inf_name} does not install one service for all its devices")
        if service.file.lower() not in copied:
            raise self._unusable(f"{directory}/{inf_name} does not install {plain(service.file)}, which it starts")
        if not names[0]:
            raise self._unusable(f"{directory}/{inf_name} has no catalog: nobody signed it")
        files = {inf_name: self._bytes(f"{directory}/{inf_name}")}
        for name in (service.file, *names):
            spelt = self._spelt(directory, name)
            if spelt is None:
                raise self._unusable(f"{directory}/{inf_name} names {plain(name)}, which is not there")
            files[spelt] = self._bytes(f"{directory}/{spelt}")
        package = Package(
            driver=driver,
            family=family,
            arch=arch,
            path=f"{self.path}/{directory}",
            inf_name=inf_name,
            inf=inf,
            models=models,
            service=service,
            files=files,
            sha256={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
            signature=_signature(family, number),
        )
        self._check_machine(package, directory)
        return package

    def lacking(self, driver: str, family: str, arch: str, build: int) -> Finding:
        """Why find() had nothing: a warning for a person, code no_driver."""
        directory = self._directory(driver, family, arch)
        if directory is not None:
            return Finding(
                "no_driver",
                f"{self.path}/{directory} is not for build {build} of Windows, as its .inf says",
                f"Name an older or a newer virtio-win in {FIELD}.",
                FIELD,
            )
        wanted = f"{family}/{_ARCHS[arch]}"
        there = ", ".join(f for f in FAMILIES if self._directory(driver, f, arch)) or "none"
        return Finding(
            "no_driver",
            f"{self.path} has no {driver} for this Windows ({wanted}); families that it has: {there}",
            f"Name a virtio-win that has {driver}/{wanted} in {FIELD}.",
            FIELD,
        )

    def coverage(self, noted: Collected) -> dict[str, str]:
        """What there is for each family, in words: `yes`, `test-signed only`, …; what is unusable goes to `noted`.

        What is not for amd64 has its architecture behind the family: `w10/x86`.
        """
        words = {}
        for family, newest in FAMILIES.items():
            for arch, directory in _ARCHS.items():
                if self._directory("viostor", family, arch) is None:
                    continue
                name = family if arch == "x86_64" else f"{family}/{directory}"
                words[name] = "unusable"
                with noted:
                    found = [
                        self.find(driver, family, arch, newest.build, newest.product_type)
                        for driver in ("viostor", "NetKVM")
                    ]
                    words[name] = _words(*found)
        return words

    def _inf_name(self, driver: str, directory: str) -> str:
        """The name of a package's `.inf`: that of the driver, or else the only one, as vioserial has vioser.inf."""
        infs = [name for name in self._names(directory) if name.lower().endswith(".inf")]
        named = [name for name in infs if name.lower() == f"{driver.lower()}.inf"]
        if len(named or infs) != 1:
            raise self._unusable(f"{directory} has {'several' if infs else 'no'} .inf, and none of the driver's name")
        return (named or infs)[0]

    def _directory(self, driver: str, family: str, arch: str) -> str | None:
        """The path of a driver's directory from the top, as it is spelt there."""
        path = ""
        for part in (driver, family, _ARCHS[arch]):
            spelt = self._spelt(path, part)
            if spelt is None:
                return None
            path = f"{path}/{spelt}" if path else spelt
        return path

    def _spelt(self, directory: str, name: str) -> str | None:
        """How a name in a directory is spelt; case does not matter to Windows."""
        return next((known for known in self._names(directory) if known.lower() == name.lower()), None)

    def _names(self, directory: str) -> list[str]:
        try:
            return sorted(self._place.children(directory))
        except (OSError, IsoError) as error:
            raise _unreadable(self.path, error) from None

    def _bytes(self, path: str) -> bytes:
        if path not in self._read:
            try:
                data = self._place.read(path)
            except (OSError, IsoError) as error:
                raise _unreadable(self.path, error) from None
            if len(data) > FILE_LIMIT:
                raise self._unusable(f"{path} is larger than {size(FILE_LIMIT)}")
            self._read[path] = data
        return self._read[path]

    def _check_machine(self, package: Package, directory: str) -> None:
        """The program must be one for the architecture."""
        data = package.files[package.sys_name]
        path = f"{directory}/{package.sys_name}"
        found = architecture(lambda offset, count: data[offset : offset + count])
        if found == "unknown":
            raise self._unusable(f"{path} is not a program of Windows, or for no processor that is known")
        if found != package.arch:
            raise self._unusable(f"{path} is for {_ARCHS[found]}")

    def _unusable(self, what: str) -> MigrationError:
        return MigrationError(
            Code.DRIVERS_UNUSABLE,
            f"{self.path}: {what}",
            f"{_GET}, in {FIELD}; copy it again if it was copied.",
            field=FIELD,
        )


def _signature(family: str, number: tuple[int, int, int, int]) -> Signature:
    """Who signed a driver, as far as its family and its number tell. The last part is virtio-win's own, times 100."""
    since = FAMILIES[family].signed if family in FAMILIES else None
    return since[1] if since is not None and number[3] // 100 >= since[0] else "unknown"


def _words(storage: Package | None, network: Package | None) -> str:
    if storage is None:
        return "not for its newest build"
    signed = {"attested": "yes", "test-signed": "test-signed only", "unknown": "signature unknown"}[storage.signature]
    return signed if network is not None else f"{signed}, without NetKVM"


def _open(path: Path) -> BinaryIO:
    """A regular file for reading; no writer of a FIFO is waited for. Raise OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(None, "not a regular file", str(path))
    return os.fdopen(fd, "rb")


def _unreadable(path: Path, error: OSError | IsoError) -> MigrationError:
    if isinstance(error, OSError):
        return MigrationError(
            Code.DRIVERS_UNUSABLE, explained(error, path), f"{remedy(error)}, or change {FIELD}.", field=FIELD
        )
    return MigrationError(
        Code.DRIVERS_UNUSABLE,
        f"{path} cannot be read: {error}",
        f"{_GET} (virtio-win.iso), in {FIELD}; copy it again if it was copied.",
        field=FIELD,
    )
