"""One request to a server, with a deadline, bounded retries, a size limit and no redirects."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import reprlib
import ssl
import time
import urllib.error
import urllib.request
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from perl_vlm.errors import PerlVlmError
from perl_vlm.rollout.scorers.spec import shown

TOKEN = "PERL_VLM_REWARD_TOKEN"
"""The environment variable whose value is sent as a bearer token; it is read at each request and kept nowhere."""
MAX_ANSWER = 16 * 1024 * 1024
"""Bytes; a longer answer is refused unread."""
MAX_WAIT = 8.0
"""Seconds, the longest pause between two attempts."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_QUOTED = 500
"""Bytes of a refusal that are repeated to the user."""


class Peer(NamedTuple):
    """Who is asked."""

    name: str
    """What messages call it."""
    token: str
    """The environment variable whose value it gets as a bearer token."""
    asks: str
    """What to ask oneself where it answers with anything but JSON."""
    then: str = "continue with --resume"
    """What to do once it answers again."""


REWARD = Peer("the reward server", TOKEN, "is this the path of its reward endpoint?")


class Refused(PerlVlmError):
    """The server answered that it will not do this, and would say so again."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class _Passing(Exception):
    """A failure that may be over at the next attempt."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # A redirect could carry prompts and the token to a server that nobody named.
    def redirect_request(self, *args: Any) -> None:
        return None


def post_json(
    url: str, payload: Any, *, timeout: float, retries: int, backoff: float = 0.5, peer: Peer = REWARD
) -> Any:
    """Send ``payload`` and return the answer's JSON; see ``ask``."""
    return parse_json(ask(url, payload, timeout=timeout, retries=retries, backoff=backoff, peer=peer), url, peer)


def ask(
    url: str, payload: Any = None, *, timeout: float, retries: int, backoff: float = 0.5, peer: Peer = REWARD
) -> bytes:
    """The answer to a POST of ``payload`` as JSON, or to a GET where there is none.

    A 5xx, a 429, a timeout and a broken connection are tried again up to ``retries`` times, after ``backoff`` seconds,
    then twice as many, at most MAX_WAIT. Each attempt has a connection of its own, closed before the next, so that a
    late answer is never taken for another request's. Everything else is final: 3xx, other 4xx, an answer too long.

    Raises PerlVlmError, which names the server without the query of its URL, and the last cause; Refused, which is
    one, for a 4xx.
    """
    body = None if payload is None else json.dumps(payload, allow_nan=False).encode("ascii")
    for attempt in range(retries + 1):
        try:
            return _attempt(url, body, timeout, peer)
        except _Passing as error:
            if attempt == retries:
                raise PerlVlmError(
                    f"{peer.name} {shown(url)} failed {retries + 1} times, the last time with: {error}. Nothing was "
                    f"put in its answer's place; see the server's log, and {peer.then}"
                ) from error
        time.sleep(min(backoff * 2**attempt, MAX_WAIT))
    raise AssertionError("unreachable")


def _attempt(url: str, body: bytes | None, timeout: float, peer: Peer) -> bytes:
    """The answer's bytes. Raises _Passing or PerlVlmError."""
    headers = {"Accept": "application/json", **_authorization(peer)}
    if body is not None:
        headers["Content-Type"] = "application/json"
    # What a proxy is meant for lies outside this machine.
    local = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in LOOPBACK else []
    opener = urllib.request.build_opener(_NoRedirect, *local)
    request = urllib.request.Request(url, body, headers, method="GET" if body is None else "POST")
    deadline = time.monotonic() + timeout
    try:
        with opener.open(request, timeout=timeout) as answer:
            return _read(answer, url, deadline, peer)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(error, url, peer) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise PerlVlmError(
                f"{peer.name} {shown(url)} has a certificate that is not trusted: {error.reason.verify_message}"
            ) from error
        raise _Passing(_timed_out(timeout) if isinstance(error.reason, TimeoutError) else error.reason) from error
    except TimeoutError as error:
        raise _Passing(_timed_out(timeout)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Passing(f"{type(error).__name__}: {error}") from error


def _timed_out(timeout: float) -> str:
    return f"no whole answer within {timeout:g} s"


def _authorization(peer: Peer) -> dict[str, str]:
    token = os.environ.get(peer.token, "")
    if not token:
        return {}
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise PerlVlmError(
            f"the token in {peer.token} has blanks, line ends or other signs that no HTTP header may have"
        )
    return {"Authorization": f"Bearer {token}"}


def _read(answer: http.client.HTTPResponse, url: str, deadline: float, peer: Peer) -> bytes:
    """The body, given up at the deadline: a socket's own timeout begins anew with every byte that drips in."""
    parts, size = [], 0
    while part := answer.read1(65536):
        size += len(part)
        if size > MAX_ANSWER:
            raise PerlVlmError(f"the answer of {peer.name} {shown(url)} is longer than {MAX_ANSWER:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
        parts.append(part)
    if answer.length:
        raise _Passing(f"the answer broke off, {answer.length} bytes before its end")
    return b"".join(parts)


def _refused(error: urllib.error.HTTPError, url: str, peer: Peer) -> Exception:
    said, secret = b"", os.environ.get(peer.token) or "\0"
    with contextlib.suppress(OSError, http.client.HTTPException):
        said = error.read(_QUOTED + len(secret))  # a token that the cut goes through would be shown in part
    text = said.decode("utf-8", "replace").replace(secret, "***")[:_QUOTED]
    if error.code >= 500 or error.code == 429:
        return _Passing(f"HTTP {error.code} {error.reason}{f': {text!r}' if text else ''}")
    if error.code < 400:
        return PerlVlmError(
            f"{peer.name} {shown(url)} answered HTTP {error.code}, a redirect, which is not followed; name the "
            "address that it leads to"
        )
    hint = f". It may want a token in {peer.token}" if error.code in (401, 403) else ""
    return Refused(f"{peer.name} {shown(url)} refused the request with HTTP {error.code}: {text!r}{hint}", error.code)


def parse_json(body: bytes, url: str, peer: Peer = REWARD) -> Any:
    """The JSON of an answer. Raises PerlVlmError where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise PerlVlmError(
            f"{peer.name} {shown(url)} gave no JSON but {reprlib.repr(body[:200])}; {peer.asks}"
        ) from error
