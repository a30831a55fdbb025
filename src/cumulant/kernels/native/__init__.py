"""Native CPU kernels, in C++ behind plain C functions: `library` loads them, the other modules are their operators."""
