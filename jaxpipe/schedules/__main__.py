"""Entry point of the command line `python -m jaxpipe.schedules`, which `command.cli` implements."""

import sys

from jaxpipe.schedules.command.cli import main

if __name__ == "__main__":
  sys.exit(main())
