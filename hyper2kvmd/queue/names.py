"""The names of our files in an export, and in the exports directory."""

from __future__ import annotations

LOCK = ".hyper2kvmd.lock"
REPORT = "migration-report.json"
# Of a file, its signature is called after it; ssh-keygen has the same name for it.
SIGNED = ".sig"
# What people ask for, as files beside the manifest, so that it reaches a runner on any host that shares the directory.
HOLD = ".hyper2kvmd.hold"
CANCEL = ".hyper2kvmd.cancel"
LOG = ".hyper2kvmd.log"
# What a person wants of the VM beyond the settings.
ASKED = ".hyper2kvmd.asked"
# How far the job is that runs; there only while one does.
PROGRESS = ".hyper2kvmd.progress"
# What was seen of the guest in the boot test.
BOOT_LOG = "boot-test.log"
BOOT_SCREEN = "boot-test.png"
# How the VM took the place of its source, and what was seen of it then.
CUTOVER = "cutover-report.json"
CUTOVER_LOG = "cutover.log"
CUTOVER_SCREEN = "cutover.png"
# In the queue of exporters: what manifests are called that were taken, and those whose exporters have the answer.
TAKEN = ".hyper2kvmd.taken."
ANSWERED = ".hyper2kvmd.answered."
# In the exports directory itself: no daemon starts another job.
DRAIN = ".hyper2kvmd.drain"
# There, too: a file for each host that works on it, and one for each that is to start no job.
HOSTS = ".hyper2kvmd.hosts"
