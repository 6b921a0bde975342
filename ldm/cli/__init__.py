"""The commands: what they accept, print and write."""

import ldm.utils.openmp  # noqa: F401  # it must come before torch, which every command imports
