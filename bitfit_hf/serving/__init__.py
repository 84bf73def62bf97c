"""Many tasks on one base model over HTTP, in the wire format of Text Embeddings Inference.

The way of a request:

1. `auth` looks at its token and `limits` at its size and shape, before anything of it is parsed.
2. `app` reads it (`schemas`; `direct` is the short way past the framework), and asks the `Engine` (`engine`) for the
   answers to its texts.
3. The engine tokenizes in a thread (`tokenizing`) and hands the texts to the `BatchingQueue` (`queue`), which puts
   texts of like length together, whichever tasks they are for. One thread runs one batch after the other on the
   `TaskBank`.
4. `problems` makes a status and one sentence of whatever goes wrong, `metrics` counts.

`tasks` adds, describes and removes tasks, from `sources` that the operator has allowed. `settings` are all options;
`start` makes a bank of them. `shared` is an engine whose tasks are those of several servers, `ray` the application on
Ray Serve. [`create_app`] needs no particular server: `bitfit serve` runs it with uvicorn (`run`).
"""

from ..errors import MissingDependencyError

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        f'Serving over HTTP needs the extra `serve` ({error}): `pip install "bitfit-hf[serve]"`.'
    ) from error

from .app import create_app
from .engine import Engine
from .settings import Settings

__all__ = ["Engine", "Settings", "create_app"]
