"""What only hardware can show: kernels, steps and bits on a device, and what is faster there.

python -m jaxinfer.bench.hardware --help
"""
