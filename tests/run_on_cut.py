"""`python tests/run_on_cut.py DATA gan.py ...` runs a script as a user would, on the cut data."""

import runpy
import sys
from pathlib import Path

from conftest import accept_cut

if __name__ == "__main__":
    data, script, *options = sys.argv[1:]
    accept_cut(Path(data))
    sys.argv = [script, *options, "--data", data]
    sys.path.insert(0, str(Path(script).resolve().parent))  # as Python does it
    runpy.run_path(script, run_name="__main__")
