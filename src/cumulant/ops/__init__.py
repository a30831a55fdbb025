"""The operations: what is computed. One file an operation; how it is computed lies in
`cumulant.kernels`.
"""
