"""The whole spectrum: trace, diagonal, density, layers. Estimators see an operator's ``n, dtype, device, matmat``."""
