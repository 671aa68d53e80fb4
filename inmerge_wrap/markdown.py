"""Markdown from templates, safe from what the names in it hold."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


@functools.cache
def template(name: str) -> jinja2.Template:
    """Returns a template of this package, in which a value without a filter is plain text.

    The filter ``prose`` keeps Markdown, and ``fenced(language)`` shows text as a block of code.
    """
    import jinja2
    from markupsafe import Markup

    def fenced(text: str, language: str) -> Markup:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        return Markup(f"{fence}{language}\n{text.strip()}\n{fence}")

    environment = jinja2.Environment(
        finalize=lambda value: value if isinstance(value, Markup) else plain_text(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"fenced": fenced, "prose": lambda text: Markup(_harmless(text))}
    text = resources.files("inmerge_wrap").joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(text)


def plain_text(value: object) -> str:
    """Returns a name or value as one line that Markdown shows as it is, without HTML or pictures.

    Names of classes may come from the folders of strangers, and a README is a web page.
    """
    special = r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])"
    text = re.sub(special, r"\\\g<0>", one_line(str(value)))
    return _harmless(re.sub(r"&(?=[#\w])", "&amp;", text))


def _harmless(text: str) -> str:
    """Returns Markdown without HTML and without pictures, which load from other hosts."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # undecodable names of files
    return text.replace("<", "&lt;").replace(">", "&gt;").replace("![", r"!\[")


def one_line(text: str) -> str:
    """Returns text without line breaks and control characters."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", text).split())
