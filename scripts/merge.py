"""The command `ldm-merge`: see ldm/cli/merge.py."""

import sys

from ldm.cli.merge import main

if __name__ == "__main__":
    sys.exit(main())
