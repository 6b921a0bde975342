"""The noise-aware classifier of classifier guidance: its training and its measurement."""
