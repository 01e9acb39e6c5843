"""Faults on purpose: what is injected into latelier, and what comes out. `python -m faults` prints the table."""

SECTIONS = ["kills", "signals", "storage", "processes"]  # modules, in the order of the table
