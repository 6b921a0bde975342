"""The app in a browser: learn how diffusion works, train models, generate images, look at reports.

    ldm-app --root runs --port 8501

It listens on this machine alone unless `--address` says otherwise, and reads models and runs inside the roots only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.app.roots import ROOTS
from ldm.utils.errors import Parser, UserError, command

MAX_UPLOAD_MB, MAX_UPLOADS_MB = 20, 200  # of an image; of all uploads of the page Data
SETTINGS = {
    "server.headless": "true",  # opens no browser and asks for no e-mail address
    "server.fileWatcherType": "none",
    "server.maxUploadSize": str(MAX_UPLOADS_MB),
    "browser.gatherUsageStats": "false",
    "client.showErrorDetails": "none",  # a defect's traceback goes to the terminal alone
    "client.toolbarMode": "minimal",
}
"""Settings of Streamlit that are the same for everyone."""


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--root", type=Path, action="append", help="a folder with runs or models; may be repeated; default: runs"
    )
    parser.add_argument("--port", type=int, default=8501, help="default: 8501")
    parser.add_argument(
        "--address", default="localhost", help="default: localhost; 0.0.0.0 lets all who reach this machine use the app"
    )
    args = parser.parse_args(arguments)
    if not 0 < args.port < 65536:
        raise UserError(f"--port: {args.port}; give 1 to 65535")
    for root in args.root or ():
        if not root.is_dir():
            raise UserError(f"--root: no folder {root}; give one with runs or models in it")
    try:
        from streamlit.web.cli import main as streamlit
    except ImportError:
        raise UserError("ldm-app: needs Streamlit; pip install 'ldm[app]'") from None
    os.environ[ROOTS] = os.pathsep.join(str(root.resolve()) for root in args.root or [Path("runs")])
    settings = SETTINGS | {"server.port": str(args.port), "server.address": args.address}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    streamlit(["run", str(Path(__file__).with_name("main.py")), *flags], standalone_mode=False)


if __name__ == "__main__":
    sys.exit(main())
