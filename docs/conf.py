"""How Sphinx builds this site: ``python -m sphinx -W -b html docs OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package of this tree, not an installed one

project = "lightning-easgd"
author = "The lightning-easgd authors"
copyright = "2026, The lightning-easgd authors"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_design",
]

html_theme = "furo"
html_title = "lightning-easgd"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]
smartquotes = False  # messages have code in them, to be copied

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "force"  # a cache knows the cells only, not the package that they run
nb_execution_raise_on_error = True
nb_execution_timeout = 100
exclude_patterns = ["_build", "jupyter_execute"]  # what a build leaves here
nb_render_markdown_format = "gfm"  # with tables

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # what Lightning documents is Lightning's
autodoc_typehints = "none"  # the docstrings say what an argument may be
napoleon_google_docstring = True
napoleon_numpy_docstring = False

nitpicky = True
nitpick_ignore = [("py:class", "collections.abc.Mapping"), ("py:exc", "MisconfigurationException")]
