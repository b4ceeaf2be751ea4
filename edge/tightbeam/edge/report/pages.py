"""How all report pages are rendered: strict templates, quantities as filters, one style for all."""

from pathlib import Path
from typing import Any

from tightbeam.edge.report import units

__all__ = ["render"]

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, *folders: Path, **values: Any) -> str:
    """Fill in a template, looked for in `folders` before this package's own.

    Texts are escaped, a name that is not given is an error, and `units` are filters: `{{ n | bytes }}`.
    """
    import jinja2  # slow to import, and the command line imports what imports this

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, _TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in units.__all__:
        environment.filters[name.removesuffix("_text")] = getattr(units, name)
    return environment.get_template(template).render(**values)
