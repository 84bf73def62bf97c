"""Options that many commands have; what they mean is the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print what was made alone, in one line.")]
Token = Annotated[
    str | None, typer.Option("--token", metavar="TOKEN", help="For private and gated repos; by default the saved one.")
]
