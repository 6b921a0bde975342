"""Whose weights, and what shape: autoencoder, U-Net, text encoder, classifier."""
