"""Figures for what a model makes."""
