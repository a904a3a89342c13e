"""Device kernels, one folder an operation."""
