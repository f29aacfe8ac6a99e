"""The templates of the pages for people: one style for all of them, and everything that is put in is escaped."""

from __future__ import annotations

import functools
from importlib import resources

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from hyper2kvmd.text import duration, exact_duration, size


@functools.cache  # a campaign has hundreds of pages
def template(name: str) -> Template:
    """One of the templates in this directory. It can use the filters size, duration and about (a duration, rounded)."""
    files = resources.files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=size, duration=exact_duration, about=duration)
    environment.globals["style"] = Markup(files.joinpath("style.css").read_text("utf-8"))  # ours
    return environment.from_string(files.joinpath(name).read_text("utf-8"))
