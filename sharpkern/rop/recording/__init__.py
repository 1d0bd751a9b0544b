"""Sweeps recorded once and replayed on fixed memory."""
