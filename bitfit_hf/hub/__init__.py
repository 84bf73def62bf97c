"""What a delta's repository holds, and pushing it."""

from ..delta.value import push_with
from .push import push_to_hub

__all__ = ["push_to_hub"]

push_with(push_to_hub)
