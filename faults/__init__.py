"""Faults on purpose: what is injected into latelier, and what comes out. `python -m faults` prints the table."""

SECTIONS = ["kills", "signals", "storage", "processes", "data", "strangers", "commands"]  # modules, in the order of the table
