"""`make bench`: every benchmark, one table of ratios. Results with machine and date are kept in README.md."""

import datetime

from rich.console import Console
from rich.table import Table

from benchmarks import data_loading, dcae, denoiser, features, maetok, tokenizers
from latelier.receipt import device_name


def main() -> None:
    """Run all, print a table."""
    table = Table("benchmark", "value", title=f"{datetime.date.today()}, {device_name()}")
    for module in (tokenizers, maetok, dcae, denoiser, data_loading, features):
        for name, value in module.run():
            table.add_row(name, f"{value:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
