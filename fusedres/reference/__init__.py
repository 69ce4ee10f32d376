"""The unfused path: plain torch under ordinary autograd, slow and obvious, that every backend is
held to.

It shares nothing with the gradient protocol of the fused path, so that it can judge it. Functions
take and return tensors; statistics are taken in fp32 (fp64 for fp64) and values are rounded once,
on the way out.
"""
