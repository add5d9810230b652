"""The page as people get it: the command in a process of its own, and a real browser without a window."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from vreflection_hub_card.inference.checkpoints import EMBEDDED, load_checkpoint


@pytest.fixture(scope="session")
def embedded():
    """The embedded checkpoint's model and processor."""
    return load_checkpoint(EMBEDDED, "cpu")


@pytest.fixture(scope="session")
def free_port():
    """Finds a port that nobody uses just now."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def served():
    """A context in which a command serves an address; what it printed is returned by the function that it yields."""

    @contextmanager
    def serve(command, address, log, **environment):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=log.parent, env=environment, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 120
            while not answers(address):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield log.read_text
        finally:
            process.terminate()
            process.wait(30)

    return serve


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture(scope="session")
def page(served, free_port, tmp_path_factory):
    """The address of `vreflection space`, and a function that returns what it printed."""
    pytest.importorskip("gradio", reason='needs pip install "vreflection[space]"')
    port = free_port()
    command = [sys.executable, "-c", "from vreflection_training.cli import main; raise SystemExit(main())"]
    address, log = f"http://127.0.0.1:{port}/", tmp_path_factory.mktemp("page") / "log"
    with served([*command, "space", "--device", "cpu", "--port", str(port)], address, log) as printed:
        yield address, printed


@pytest.fixture(scope="session")
def new_browser(tmp_path_factory):
    """Starts browsers, each with a profile of its own."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs pip install selenium")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and chromedriver")
    started = []

    def start(width=1280, height=900):
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        quiet = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync")
        profile = f"user-data-dir={tmp_path_factory.mktemp('profile')}"
        for name in ("headless", "no-sandbox", *quiet, "disable-component-update", profile):
            options.add_argument(f"--{name}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
        started.append(browser)
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        return browser

    yield start
    for browser in started:
        browser.quit()
