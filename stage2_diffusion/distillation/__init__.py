"""Fewer sampling steps: progressive distillation and latent consistency."""
