"""The command `ldm-evaluate`: see ldm/cli/evaluate.py."""

import sys

from ldm.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
