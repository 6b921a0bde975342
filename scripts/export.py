"""The command `ldm-export`: see ldm/cli/export.py."""

import sys

from ldm.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
