"""`python -m hyper2kvmd.ctl` is hyper2kvmctl."""

import sys

from hyper2kvmd.ctl import main

sys.exit(main())
