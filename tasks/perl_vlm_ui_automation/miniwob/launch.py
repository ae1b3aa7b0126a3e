"""Starting Chromium: which one, and in its sandbox."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from shutil import which
from typing import Any

from perl_vlm.errors import PerlVlmError
from perl_vlm_ui_automation.miniwob.limits import LAUNCH_S
from perl_vlm_ui_automation.miniwob.pages import INSTALL

VARIABLE = "PERL_VLM_CHROMIUM"
ON_PATH = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ("--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-smooth-scrolling")
_NO_SANDBOX = re.compile("sandbox|namespace", re.IGNORECASE)

log = logging.getLogger("perl_vlm_ui_automation")


def candidates(given: str | None, variable: str | None) -> Iterator[tuple[str, str | None]]:
    """Browsers to try, in order, each with where it was named; None is Playwright's own.

    One that was named by hand is the only one tried.
    """
    if given:
        yield "task.chromium", given
    elif variable:
        yield VARIABLE, variable
    else:
        yield "Playwright", None
        for name in ON_PATH:
            path = which(name)
            if path:
                yield "PATH", path


def launch(playwright: Any, given: str | None, error: type[Exception]) -> Any:
    """Start the first browser that there is, in a sandbox wherever there can be one.

    Args:
        playwright: Playwright's.
        given: ``task.chromium``.
        error: what Playwright raises.

    Raises:
        PerlVlmError: none can be started.
    """
    until, tried = time.monotonic() + LAUNCH_S, []
    for origin, path in candidates(given, os.environ.get(VARIABLE)):
        try:
            return _start(playwright, path, error, until)
        except error as problem:
            first = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
            tried.append(f"{path or 'its own'} ({origin}): {first.strip()}")
    raise PerlVlmError(
        f"task.source is miniwob, but no Chromium could be started. Tried {'; '.join(tried)}. Install one with "
        f"`{INSTALL}` and `playwright install chromium` (or `apt install chromium`), or name one in --task.chromium or "
        f"{VARIABLE}"
    )


def _start(playwright: Any, path: str | None, error: type[Exception], until: float) -> Any:
    """Chromium refuses its sandbox to root, and needs namespaces that not every system lets it have."""
    if is_root():
        return _start_with(playwright, path, until, sandbox=False)
    try:
        return _start_with(playwright, path, until, sandbox=True)
    except error as problem:
        if not _NO_SANDBOX.search(str(problem)):
            raise
    log.warning("MiniWoB++: Chromium has no sandbox on this system and is started without one")
    return _start_with(playwright, path, until, sandbox=False)


def _start_with(playwright: Any, path: str | None, until: float, *, sandbox: bool) -> Any:
    return playwright.chromium.launch(
        executable_path=path,
        args=list(ARGUMENTS),
        chromium_sandbox=sandbox,
        headless=True,
        timeout=1000 * max(1.0, until - time.monotonic()),
        # The run decides when to stop, and needs its browsers until then.
        handle_sigint=False,
        handle_sigterm=False,
        handle_sighup=False,
    )


def is_root() -> bool:
    """Whether this process is the superuser's."""
    return hasattr(os, "geteuid") and os.geteuid() == 0


def process_of(browser: Any) -> int | None:
    """The id of the browser's process, as it says itself; None where it does not."""
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    session.detach()
    return next((int(process["id"]) for process in processes if process["type"] == "browser"), None)
