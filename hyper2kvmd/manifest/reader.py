"""Reads an Artifact Manifest of either dialect, and says all that is wrong with it at once."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hyper2kvmd.errors import Code, Finding
from hyper2kvmd.manifest import document, model, wire
from hyper2kvmd.manifest.problems import PROBLEM_LIMIT, ManifestError, invalid, place
from hyper2kvmd.text import nearest, show

# Only the Go library writes these; where it writes a stage, it leaves out what is false, zero or empty.
_GO_FIX = {"backup", "print_fstab", "update_grub", "regen_initramfs", "fstab_mode", "remove_vmware_tools"}
_GO_STAGE = {
    "inspect": {"collect_guest_info"},
    "fix": _GO_FIX,
    "convert": {"compress", "compress_level"},
    "validate": {"check_image_integrity"},
}
# One wish, in the words of the Go exporter and in those of the guide.
_TWINS = (
    ("convert", "compress", "compression"),
    ("fix", "update_grub", "fix_grub"),
    ("fix", "regen_initramfs", "regenerate_initramfs"),
)
# What a manifest can ask for that is not done: the stage, the key and its value, what is so instead, and the remedy.
_ALWAYS = "Leave it out; to look into no disk, set pipeline.inspect.enabled and pipeline.fix.enabled to false."
_NOT_DONE = (
    ("inspect", "detect_os", False, "INSPECT finds out the operating system in any case", _ALWAYS),
    ("inspect", "detect_kernel", False, "INSPECT looks at the kernels in any case", _ALWAYS),
    ("inspect", "collect_guest_info", False, "INSPECT reports what it found in any case", _ALWAYS),
    (
        *("validate", "check_image_integrity", False),
        "VALIDATE checks the disks that were written in any case",
        "Leave it out, or set pipeline.validate.enabled to false.",
    ),
)
_OS_HINTS = {"linux", "windows", "unknown", "debian", "ubuntu", "rhel", "centos", "rocky", "almalinux"} | {
    *("oracle", "fedora", "amazon", "sles", "suse", "opensuse", "photon", "alpine", "arch", "freebsd")
}


def parse(data: bytes, name: str, pipeline: wire.Pipeline | None = None, vm_name: str | None = None) -> model.Manifest:
    """Read a manifest: JSON if the file's `name` ends in .json, YAML otherwise.

    What `pipeline` says, in the keys of either dialect, goes before what the manifest says; so does `vm_name`.
    Raise ManifestError, which holds every problem that was found, for anything that is not a usable
    Artifact Manifest 1.0.
    """
    content = document.load(data, name)
    if problem := _foreign(content):
        raise ManifestError(Code.MANIFEST_INVALID, name, [problem])
    if vm_name is not None and isinstance(content.get("source"), dict):
        content["source"]["vm_name"] = vm_name
    problems: list[Finding] = []
    unknown: list[Finding] = []
    try:
        written = wire.Document.model_validate(_known(content, wire.Document, (), unknown))
    except ValidationError as error:
        problems = [_explain(detail) for detail in error.errors(include_url=False)[:PROBLEM_LIMIT]]
    wrong = {problem.field for problem in problems}
    problems += [problem for problem in _contradictions(content) if problem.field not in wrong]
    if problems:
        raise ManifestError(Code.MANIFEST_INVALID, name, problems)
    warnings = [*itertools.islice(_unknown_keys(written), PROBLEM_LIMIT), *unknown][:PROBLEM_LIMIT]
    digest = hashlib.sha256(data).hexdigest()
    return _normalise(written, pipeline or wire.Pipeline(), _dialect(content), digest, warnings)


def _foreign(content: Any) -> Finding | None:
    """What else a file is that is not a manifest at all, so that nobody fixes it field by field."""
    if not isinstance(content, dict):
        found = show(content)
        return invalid(f"not an Artifact Manifest: the file holds {found}, not a table", _EXPORT_AGAIN)
    version = content.get("manifest_version")
    if version is None:
        pipeline = content.get("pipeline")
        load = pipeline.get("load") if isinstance(pipeline, dict) else None
        if isinstance(content.get("vms"), list) or (isinstance(load, dict) and "source_path" in load):
            shape = "it looks like a workflow for hyperctl"
        elif any(key in content for key in ("resource_group", "managed_disk", "disk_name", "vhd_url")):
            shape = "it looks like an Azure export's own manifest"
        elif any(key in content for key in ("project_id", "image_name", "gcs_uri", "zone")):
            shape = "it looks like a Google Cloud export's own manifest"
        else:
            shape = "manifest_version is missing"
        return invalid(f"not an Artifact Manifest: {shape}", _EXPORT_AGAIN, "manifest_version")
    if version not in (wire.VERSION, 1.0) or isinstance(version, bool):
        return invalid(
            f"manifest version {show(version)} is not supported, only {wire.VERSION}",
            f"Export the VM with a hypersdk that writes version {wire.VERSION}, or update hyper2kvmd.",
            "manifest_version",
        )
    return None


_EXPORT_AGAIN = (
    "Export the VM with hypersdk's -manifest option. If this file is not meant to be a manifest,"
    " take its name out of the setting manifest_names."
)


def _explain(detail: ErrorDetails) -> Finding:
    """One of pydantic's errors as a finding."""
    loc = tuple(part for part in detail["loc"] if part != "[key]")
    where, found = place(loc), show(detail["input"])
    expected, keys = _describe(loc)
    kind = detail["type"]
    if kind == "manifest":
        context = detail["ctx"]
        return invalid(context["message"], context["hint"], where)
    if kind == "missing":
        return invalid("missing", f"Add it: it must be {expected}.", where)
    if kind == "extra_forbidden":
        close = nearest(loc[-1], keys)
        hint = f"Did you mean {close}?" if close else f"Delete it. Known here: {', '.join(keys)}."
        return invalid("unknown key", hint, where)
    if kind in ("too_short", "too_long"):
        return invalid(f"{len(detail['input'])} entries", f"It must be {expected}.", where)
    hint = f"It must be {expected}."
    if kind == "literal_error" and (close := nearest(detail["input"], _choices(detail))):
        hint = f"Did you mean {close}? {hint}"
    elif kind == "string_type" and isinstance(detail["input"], int | float | bool):
        hint = f"Put it in quotes. {hint}"
    return invalid(f"{found} is not allowed here", hint, where)


def _choices(detail: ErrorDetails) -> list[str]:
    return [word.strip("', ") for word in detail.get("ctx", {}).get("expected", "").replace(" or ", ",").split(",")]


def _describe(loc: tuple[str | int, ...]) -> tuple[str, list[str]]:
    """What the field at `loc` must be, and the keys of the table that it is in."""
    table: type[BaseModel] | None = wire.Document
    expected, keys = "a table", list[str]()
    for part in loc:
        if isinstance(part, int) or table is None:
            continue
        fields = {field.alias or name: field for name, field in table.model_fields.items()}
        keys = list(fields)
        if part not in fields:
            return expected, keys
        expected = fields[part].description or expected
        table = wire.table(fields[part].annotation)
    return expected, keys


def _contradictions(content: dict[str, Any]) -> Iterator[Finding]:
    """What is wrong between fields. Looks at the raw content, so that it is found beside other problems."""
    for group, key, what in (("disks", "id", "disks"), ("nics", "id", "NICs"), ("nics", "mac", "NICs")):
        rows = content.get(group)
        first: dict[str, int] = {}
        for index, row in enumerate(rows[: wire.ENTRY_LIMIT] if isinstance(rows, list) else ()):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, str) or not value:
                continue
            word = value.lower().replace("-", ":") if key == "mac" else value
            if word in first:
                yield invalid(
                    f"{show(value)} is already the {key} of {group}[{first[word]}]",
                    f"Give the two {what} different ones.",
                    f"{group}[{index}].{key}",
                )
            first.setdefault(word, index)
    for paths in (
        ("vm.secure_boot", "vm.secureboot"),
        ("pipeline.convert.target_format", "output.format"),
        ("pipeline.convert.output_dir", "output.directory"),
        *((f"pipeline.{stage}.{key}", f"pipeline.{stage}.{twin}") for stage, twin, key in _TWINS),
    ):
        one, other = (_get(content, path) for path in paths)
        if one is not None and other is not None and one != other:
            yield invalid(
                f"{show(one)} contradicts {paths[1]}, which is {show(other)}", "Delete one of the two.", paths[0]
            )


def _get(content: Any, path: str) -> Any:
    for key in path.split("."):
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _dialect(content: dict[str, Any]) -> Literal["seed", "go"]:
    if _get(content, "vm.secureboot") is not None or isinstance(_get(content, "metadata.tags"), dict):
        return "go"
    stages = ((_get(content, f"pipeline.{stage}") or {}, keys) for stage, keys in _GO_STAGE.items())
    return "go" if any(keys & stage.keys() for stage, keys in stages) else "seed"


def _normalise(
    written: wire.Document,
    wishes: wire.Pipeline,
    dialect: Literal["seed", "go"],
    sha256: str,
    warnings: list[Finding],
) -> model.Manifest:
    source, output = written.source, written.output or wire.Output()
    metadata, options = written.metadata or wire.Metadata(), written.options or wire.Options()
    report = options.report or wire.Report()
    disks = tuple(
        model.Disk(
            id=disk.id,
            format=disk.source_format,
            bytes=disk.bytes,
            path=disk.local_path,
            sha256=disk.checksum,
            boot_order=disk.boot_order_hint,
            kind=disk.disk_type or "unknown",
            label=disk.label,
        )
        for disk in written.disks
    )
    for index, disk in enumerate(disks):
        if disk.sha256 is None:
            warnings.append(
                Finding(
                    "no_checksum",
                    f"disk {disk.id} has no checksum: a damaged copy of it would not be noticed",
                    "Export with hypersdk's -manifest-checksum option.",
                    f"disks[{index}].checksum",
                )
            )
    if (options.verbose or 0) > 1:
        message = f"the manifest asks for verbosity {options.verbose}, which has no effect"
        warnings.append(
            Finding("not_done", message, "What is logged is said by log.level in the settings.", "options.verbose")
        )
    stages = _stages(written.pipeline, wishes, warnings)
    format_ = stages.convert.format or output.format
    if format_ == "raw" and stages.convert.compress:
        warnings.append(
            Finding(
                "not_compressed",
                "raw disks cannot be compressed",
                "Ask for qcow2 to have it smaller.",
                "pipeline.convert",
            )
        )
    return model.Manifest(
        version=wire.VERSION,
        dialect=dialect,
        sha256=sha256,
        provider=source.provider,
        vm_id=source.vm_id,
        vm_name=source.vm_name,
        datacenter=source.datacenter,
        export_timestamp=source.export_timestamp,
        vm=_vm(written.vm or wire.VM(), warnings),
        disks=disks,
        nics=tuple(
            model.Nic(id=nic.id or f"nic-{index}", mac=nic.mac, network=nic.network or None)
            for index, nic in enumerate(written.nics or ())
        ),
        stages=stages,
        output=model.Output(directory=output.directory, format=output.format, filename=output.filename),
        options=model.Options(
            dry_run=options.dry_run or False,
            verbose=1 if options.verbose is None else options.verbose,
            report_path=None if report.enabled is False else report.path,
        ),
        configuration=_configuration(written.configuration or wire.Configuration(), stages, warnings),
        tags=metadata.tags or {},
        job_id=metadata.job_id,
        hypersdk_version=metadata.hypersdk_version,
        notes=tuple(written.notes or ()),
        exporter_warnings=tuple(
            f"{warned.stage}: {warned.message}" if warned.stage else warned.message for warned in written.warnings or ()
        ),
        warnings=tuple(warnings),
    )


def _vm(vm: wire.VM, warnings: list[Finding]) -> model.VMSpec:
    if vm.os_hint and vm.os_hint.lower() not in _OS_HINTS:
        message = f"{show(vm.os_hint)} is not an operating system that is known here"
        warnings.append(
            Finding("os_hint_unknown", message, "Nothing depends on it: the disks are looked at.", "vm.os_hint")
        )
    return model.VMSpec.model_validate(
        {
            "cpu": vm.cpu or None,
            # The Go exporter divides without remainder, so a VM of less than 1 GiB comes without its memory.
            "memory_mib": round((vm.mem_gb or 0) * 1024) or None,
            "firmware": {"efi": "uefi", "": "unknown", None: "unknown"}.get(vm.firmware, vm.firmware),
            # It never looks for Secure Boot, and leaves out what is false: only its `true` means something.
            "secure_boot": vm.secure_boot if vm.secure_boot is not None else (vm.secureboot or None),
            "os_hint": vm.os_hint or None,
            "os_version": vm.os_version or None,
        }
    )


def _stages(pipeline: wire.Pipeline | None, wishes: wire.Pipeline, warnings: list[Finding]) -> model.Stages:
    """The stages that are wanted: without a pipeline all of them, and with one those that it enables."""
    own, wished = _stage_keys(pipeline or wire.Pipeline()), _stage_keys(wishes)
    if pipeline is None and not all("enabled" in stage for stage in wished.values()):
        message = "the manifest has no pipeline: every stage is run"
        warnings.append(Finding("no_pipeline", message, "Add a pipeline to choose the stages.", "pipeline"))
    on = {"enabled": True} if pipeline is None else {}
    inspect, fix, convert, validate = ({**on, **own[name], **wished[name]} for name in own)
    for name, stage in zip(own, (inspect, fix, convert, validate), strict=True):
        if "enabled" not in stage:
            message = f"the manifest does not enable the stage {name.upper()}: it is not run"
            warnings.append(
                Finding("stage_off", message, 'Write "enabled": true or false.', f"pipeline.{name}.enabled")
            )
    asked = dict(zip(own, (inspect, fix, convert, validate), strict=True))
    for name, key, value, message, hint in _NOT_DONE:
        if asked[name].get(key) is value:
            warnings.append(Finding("not_done", message, hint, f"pipeline.{name}.{key}"))
    if convert.get("compress_level"):
        message = "qemu-img knows no compression levels: compress_level has no effect"
        warnings.append(Finding("no_compress_level", message, "Leave it out.", "pipeline.convert.compress_level"))
    # Where the Go library wrote the stage, a part that is not there was false; elsewhere parts are on.
    silent = not (_GO_FIX & (pipeline.fix.model_fields_set if pipeline and pipeline.fix else set()))
    mode = fix.get("fstab_mode") or "stabilize-all"
    return model.Stages(
        inspect=model.Inspect(enabled=inspect.get("enabled", False)),
        fix=model.Fix(
            enabled=fix.get("enabled", False),
            drivers=fix.get("inject_drivers", True),
            fstab=fix.get("fix_fstab", True) and mode != "noop",
            bootloader=fix.get("fix_grub", silent),
            initramfs=fix.get("regenerate_initramfs", silent),
            backup=fix.get("backup", False),
            print_fstab=fix.get("print_fstab", False),
            fstab_mode=mode,
            remove_vmware_tools=fix.get("remove_vmware_tools", False),
            enable_rdp=fix.get("enable_rdp", False),
        ),
        convert=model.Convert(
            enabled=convert.get("enabled", False),
            format=convert.get("target_format"),
            compress=convert.get("compression"),
            compress_level=convert.get("compress_level") or None,
            output_dir=convert.get("output_dir"),
        ),
        validate_=model.Validate(
            enabled=validate.get("enabled", False),
            verify_checksum=validate.get("verify_checksum", True),
            check=validate.get("check_image_integrity", True),
            test_boot=validate.get("test_boot"),
        ),
    )


def _stage_keys(pipeline: wire.Pipeline) -> dict[str, dict[str, Any]]:
    """What a pipeline says of each stage, in the order in which they are run and in the guide's words."""
    stages = {
        name: {} if stage is None else _given(stage)
        for name, stage in (
            ("inspect", pipeline.inspect),
            ("fix", pipeline.fix),
            ("convert", pipeline.convert),
            ("validate", pipeline.validate_),
        )
    }
    for name, key, called in _TWINS:
        if key in stages[name]:
            stages[name][called] = stages[name].pop(key)
    return stages


def _configuration(written: wire.Configuration, stages: model.Stages, warnings: list[Finding]) -> model.Configuration:
    host, users = written.hostname or wire.Hostname(), written.users or wire.Users()
    services, network = written.services or wire.Services(), written.network or wire.Network()
    configuration = model.Configuration(
        hostname=host.hostname,
        domain=host.domain,
        hosts={address: tuple(names) for address, names in (host.hosts or {}).items()},
        users=tuple(model.User.model_validate(_given(user)) for user in users.users or ()),
        disable_users=tuple(users.disable_users or ()),
        services=model.Services.model_validate(_given(services)),
        interfaces=tuple(model.Interface.model_validate(_given(row)) for row in network.interfaces or ()),
    )
    if configuration != model.Configuration() and not stages.fix.enabled:
        message = "the stage FIX is off, so the guest is not configured"
        warnings.append(Finding("no_configuration", message, "Enable pipeline.fix, or delete it.", "configuration"))
    return configuration


def _given(table: BaseModel) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in table if value is not None}


def _known(content: Any, table: type[BaseModel], path: tuple[str | int, ...], unknown: list[Finding]) -> Any:
    """The content without the keys that no stage knows, which are noted in `unknown`.

    An exporter's update, or a slip of the pen, stops nobody; `validate --strict` does not let them pass.
    """
    if isinstance(content, list):
        return [_known(row, table, (*path, index), unknown) for index, row in enumerate(content)]
    if not isinstance(content, dict):
        return content
    fields = {field.alias or name: field for name, field in table.model_fields.items()}
    known = {}
    for key, value in content.items():
        inner = wire.table(fields[key].annotation) if key in fields else None
        if key not in fields and table.model_config.get("extra") == "forbid":
            if len(unknown) < PROBLEM_LIMIT:
                unknown.append(_unknown_key(key, [*fields], (*path, key)))
        else:
            known[key] = value if inner is None else _known(value, inner, (*path, key), unknown)
    return known


def _unknown_key(key: str, known: list[str], path: tuple[str | int, ...]) -> Finding:
    close = nearest(key, known)
    return Finding(
        "unknown_key", "unknown key", f"Did you mean {close}?" if close else "It has no effect.", place(path)
    )


def _unknown_keys(table: BaseModel, path: tuple[str | int, ...] = ()) -> Iterator[Finding]:
    """A finding for each key that is not part of the contract, in the tables where that is no error."""
    known = [field.alias or name for name, field in type(table).model_fields.items()]
    for key in table.model_extra or ():
        yield _unknown_key(key, known, (*path, key))
    for name, value in table:
        if isinstance(value, BaseModel):
            yield from _unknown_keys(value, (*path, name))
        elif isinstance(value, list):
            for index, row in enumerate(value):
                if isinstance(row, BaseModel):
                    yield from _unknown_keys(row, (*path, name, index))
