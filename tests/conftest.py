"""Settings of the whole test session. Which tests were skipped, and why, pytest's `-ra` says at its end."""

import os
import signal

from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker has one core to itself: more threads only wait for each other. Set before torch is imported,
    # and as an environment variable, so that it reaches command lines and notebook kernels too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it runs in the background with Ctrl-C ignored, and what the tests start and interrupt
# would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No timing in the tests: on a busy machine any example may take its time.
settings.register_profile("xclip_lab", deadline=None)
settings.load_profile("xclip_lab")
