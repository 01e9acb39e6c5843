"""A sample of the fault harness, see docs/promises.md; `make faults` runs all of it."""

import subprocess
import sys
from pathlib import Path

import pytest
from faults import SECTIONS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("section", SECTIONS)
def test_nothing_is_lost(section):
    command = [sys.executable, "-m", "faults", section, "--sample"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "| all |" in done.stdout
