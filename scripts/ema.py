"""The command `ldm-ema`: see ldm/cli/ema.py."""

import sys

from ldm.cli.ema import main

if __name__ == "__main__":
    sys.exit(main())
