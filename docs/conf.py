"""How the documentation is built. `make docs` calls `build.py`, which sets the scene and then runs Sphinx."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE / "pictures"), str(HERE.parent), str(HERE.parent / "recipes")]

import rooms  # noqa: E402
from benchmarks.figures import quoted  # noqa: E402

import bitfit_hf  # noqa: E402

project = "bitfit_hf"
author = "The bitfit_hf authors"
copyright = "The bitfit_hf authors, Apache-2.0"
release = version = bitfit_hf.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "all_errors",
    "hf_docstrings",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "_ext", "upstream", "tutorials/outputs"]
nitpicky = True  # a reference that leads nowhere is a warning, and `build.py` makes warnings errors

# Pages. Headings get anchors down to the third level, so that pages can link to a section.
myst_enable_extensions = ["colon_fence", "deflist", "substitution"]
myst_substitutions = quoted()  # measured figures, from the recorded results
myst_heading_anchors = 3

# Tutorials are notebooks as text, run when the documentation is built: no output is committed, and one cell that fails
# is a failed build.
nb_execution_mode = "force"
nb_execution_show_tb = True  # and a warning, which fails the build
nb_execution_timeout = 600  # seconds for a cell
nb_output_stderr = "remove"  # progress bars, and what other libraries say when they are imported

# The reference, from docstrings in the Hugging Face format (see `_ext/hf_docstrings.py`). Types stand in `Args`.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"bitfit_hf {version}"
html_static_path = ["_static"]
html_css_files = ["wide_tables.css"]
copybutton_exclude = ".linenos, .gp, .go"

rooms.draw(HERE / "pictures" / "rooms.svg")
