"""The directive `all-errors`: every public error with its docstring and what it derives from."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from bitfit_hf import errors


class AllErrors(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for name in errors.__all__:
            found = getattr(errors, name)
            if not issubclass(found, Exception):
                continue
            bases = " and ".join(f"``{base.__name__}``" for base in found.__bases__ if base.__module__ == "builtins")
            lines += [f".. autoexception:: bitfit_hf.{name}", ""]
            lines += [f"   Also a {bases}.", ""] if bases and found is not errors.BitFitError else []
        return self.parse_text_to_nodes(StringList(lines, source=self.get_source_info()[0]))


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("all-errors", AllErrors)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
