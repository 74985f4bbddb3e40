"""`python -m selfhost_cli` is the `selfhost` command."""

from selfhost_cli.cli.entry import main

if __name__ == "__main__":
    main()
