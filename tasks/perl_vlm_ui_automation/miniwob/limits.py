"""How long each part of the live environment may take, in seconds: all of it in one place, since each limit
has to leave room for the others.

========== ======= =========================================================================================
LOAD_S     20      loading a page, and whatever else Playwright has a limit for. The browser is lost after it
LAUNCH_S   40      starting a browser. Where it has not started, none can be started
PATIENCE_S 60      a worker that has been at one thing for so long hangs: starting a browser, a visit, ending a
                   browser. It is killed and replaced. Scripts of a page have no other limit
CLOSING_S  10      what closing waits for all browsers; those that have not ended by then are killed
========== ======= =========================================================================================

A browser's own limits lie below the patience: it gets to say what went wrong before it is given up.
"""

from __future__ import annotations

LOAD_S = 20.0
LAUNCH_S = 40.0
PATIENCE_S = 60.0
CLOSING_S = 10.0
