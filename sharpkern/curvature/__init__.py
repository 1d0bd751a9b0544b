"""Curvature of a loss by its parameters: operators, sharpness, and the audit of both."""
