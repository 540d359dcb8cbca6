"""A headless browser for tests. A test module uses it with `pytest_plugins = ["browser"]` and the fixtures below.

A page opened through `browser_page` is watched: an error in its console, a request that failed or one that left the
page's own server fails the test, without a line in the test."""

import functools
import hashlib
import http.server
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Watched:
    "Pages of a browser, and what they complained of."

    def __init__(self, browser):
        self.browser, self.pages, self.problems = browser, [], []

    def __call__(self, address, width=1280, height=900, dark=False):
        """Open a file or an address and return Playwright's page. The width is that of the window; `dark` what the
        system asks for."""
        if not isinstance(address, str):
            address = Path(address).resolve().as_uri()
        home = urlsplit(address)
        page = self.browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        ).new_page()
        self.pages.append(page)

        def asked(request):
            target = urlsplit(request.url)
            if target.scheme not in ("data", "blob", "about") and (target.scheme, target.netloc) != (
                home.scheme,
                home.netloc,
            ):
                self.problems.append(f"asked outside: {request.url}")

        page.on("request", asked)
        page.on(
            "requestfailed",
            lambda request: (
                request.failure == "net::ERR_ABORTED"
                or self.problems.append(f"failed: {request.url} {request.failure}")
            ),
        )  # aborted: the page was left, the icon may still be on its way
        page.on(
            "response",
            lambda response: response.status < 400 or self.problems.append(f"{response.status}: {response.url}"),
        )
        page.on(
            "console",
            lambda message: (
                message.type not in ("error", "warning")
                or self.problems.append(f"{message.type} in the console: {message.text}")
            ),
        )
        page.on("pageerror", lambda error: self.problems.append(f"script failed: {error}"))
        page.goto(address)
        return page

    def close(self):
        for page in self.pages:
            page.context.close()
        self.pages.clear()


def overflow(page) -> int:
    "By how many pixels the page is wider than the window; wide things may scroll inside."
    return page.evaluate("document.scrollingElement.scrollWidth - document.documentElement.clientWidth")


def contrast(page, selector: str) -> float:
    """Contrast between an element's text and the nearest background behind it, after the formula of the web's
    accessibility guidelines."""
    text, behind = page.evaluate(
        """selector => { let e = document.querySelector(selector), text = getComputedStyle(e).color, c;
           do { c = getComputedStyle(e).backgroundColor; e = e.parentElement } while (e && /^rgba\\(.*, 0\\)$/.test(c));
           return [text, c] }""",
        selector,
    )

    def luminance(colour):
        parts = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        return sum(
            w * (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4)
            for w, v in zip((0.2126, 0.7152, 0.0722), parts)
        )

    low, high = sorted((luminance(text), luminance(behind)))
    return (high + 0.05) / (low + 0.05)


def _answers(program: str) -> bool:
    "Whether it is there and starts: some distributions put a script there that asks for another installation."
    return bool(shutil.which(program)) and subprocess.run([program, "--version"], capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def chromium():
    "The system's browser without a window. Where there is none, the test is skipped."
    program = next(filter(_answers, PROGRAMS), None)
    if program is None:
        pytest.skip(
            f"no browser on this machine (looked for {', '.join(PROGRAMS)}); on Debian: apt-get install chromium"
        )
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="the Python package playwright is missing; pip install -e '.[docs]'"
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which(program), args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def browser_page(chromium):
    """Function (file or address, width=1280, height=900, dark=False) -> page. What the pages complained of fails the
    test at its end."""
    watched = Watched(chromium)
    yield watched
    watched.close()
    assert not watched.problems, "\n".join(watched.problems)


@pytest.fixture(scope="session")
def site():
    "The folder of the built site. It is built now unless one newer than everything it is made from is there."
    if any(
        importlib.util.find_spec(name) is None
        for name in ("sphinx", "myst_parser", "furo", "sphinx_copybutton", "latex2mathml")
    ):
        pytest.skip("the site's packages are missing; pip install -e '.[docs]'")
    build = [sys.executable, str(ROOT / "docs" / "make_site.py"), "--if-older"]
    with FileLock(
        Path(tempfile.gettempdir()) / f"site-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]}.lock"
    ):  # several test processes share the folder
        done = subprocess.run(build, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return ROOT / "_docs"


@pytest.fixture(scope="session")
def served_site(site):
    "The address under which the site is served while the tests run."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
