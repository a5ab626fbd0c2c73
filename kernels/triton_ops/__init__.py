"""The operators in Triton, for NVIDIA GPUs from sm_80 on. Optional: without this package the PyTorch versions run.

A file here has the name of its operator and one function of that name, which takes the operator's arguments and returns
its results, or `NotImplemented` for arguments that it has no kernel for. `kernels/library.py` is its only caller.
"""
