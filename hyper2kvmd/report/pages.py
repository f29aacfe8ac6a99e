"""The templates of the pages for people: one style for all of them, and everything that is put in is escaped."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from hyper2kvmd.text import duration, exact_duration, size

_FILES = resources.files(__package__)


@functools.cache
def _style() -> str:
    return _FILES.joinpath("style.css").read_text("utf-8")


@functools.cache
def policy() -> str:
    """What a browser may do with a page of nothing but text: use our style sheet, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"


@functools.cache  # a campaign has hundreds of pages
def template(name: str) -> Template:
    """One of the templates in this directory. It can use the filters size, duration and about (a duration, rounded)."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=size, duration=exact_duration, about=duration)
    environment.globals.update(style=Markup(_style()), policy=policy())  # ours
    return environment.from_string(_FILES.joinpath(name).read_text("utf-8"))
