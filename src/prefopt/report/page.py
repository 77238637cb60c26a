"""HTML pages that are whole in one file: no script, no network, text of data and models shown as it is.

A page extends ``templates/page.html``; Jinja escapes every value that is not `Markup`, and the page's own policy
(``default-src 'none'``) keeps a browser from fetching or running anything, whatever a text contains.
"""

from __future__ import annotations

import base64
import io
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prefopt.terminal import harmless

__all__ = ["picture", "rendered", "vector"]

XML_DECLARATION = re.compile(r"^.*?(?=<svg)", re.DOTALL)


@cache
def environment() -> Environment:
    """Escapes everything, and refuses a name that a template uses and nobody gave."""
    found = Environment(
        loader=PackageLoader("prefopt.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["harmless"] = harmless
    return found


def rendered(template: str, **values: Any) -> str:
    """A page as text.

    Args:
        template: file in ``report/templates``, which extends ``page.html``.
        values: what it shows; ``title`` at least.
    """
    return environment().get_template(template).render(**values)


def vector(figure: Any) -> Markup:
    """A ``matplotlib.figure.Figure`` as SVG within a page; text stays text, so that it can be searched and copied."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "prefopt"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return Markup(XML_DECLARATION.sub("", buffer.getvalue()))


def picture(png: bytes, alt: str) -> Markup:
    """A PNG file within a page."""
    data = base64.b64encode(png).decode()
    return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(data, alt)
