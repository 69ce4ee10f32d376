"""What runs on the device: kernels of one op each, importing triton alone.

Activations are [rows, channels], row-major: channels_last seen as a matrix, a row for each pixel of
each image. Their offsets are 32-bit within a tile, from a 64-bit base. ACC is the dtype of
accumulation and of per-channel vectors, fp64 beside fp64 and fp32 beside all else.
"""
