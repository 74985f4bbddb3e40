"""`python -m selfhost_cli.keeper --profile NAME`: started by `selfhost`, never by hand."""

import argparse

from selfhost_cli.keeper.daemon import run


def main() -> None:
    parser = argparse.ArgumentParser(prog="selfhost-keeper")
    parser.add_argument("--profile", required=True)
    run(parser.parse_args().profile)


if __name__ == "__main__":
    main()
