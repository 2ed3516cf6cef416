"""``python -m toolchain`` is ``edgestill``."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from toolchain.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "pydantic", "yaml"):
            raise
        print(
            f"error: the edgestill command needs {error.name}; this is the runtime-only install: "
            "pip install 'edgestill[distill,ort]', or on a device 'edgestill[trt]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    app()


if __name__ == "__main__":
    main()
