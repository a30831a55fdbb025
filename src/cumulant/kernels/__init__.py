"""How the operations are computed. Private: implementations import neither `cumulant.ops` nor each
other.
"""
