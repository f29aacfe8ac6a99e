"""What whoever starts a job asks for: values here, options of `hyper2kvmd run-job` in between."""

from __future__ import annotations

from dataclasses import dataclass

from hyper2kvmd.manifest import wire
from hyper2kvmd.queue.asked import Asked


@dataclass(frozen=True)
class Request:
    """One request for a migration.

    asked: what a person wants beyond the settings, which is kept for every later attempt; None for what was asked the
    last time. dry_run: leave everything as it was. if_ready: do nothing unless the export is queued, as the daemon saw
    it; a person's word goes at any time. died: how the last runner died, if the daemon knows.
    submitted_by: the host whose daemon had an engine start it, and planned: the digest of the plan that it saw.
    """

    asked: Asked | None = None
    dry_run: bool = False
    if_ready: bool = False
    died: str = ""
    submitted_by: str | None = None
    planned: str | None = None

    def options(self) -> list[str]:
        """The options of `hyper2kvmd run-job` that say the same."""
        return [
            *(["--as-before"] if self.asked is None else self.asked.options()),
            *(["--dry-run"] if self.dry_run else []),
            *(["--if-ready"] if self.if_ready else []),
            *(["--died", self.died] if self.died else []),
        ]

    @property
    def vm_name(self) -> str | None:
        """What to call the VM, if not as the manifest does."""
        return None if self.asked is None else self.asked.vm_name

    @property
    def _stages(self) -> frozenset[str] | None:
        return None if self.asked is None else self.asked.stages

    def wants(self, stage: str, enabled: bool) -> bool:
        """Whether a stage is to run: if this request names any, those, or else what is `enabled`."""
        return enabled if self._stages is None else stage in self._stages

    def pipeline(self, wishes: wire.Pipeline) -> wire.Pipeline:
        """What goes before the manifest's pipeline: the settings' `wishes`, and the stages that this request names."""
        if self._stages is None:
            return wishes
        stages = {}
        for name, field in wire.Pipeline.model_fields.items():
            table = getattr(wishes, name) or (wire.table(field.annotation) or wire.Wish)()
            stages[name] = table.model_copy(update={"enabled": (field.alias or name) in self._stages})
        return wishes.model_copy(update=stages)

    @property
    def writes(self) -> bool:
        """Whether disks are to be written; if not, the export stays as it was, to be migrated."""
        return not self.dry_run and self.wants("convert", enabled=True)
