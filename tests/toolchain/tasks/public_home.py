"""A public data set's home on 127.0.0.1."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from toolchain.download import Remote


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def served(folder: Path, places: Sequence[Path]) -> Iterator[tuple[Remote, ...]]:
    """The files at ``places`` below ``folder``, as a download finds them."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        contents = {place: (folder / place).read_bytes() for place in places}
        try:
            yield tuple(
                Remote(
                    f"http://127.0.0.1:{server.server_port}/{place.as_posix()}",
                    hashlib.sha256(content).hexdigest(),
                    len(content),
                )
                for place, content in contents.items()
            )
        finally:
            server.shutdown()
