"""The command line, `bitfit`: inspect, compare, merge, extract, export, push, draw and serve deltas."""

from .app import app
from .serve import add_to

add_to(app)

__all__ = ["app"]
