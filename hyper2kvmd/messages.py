"""The kinds of records in the journal: each has an id to search for, and a text for `journalctl -x`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a record is about, as its field H2K_KIND has it."""

    WATCHING = "watching"
    STOPPED = "stopped"
    RETIRING = "retiring"
    RELOADED = "reloaded"
    CONFIG_BAD = "config_bad"
    EXPORTS_UNREADABLE = "exports_unreadable"
    RUNNER_DIED = "runner_died"
    ENGINE_DOWN = "engine_down"
    TASK_FAILED = "task_failed"
    CLAIMED = "claimed"
    STAGE_STARTED = "stage_started"
    STAGE_ENDED = "stage_ended"
    WARNING = "warning"
    BOOT_TEST = "boot_test"
    INTERRUPTED = "interrupted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    BLOCKED = "blocked"
    RETRYING = "retrying"
    REJECTED = "rejected"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class CatalogEntry:
    """An entry of the catalog. id: never to be changed, as people search for it.

    The text names no values: systemd replaces @FIELD@ only for names without digits. The record itself has them.
    """

    id: str
    subject: str
    text: str


CATALOG: dict[Kind, CatalogEntry] = {
    Kind.WATCHING: CatalogEntry(
        "bb38c31122444e5abd9883584a0f0198",
        "The daemon watches its directory",
        "It migrates every complete export there, at most `workers` at a time.",
    ),
    Kind.STOPPED: CatalogEntry(
        "34d37092ba6e418eaa44e760c97d0387",
        "The daemon has stopped",
        "Nothing of the jobs that ran is lost: the next start resumes after the last finished step of each.",
    ),
    Kind.RETIRING: CatalogEntry(
        "9b6fd51baf4c4a4d8bbe623b88be29c0",
        "The daemon ends when its jobs are over",
        "A package was upgraded, or somebody sent SIGQUIT. It starts no more jobs. Then systemd starts it again.",
    ),
    Kind.RELOADED: CatalogEntry(
        "fd6b401a761d4d07959773e289446a77",
        "The settings were read again",
        "New jobs use the new settings; running jobs keep theirs.",
    ),
    Kind.CONFIG_BAD: CatalogEntry(
        "9139fd2946f742acb3a22eb47377f4bb",
        "The new settings are bad",
        "The daemon keeps the old ones. `hyper2kvmd check-config` checks the file, `systemctl reload hyper2kvmd` loads"
        " it.",
    ),
    Kind.EXPORTS_UNREADABLE: CatalogEntry(
        "b90b6bf115d14d2090ab82b7522ca629",
        "The exports directory cannot be read",
        "No job starts until then: mount or create it, repair its file server, or change `exports_dir`.",
    ),
    Kind.RUNNER_DIED: CatalogEntry(
        "75eb3b97efe449628bd2c308cf5651c3",
        "The process of a job died",
        "The job is started again after a delay, and resumes after its last finished step. If it dies again and again,"
        " look for what kills it: `journalctl -k`, the memory of the host.",
    ),
    Kind.ENGINE_DOWN: CatalogEntry(
        "85fea057267143e699538f6eff5c605e",
        "The engine takes no jobs",
        "Slurm, or what dispatch.command names, does not answer, or takes no job. Jobs that it has continue."
        " The daemon asks again every ten seconds. `hyper2kvmctl doctor dispatch` says what is wrong.",
    ),
    Kind.TASK_FAILED: CatalogEntry(
        "067c62030d4e4c218ccca895bd4de38d",
        "A periodic task of the daemon failed",
        "It prunes every hour, notifies of jobs that are over, and calls the heartbeat's URL. The task is run again,"
        " but what it left undone piles up: run `hyper2kvmctl prune` or `hyper2kvmctl notify` by hand to see why it"
        " fails. Of the heartbeat, the record itself says why.",
    ),
    Kind.CLAIMED: CatalogEntry(
        "1e58c28676bf4a3899bffcf0be9974e5",
        "A job began",
        "`journalctl H2K_JOB_ID=` with its job_id has all its records.",
    ),
    Kind.STAGE_STARTED: CatalogEntry(
        "8a46b0f21c264ecea328241ecbc9a0de", "A stage of a job began", "You need not do anything."
    ),
    Kind.STAGE_ENDED: CatalogEntry(
        "57d2a990ba76463b9b48ced01f872b70",
        "A stage of a job ended",
        "You need not do anything. Another record says how the job ended.",
    ),
    Kind.WARNING: CatalogEntry(
        "9058696d11e24127a122d396a156adc5",
        "Something to know about a migration",
        "The migration continues. The hint says what you can do; the report has it, too.",
    ),
    Kind.BOOT_TEST: CatalogEntry(
        "3c15a25fedd845e6a09fb7cfb4779e86",
        "The migrated guest was booted on a copy",
        "What it said is in boot-test.log beside the report, its screen in boot-test.png.",
    ),
    Kind.INTERRUPTED: CatalogEntry(
        "84c3ce6205d9431f86c37c0cbedabdee",
        "A job was stopped from outside",
        "Nothing is lost: the next attempt resumes after its last finished step.",
    ),
    Kind.SUCCEEDED: CatalogEntry(
        "cee09f281aee4269a4f37d0b4bbec06c",
        "A VM was migrated",
        "`hyper2kvmctl show` with its name shows all details, `hyper2kvmctl report` writes them as a page.",
    ),
    Kind.FAILED: CatalogEntry(
        "2b6c304342494060a78504526f33aa1c",
        "A migration failed",
        "A retry would end the same way. Do what the hint says, then `hyper2kvmctl retry`.",
    ),
    Kind.BLOCKED: CatalogEntry(
        "f094bdb02dea440aae207c9da6225f50",
        "A migration waits for you",
        "Do what the hint says, then `hyper2kvmctl retry`.",
    ),
    Kind.RETRYING: CatalogEntry(
        "f6d953be97e54910a3fcb4a85344573a",
        "A migration is retried later",
        "The cause may pass by itself. If it does not, do what the hint says.",
    ),
    Kind.REJECTED: CatalogEntry(
        "87bf586d78794d298d16bdab48957362",
        "An export was rejected",
        "It has no valid Artifact Manifest, or it names what it must not. The hint says what to do.",
    ),
    Kind.CANCELLED: CatalogEntry(
        "1c02881efe0a43d599a552a1ce8a7416",
        "A migration was cancelled",
        "Only its report is left. `hyper2kvmctl retry` starts it again.",
    ),
}


def catalog() -> str:
    """The catalog as systemd reads it from /usr/lib/systemd/catalog/hyper2kvmd.catalog."""
    about = "Defined-By: hyper2kvmd\nDocumentation: man:hyper2kvmd(8)\n"
    return "\n".join(f"-- {e.id}\nSubject: {e.subject}\n{about}\n{e.text}\n" for e in CATALOG.values())
