"""What an op is to torch around the kernels that compute it, Triton's or compiled: one file per stem.

A file has a `Kernel` (`_library.py`) per registered op, and makes of a backend's kernels the op's functions,
in the form of d2vkern.reference: what autograd saves, how arguments reach a kernel. A backend adds what
computes. Imports neither Triton nor the extension.
"""
