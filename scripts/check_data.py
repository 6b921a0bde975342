"""The command `ldm-check-data`: see ldm/cli/check_data.py."""

import sys

from ldm.cli.check_data import main

if __name__ == "__main__":
    sys.exit(main())
