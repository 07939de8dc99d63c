"""Packed expert formats and the kernels that compute with them."""
