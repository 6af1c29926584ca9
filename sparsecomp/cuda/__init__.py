"""Kernels for NVIDIA cards as CUDA C++, the packed weights they read, and their compilation by NVRTC."""
