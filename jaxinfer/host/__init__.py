"""The scheduler and all it knows: plain Python and NumPy, no JAX, no clock, no randomness."""
