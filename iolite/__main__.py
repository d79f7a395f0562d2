"""`python -m iolite` is `iolite`, where the command is not on the path."""

from iolite.cli import main

if __name__ == "__main__":  # and not in processes that training spawns
    main()
