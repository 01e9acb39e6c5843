"""Faults on purpose: what is injected into latelier, and what comes out. `python -m faults` prints the table."""

# Modules, in the order of the table.
SECTIONS = ["kills", "signals", "storage", "processes", "data", "strangers", "commands"]
