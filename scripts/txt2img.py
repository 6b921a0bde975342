"""The command `ldm-txt2img`: see ldm/cli/txt2img.py."""

import sys

from ldm.cli.txt2img import main

if __name__ == "__main__":
    sys.exit(main())
