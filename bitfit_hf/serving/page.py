"""The two pages, `page.html` and `docs.html`: one file each, which load nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Page:
    """A page and its headers.

    Args:
        html (`str`): The page.
        headers (`dict[str, str]`): They allow its own script and style by their digests, and requests to this server.
    """

    html: str
    headers: dict[str, str]

    @classmethod
    def read(cls, name: str) -> Page:
        """Reads a file of this package."""
        html = (files(__package__) / name).read_text(encoding="utf-8")
        policy = [
            "default-src 'none'",
            f"script-src {_digests(html, 'script')}",
            f"style-src {_digests(html, 'style')}",
            "connect-src 'self'",
            "img-src data:",  # the empty icon, so that no browser asks for one
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
        headers = {
            "Content-Security-Policy": "; ".join(policy),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return cls(html, headers)


def _digests(html: str, tag: str) -> str:
    inside = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    sums = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside)
    return " ".join(f"'sha256-{digest}'" for digest in sums)


PAGE, DOCS = Page.read("page.html"), Page.read("docs.html")
