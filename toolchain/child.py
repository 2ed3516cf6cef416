"""Start a module of ours as a process: ``python .../toolchain/child.py MODULE [ARGUMENT...]``.

``python -m`` would look in the working directory first, and in PYTHONPATH before site-packages: a person's own
``export`` or ``benchmarks`` there would take the place of ours. Here the packages are those beside this file, whether
installed or not; everything else is found as usual.
"""

from __future__ import annotations

import os
import sys

OURS = {"toolchain", "export", "benchmarks"}


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, __file__, module, *arguments]


def main() -> None:
    here = os.path.dirname(__file__)
    root = os.path.dirname(here)
    if sys.path[0] == here:
        del sys.path[0]
    import importlib
    import runpy

    module = sys.argv[1]
    sys.path.insert(0, root)
    for name in OURS & {"toolchain", module.partition(".")[0]}:
        importlib.import_module(name)
    del sys.path[0]
    if root not in sys.path:
        sys.path.append(root)
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
