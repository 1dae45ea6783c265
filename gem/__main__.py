"""`gem`, `python -m gem` and `accelerate launch -m gem`."""

from __future__ import annotations

import sys

from gem.errors import missing_package


def main() -> None:
    """The command line, or one line where the packages that it is made of are not installed."""
    try:
        from gem.cli import main as command
    except ModuleNotFoundError as error:
        if not (words := missing_package(error)):
            raise
        print(f"gem: {words}", file=sys.stderr)
        sys.exit(2)
    command()


if __name__ == "__main__":
    main()
