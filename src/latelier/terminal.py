"""The terminal: where progress and messages go, standard error."""

from rich.console import Console

console = Console(stderr=True)
