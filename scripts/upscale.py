"""The command `ldm-upscale`: see ldm/cli/upscale.py."""

import sys

from ldm.cli.upscale import main

if __name__ == "__main__":
    sys.exit(main())
