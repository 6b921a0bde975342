"""Latents and embeddings on disk."""
