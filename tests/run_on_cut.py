"""`python tests/run_on_cut.py gan.py ...` runs a script as a user would, on the cut of the data."""

import runpy
import sys

from conftest import CUT, ROOT, accept_cut

if __name__ == "__main__":
    accept_cut()
    script = ROOT / sys.argv[1]
    sys.argv = [str(script), *sys.argv[2:], "--data", str(CUT)]
    runpy.run_path(str(script), run_name="__main__")
