"""`python tests/run_on_cut.py gan.py ...` runs a script as a user would, on the cut of the data."""

import runpy
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from conftest import CUT, accept_cut  # noqa: E402

if __name__ == "__main__":
    accept_cut()
    script = Path(__file__).parent.parent / sys.argv[1]
    sys.argv = [str(script), *sys.argv[2:], "--data", str(CUT)]
    runpy.run_path(str(script), run_name="__main__")
