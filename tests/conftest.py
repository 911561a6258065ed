"""Settings of the whole test session. Which tests were skipped, and why, pytest's `-ra` says at its end."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker has one core to itself: more threads only wait for each other. Set before torch is imported,
    # and as an environment variable, so that it reaches command lines and notebook kernels too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
