"""Triton: the host side of each op allocates and launches; the kernels are in device/.

Tensors are channels_last, on a GPU; on a CPU under Triton's interpreter (TRITON_INTERPRET=1). Each
function checks what its pointers rest on, so that a direct call of torch.ops.fusedres cannot crash;
messages for people come from the functions in fusedres.ops, which check first.
"""
