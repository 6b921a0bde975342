"""Metrics of what a model generates."""
