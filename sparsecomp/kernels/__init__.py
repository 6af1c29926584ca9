"""The sparse kernels: what each computes (NumPy reference) and how, as TIR that a target compiles.

Every kernel has the one C signature of :data:`sparsecomp.kernels.tir.SIGNATURE`, works on a range of items and is
serial inside: the host owns the threads.
"""
