"""The mathematics of diffusion: pure functions over tensors; no files, no Config."""
