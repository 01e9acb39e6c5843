"""`python -m latelier`, and so `accelerate launch -m latelier run RECIPE`."""

from latelier.cli import main

main()
