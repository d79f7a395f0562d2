"""`python -m iolite.cli`."""

from iolite.cli import main

main()
