"""`python -m jaxpipe.schedules`; see `cli`."""

import sys

from jaxpipe.schedules.command.cli import main

if __name__ == "__main__":
  sys.exit(main())
