"""Kernels on the CPU: compiled C++, and attention in blocks of plain torch."""
