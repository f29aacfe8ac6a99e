"""A real browser for the pages, and what it says of how they look."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
AA = 4.5  # WCAG 2.1, 1.4.3: the least contrast of text

Open = Callable[[str], webdriver.Chrome]


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """A browser that has never been used, with a log of all that it asks for."""
    profile = tempfile.mkdtemp(prefix="page-browser-")
    try:
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
        try:
            yield driver
        finally:
            driver.quit()
    finally:
        shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def show(browser: webdriver.Chrome, tmp_path: Path) -> Open:
    """A function that opens a page as a file, on a screen of 1100 × 900 pixels in light colours."""

    def open_page(html: str) -> webdriver.Chrome:
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        emulate(browser)
        for log in ("performance", "browser"):
            browser.get_log(log)  # type: ignore[no-untyped-call]  # which empties it
        browser.get(path.as_uri())
        return browser

    return open_page


def emulate(browser: webdriver.Chrome, scheme: str = "light", media: str = "screen", width: int = 1100) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def overflowing(browser: webdriver.Chrome, width: int) -> list[str]:
    """What lies outside of a screen of so many pixels, as HTML."""
    emulate(browser, width=width)
    widths = "const root = document.documentElement; return [root.scrollWidth - root.clientWidth, innerWidth]"
    assert [0, width] == browser.execute_script(widths)
    outside = """const width = document.documentElement.clientWidth + 1;
        return [...document.querySelectorAll('main *, header *')].filter(
            box => box.getBoundingClientRect().right > width).map(box => box.outerHTML)"""
    found: list[str] = browser.execute_script(outside)
    return found


def texts_and_colours(browser: webdriver.Chrome, scheme: str) -> list[tuple[str, str, str]]:
    """Of each text its class, its colour, and that of what is behind it. scheme: light or dark."""
    emulate(browser, scheme)
    body = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (0.5 < luminance(body)) is (scheme == "light")
    found: list[Any] = browser.execute_script(
        """const backdrop = box => {
            const colour = getComputedStyle(box).backgroundColor;
            return colour !== 'rgba(0, 0, 0, 0)' || !box.parentElement ? colour : backdrop(box.parentElement)};
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
        while (walker.nextNode()) if (walker.currentNode.data.trim()) {
            const box = walker.currentNode.parentElement;
            found.push([box.className, getComputedStyle(box).color, backdrop(box)])}
        return found"""
    )
    return [(name, colour, behind) for name, colour, behind in found]


def luminance(colour: str) -> float:
    """The relative luminance of `rgb(r, g, b)`, as WCAG defines it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    assert 3 == len(channels), colour
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)
