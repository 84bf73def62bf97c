"""The command line, `bitfit`: inspect, compare, merge, extract, export, push and draw deltas."""

from .app import app

__all__ = ["app"]
