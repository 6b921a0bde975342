"""FLOPs, whose counting takes half a second, are counted once for each kind of network, in whatever process."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._pytree import tree_structure

from ldm.training.throughput import forward_flops
from ldm.utils.atomic_files import atomic_file

COUNTS = "LDM_TESTS_FLOPS"  # the environment variable with the folder of counts, which a fixture sets


def count_once(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """For `throughput.forward_flops`. Networks of one kind have the same kinds of layers and of inputs."""
    layers = sorted({f"{type(part).__module__}.{type(part).__qualname__}" for part in module.modules()})
    kind = hashlib.sha256(f"{layers} {tree_structure((args, kwargs))}".encode()).hexdigest()
    file = Path(os.environ[COUNTS], kind)
    if not file.exists():
        flops = forward_flops(module, *args, **kwargs)
        with atomic_file(file) as tmp_path:
            tmp_path.write_text(str(flops))
    return int(file.read_text())
