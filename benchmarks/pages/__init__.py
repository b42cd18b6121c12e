"""Reports as one HTML file each, of one style."""

from typing import Any


def render(page: str, **values: Any) -> str:
    """The page of that name, with its values.

    >>> "<h1>A title</h1>" in render("bench", title="A title", lead="", parts=[], pictures={})
    True
    """
    from jinja2 import Environment, PackageLoader

    pages = Environment(loader=PackageLoader(__package__, "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(f"{page}.html").render(values)
