"""A real browser for the page: Debian's Chromium, or one of its relatives, without a window."""

import contextlib
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def found():
    """Where a browser is, or `None`."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@contextlib.contextmanager
def browsing():
    """A browser; skips the test where there is none, or nothing to drive it with."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if found() is None:
        pytest.skip("needs Chromium: apt install chromium")
    with driver.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=found(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def looking(browser, base, **settings):
    """A page at `base`; anything that it says on its console is a fault."""
    size = {"width": 1280, "height": 800}
    context = browser.new_context(viewport=size, reduced_motion="reduce", **settings)
    page = context.new_page()
    page.set_default_timeout(30_000)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if is_fault(line) else None)
    try:
        page.goto(base)
        yield page
        assert faults == []
    finally:
        context.close()


def is_fault(line):
    """Chromium itself logs every answer that is an error; what the page makes of it is tested."""
    return line.type in ("error", "warning") and "Failed to load resource" not in line.text
