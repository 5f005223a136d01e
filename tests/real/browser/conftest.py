"""A headless Chromium that is driven by its WebDriver."""

import json
import shutil

import pytest


@pytest.fixture(scope="session")
def chromium():
    """A browser for all tests, which visits pages one after the other."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    opened.set_page_load_timeout(120)
    opened.set_script_timeout(120)
    yield opened
    opened.quit()


class Visit:
    """A page in the browser."""

    def __init__(self, chromium):
        self.chromium = chromium

    def open(self, address, *, width=1280, dark=False):
        command = self.chromium.execute_cdp_cmd
        command("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600,
        })  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        command("Emulation.setEmulatedMedia", {"features": [scheme]})
        for log in ("browser", "performance"):
            self.chromium.get_log(log)
        self.chromium.get(address)
        return self

    def run(self, script, *arguments):
        """The value that a script returns."""
        return self.chromium.execute_script(script, *arguments)

    def soon(self, script, *arguments, tries=600):
        """The value of a script once it is true; the browser draws in its own time."""
        return self.chromium.execute_async_script(
            "const done = arguments[arguments.length - 1], given = [...arguments].slice(1, -2);"
            "const script = new Function(arguments[0]); let left = arguments[arguments.length - 2];"
            "const look = () => { const found = script.apply(null, given);"
            "if (found || left-- === 0) done(found); else setTimeout(look, 50); }; look();",
            script, *arguments, tries,
        )  # fmt: skip

    def errors(self):
        """What the console shows: errors and warnings, except about how these tests read pixels."""
        shown = [entry["message"] for entry in self.chromium.get_log("browser")]
        return [message for message in shown if "willReadFrequently" not in message]

    def requests(self):
        """The addresses that the page requested, itself included."""
        messages = [
            json.loads(e["message"])["message"] for e in self.chromium.get_log("performance")
        ]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture
def visit(chromium):
    return Visit(chromium)
