"""Kernels in Triton, one file per family; the modules need ``triton`` and are imported on first use."""
