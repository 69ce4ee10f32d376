"""Convolutions by cuDNN and oneDNN through torch, and the split plans built on them. Imports torch
only.
"""
