"""Sharpness at every training step."""
