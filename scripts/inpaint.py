"""The command `ldm-inpaint`: see ldm/cli/inpaint.py."""

import sys

from ldm.cli.inpaint import main

if __name__ == "__main__":
    sys.exit(main())
