"""Exports for FPGAs: integer networks, their kernels as tile loops, and the projects that are written from both."""
