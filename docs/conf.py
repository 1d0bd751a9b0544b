"""How Sphinx builds the site: ``make docs``, or ``sphinx-build -W -n docs build/docs``."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import sharpkern  # noqa: E402

project = "sharpkern"
author = "the sharpkern authors"
release = version = sharpkern.__version__
extensions = ["sphinx.ext.autodoc", "docstrings", "sphinx.ext.napoleon", "myst_parser", "commands", "pages"]
exclude_patterns = ["_ext"]
html_theme = "furo"
html_title = f"sharpkern {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

# Every heading can be linked to as on GitHub; a link to a heading that is not there is a warning, so an error.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
# How an operator does what BaseOperator describes once.
autodoc_default_options = {"exclude-members": "apply_rows, form_rows"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 110
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Cost", "Source"]

nitpicky = True
# Types of other packages: their sites are not read, so that a build needs no network. And types of this package that
# stand in signatures only: what a user may pass is said in words beside them.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|np|numpy|scipy|dist|transformers|lightning|collections|pathlib)\..*"),
    ("py:.*", r"sharpkern\.(rop|curvature\.base\.Vector|spectrum\.probes\.T$).*"),
    ("py:.*", r"(Figure|Axes|T)"),
]
