"""A JupyterLab of its own and a headless Chromium that looks at a notebook in it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import papermill

from xclip_lab.runs import notebook_path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_SILENT = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
_KERNEL = """() => [...window.jupyterapp.shell.widgets('main')]
    .map(widget => widget.sessionContext?.session?.kernel?.status).find(status => status) ?? 'none'"""


def missing() -> str:
    """Why no browser can be driven here; empty where one can."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install -e '.[browser]'"
    return "" if CHROMIUM else "no chromium on the PATH: install the distribution's package chromium"


def prepare(name: str, folder: Path, parameters: Mapping[str, Any]) -> Path:
    """A copy of a notebook of the project with other parameters."""
    path = folder / f"{name}.ipynb"
    papermill.execute_notebook(
        notebook_path(name), path, parameters=dict(parameters), kernel_name="python3", prepare_only=True
    )
    return path


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """JupyterLab over the notebooks in `folder`, with settings, runtime files and data of its own.

    Yields:
        Its address.
    """
    private = folder / ".jupyter"
    places = ("CONFIG_DIR", "RUNTIME_DIR", "DATA_DIR")
    environment = {**os.environ, **{f"JUPYTER_{place}": str(private / place.lower()) for place in places}}
    environment |= {"IPYTHONDIR": str(private / "ipython")}
    for place in ("SETTINGS", "WORKSPACES"):
        environment[f"JUPYTERLAB_{place}_DIR"] = str(private / place.lower())
    settings = private / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(_SILENT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address, server, folder / "server.log")
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/api/status", timeout=5)
            return
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A playwright page, 1600 x 1300, in a fresh profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try:
            page = chromium.new_page(viewport={"width": 1600, "height": 1300})
            page.set_default_timeout(120_000)
            yield page
        finally:
            chromium.close()


def run_all(page: Any, address: str, notebook: Path, seconds: float = 240) -> None:
    """Open a notebook, alone on the screen, and run all its cells."""
    page.goto(f"{address}/doc/tree/{notebook.name}?reset")
    page.wait_for_function(f"() => window.jupyterapp && ({_KERNEL})() === 'idle'")
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    wait_for_kernel(page, seconds)


def wait_for_kernel(page: Any, seconds: float = 60) -> None:
    """Until the kernel itself says that it is idle, and what it sent is on the screen."""
    page.wait_for_function(f"() => ({_KERNEL})() === 'idle'", timeout=1000 * seconds)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
