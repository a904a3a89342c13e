"""`python -m jaxinfer.bench.hardware` is `scripts/gpu_check`."""

import sys

from jaxinfer.bench.hardware.check import main

sys.exit(main(sys.argv[1:]))
