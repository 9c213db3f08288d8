"""The environment of the pages: templates of this folder, which fail on a name that they are not given."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any


def environment(filters: Mapping[str, Any], **names: Any) -> Any:
    """A jinja2 environment with these filters; `names` are known to every template."""
    import jinja2

    folder = resources.files("llcompile.look") / "templates"
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=lambda name: bool(name and ".html" in name),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters.update(filters)
    made.globals.update(names)
    return made
