"""The command line, `bitfit`: train, evaluate, inspect, compare, merge, extract, export, push, draw, serve deltas."""

from . import serve, training
from .app import app

training.add_to(app)
serve.add_to(app)

__all__ = ["app"]
