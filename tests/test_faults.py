"""A sample of the fault harness, see docs/promises.md; `make faults` runs all of it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_nothing_is_lost():
    """All sections in one process, which imports everything once."""
    command = [sys.executable, "-m", "faults", "--sample"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "| all |" in done.stdout
