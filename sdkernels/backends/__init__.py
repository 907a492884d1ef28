"""The ops' contract and who fulfils it: the extension, Triton, PyTorch code.

Imports nothing of the package outside of this folder.
"""
