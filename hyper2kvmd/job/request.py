"""What whoever starts a job asks for, besides the settings: values here, options of `hyper2kvmd run-job` in between."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One request for a migration.

    stages: those to run, of events.CHOICES; None for what the manifest enables. vm_name: what to call the VM, if not
    as the manifest does. dry_run: leave everything as it was. if_ready: do nothing unless the export is queued, as
    the daemon saw it; a person's word goes at any time. died: how the last runner died, if the daemon knows.
    """

    stages: frozenset[str] | None = None
    vm_name: str | None = None
    dry_run: bool = False
    if_ready: bool = False
    died: str = ""

    def options(self) -> list[str]:
        """The options of `hyper2kvmd run-job` that say the same."""
        return [
            *(["--dry-run"] if self.dry_run else []),
            *(["--stages", ",".join(sorted(self.stages))] if self.stages is not None else []),
            *(["--name", self.vm_name] if self.vm_name is not None else []),
            *(["--if-ready"] if self.if_ready else []),
            *(["--died", self.died] if self.died else []),
        ]

    def wants(self, stage: str, enabled: bool) -> bool:
        """Whether a stage is to run, by the manifest (`enabled`) and by this request."""
        return enabled and (self.stages is None or stage in self.stages)
