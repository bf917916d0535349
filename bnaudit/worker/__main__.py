"""Starts a worker: `PYTHON .../bnaudit/worker PARENT_PID`, in an empty folder. See protocol.py.

The folder is loaded as the package `bnaudit_worker` and taken off sys.path, so that no module of the worker
can stand in for a module of the user's, nor the other way round.
"""

from __future__ import annotations

import importlib.util
import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
PACKAGE = "bnaudit_worker"


def main() -> None:
    """Serves requests until the auditor closes the pipe or dies."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != FOLDER]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, os.path.join(FOLDER, "__init__.py"), submodule_search_locations=[FOLDER]
    )
    assert spec is not None  # noqa: S101 - the file is there
    assert spec.loader is not None  # noqa: S101
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
    importlib.import_module(PACKAGE + ".protocol").serve(int(sys.argv[1]))


if __name__ == "__main__":
    main()
