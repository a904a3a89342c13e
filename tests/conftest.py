"""What every test runs under: the CPU, as eight devices, and nothing taken from the user."""

import atexit
import os
import shutil
import tempfile

# Read by JAX when it is first imported, which no test has done yet.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
# A setting of the user's shell is no part of a test; where the demo model lies may be.
for name in [name for name in os.environ if name.startswith("JAXINFER_")]:
    if name != "JAXINFER_CACHE_DIR":
        del os.environ[name]
# Where all processes of a run keep compiled programs; the first one makes it, and takes it away.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TESTS_CACHE"] = tempfile.mkdtemp(prefix="jaxinfer-tests-")
    atexit.register(shutil.rmtree, os.environ["TESTS_CACHE"], ignore_errors=True)
