"""The command `ldm-report`: see ldm/cli/report.py."""

import sys

from ldm.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
