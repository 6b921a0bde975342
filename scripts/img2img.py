"""The command `ldm-img2img`: see ldm/cli/img2img.py."""

import sys

from ldm.cli.img2img import main

if __name__ == "__main__":
    sys.exit(main())
