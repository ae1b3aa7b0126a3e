"""Judges behind an OpenAI-compatible endpoint: two answers, both orders, one verdict.

The verdict of a pair is a win only where the judge prefers the same answer in both orders, and a tie otherwise, as in
PE-RLHF (2403.10704): judges like the answer that they read first. What an endpoint said is kept on disk by the hash of
all it was asked, so that nothing is asked (and paid) twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag

from perl_vlm.data.images import to_png_bytes
from perl_vlm.errors import PerlVlmError
from perl_vlm.report.files import write_atomically
from perl_vlm.rollout.scorers.spec import shown
from perl_vlm.rollout.scorers.transport import Peer, post_json
from perl_vlm.types import Example, ImageSource

PREFIX = "openai:"
TOKEN = "PERL_VLM_JUDGE_TOKEN"
PEER = Peer(
    "the judge",
    TOKEN,
    "is this the root of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1?",
    "give the same command again",
)
NONSENSE = 0.2
"""The share of unreadable verdicts above which nothing is made of the rest."""

_VERDICT = re.compile(r"\**\(?(A|B|TIE)\)?\**\.?", re.IGNORECASE)


def is_endpoint(given: str) -> bool:
    """Whether a judge is ``openai:URL#MODEL``."""
    return given.startswith(PREFIX)


def check_endpoint(given: str) -> tuple[str, str]:
    """URL and model of ``openai:URL#MODEL``. Raises PerlVlmError for an address that cannot be used."""
    url, model = urldefrag(given.removeprefix(PREFIX))
    if not url.startswith(("http://", "https://")) or not model or "@" in url or "?" in url:
        raise PerlVlmError(
            f"the judge {PREFIX}{shown(url)} cannot be used; write {PREFIX}http://HOST:PORT/v1#MODEL. Its key goes "
            f"into the environment variable {TOKEN}"
        )
    return url, model


class Endpoint:
    """A model behind ``URL/chat/completions``.

    Args:
        given: ``openai:http(s)://HOST/v1#MODEL``.
        cache: a folder for what it said.
        timeout: seconds that one request may take.
        retries: further attempts after a failure that may pass.
        stop: called before each request; raises where the work should end.

    Raises PerlVlmError for an address that cannot be used.
    """

    def __init__(
        self,
        given: str,
        cache: Path,
        *,
        timeout: float = 120.0,
        retries: int = 4,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        url, self.model = check_endpoint(given)
        self.url, self.cache, self._stop = url.rstrip("/") + "/chat/completions", cache, stop
        self.limits: dict[str, Any] = {"timeout": timeout, "retries": retries}

    def ask(
        self, text: str, images: Sequence[ImageSource] = (), readable: Callable[[str], bool] = lambda said: True
    ) -> str:
        """What it says to a text with pictures before it. What is not ``readable`` is not kept: another time it may
        answer better. Raises PerlVlmError where it fails for good."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(source)}"}} for source in images
        ]
        content.append({"type": "text", "text": text})
        payload = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        digest = hashlib.sha256(json.dumps([self.url, payload], sort_keys=True).encode()).hexdigest()
        kept = self.cache / digest[:2] / f"{digest}.json"
        if kept.is_file():
            known: str = json.loads(kept.read_text(encoding="utf-8"))["said"]
            return known
        self._stop()
        said = _content(post_json(self.url, payload, peer=PEER, **self.limits), self.model)
        if readable(said):
            write_atomically(kept, json.dumps({"judge": self.model, "said": said}))
        return said


def instructions(name: str, own: Path | None = None) -> str:
    """What judges are told: the text of ``prompts/NAME.txt``, or of a file of the user's.

    Raises PerlVlmError where that cannot be read.
    """
    if own is None:
        return files("perl_vlm_eval").joinpath(f"prompts/{name}.txt").read_text(encoding="utf-8")
    try:
        return own.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PerlVlmError(f"the judge's template {own} cannot be read: {error}") from error


def template(name: str, places: Sequence[str], own: Path | None = None) -> Callable[..., str]:
    """The instructions of ``prompts/NAME.txt``, or of a file of the user's, to be filled in by name. Braces in what is
    filled in stay as they are.

    Raises PerlVlmError where a place is missing.
    """
    text = instructions(name, own)
    missing = [place for place in places if f"{{{place}}}" not in text]
    if missing:
        raise PerlVlmError(f"the judge's template {own or name} has no place for {', '.join(missing)}")

    def fill(**values: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), text)

    return fill


def pairwise(own: Path | None = None) -> Callable[..., str]:
    """The instructions of ``EndpointJudge``, to be filled in. Raises PerlVlmError where they cannot be used."""
    return template("pairwise", ("prompt", "first", "second"), own)


class EndpointJudge:
    """Asks an endpoint which of two answers is better.

    Args:
        given, cache, timeout, retries, stop: as of ``Endpoint``.
        own: a file with instructions of one's own, which holds ``{prompt}``, ``{first}`` and ``{second}``, and
            may hold ``{reference}``.
        requests: how many run at once.

    Raises PerlVlmError for an address or instructions that cannot be used.
    """

    def __init__(self, given: str, cache: Path, *, own: Path | None = None, requests: int = 8, **settings: Any) -> None:
        self.endpoint = Endpoint(given, cache, **settings)
        self.name, self.requests = self.endpoint.model, requests
        self._fill = pairwise(own)
        told = [self.endpoint.url, self.name, instructions("pairwise", own)]
        self.identity = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
        """What tells whether two runs had the same judge, told the same."""
        self.warnings: list[str] = []

    def compare(self, examples: Sequence[Example], before: Sequence[str], after: Sequence[str]) -> list[float]:
        """[n] 1 where ``after`` is preferred in both orders, 0 where ``before`` is, a half otherwise.

        Raises PerlVlmError where the endpoint fails for good, or where too many of its answers hold no verdict; fewer
        of them count as ties and are told in ``warnings``. What it said until then is kept.
        """
        asked = [
            (example, *order) for example, one, other in zip(examples, before, after, strict=True)
            for order in ((one, other), (other, one))
        ]  # fmt: skip
        with ThreadPoolExecutor(self.requests) as pool:
            said = list(pool.map(lambda each: self._verdict(*each), asked))
        unread = sum(one is None for one in said)
        if unread > NONSENSE * len(said):
            raise PerlVlmError(
                f"the judge {self.name} gave no verdict in {unread} of {len(said)} answers, where a last line of A, B "
                "or TIE was asked for; take a judge that follows instructions, or give it other ones"
            )
        if unread:
            self.warnings.append(f"the judge {self.name} gave no verdict in {unread} of {len(said)} answers: ties")
        preferred = {("B", "A"): 1.0, ("A", "B"): 0.0}
        pairs = zip(said[::2], said[1::2], strict=True)
        return [preferred.get((straight or "", turned or ""), 0.5) for straight, turned in pairs]

    def _verdict(self, example: Example, first: str, second: str) -> str | None:
        """``A``, ``B`` or ``TIE``; None where there is none to be read."""
        reference = f"\n[A right answer]\n{example.reference}\n" if example.reference else ""
        text = self._fill(prompt=dialogue(example), reference=reference, first=first, second=second)
        return read_verdict(self.endpoint.ask(text, example.images, lambda said: read_verdict(said) is not None))


def dialogue(example: Example) -> str:
    """A prompt as plain text, a turn a line."""
    return "\n".join(f"{message.role}: {message.text}" for message in example.messages)


def last_line(said: str) -> str:
    """The last line that is not empty, without what often stands before a verdict."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if not lines:
        return ""
    return re.sub(r"^(the )?(final )?(verdict|answer|better answer)( is)?\s*:?\s*", "", lines[-1], flags=re.IGNORECASE)


def read_verdict(said: str) -> str | None:
    """The verdict on the last line; ``A``, ``B`` or ``TIE``, None where it holds anything else."""
    found = _VERDICT.fullmatch(last_line(said))
    return found[1].upper() if found else None


def _content(answer: Any, name: str) -> str:
    try:
        said = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        said = None
    if not isinstance(said, str):
        what = (
            f"an object with {', '.join(map(repr, list(answer)[:8]))}"
            if isinstance(answer, Mapping)
            else repr(answer)[:80]
        )
        raise PerlVlmError(
            f'the judge {name} answered with {what}, where {{"choices": [{{"message": {{"content": "..."}}}}]}} was '
            "expected"
        )
    return said


def _png(source: Any) -> str:
    return base64.b64encode(to_png_bytes(source.load())).decode("ascii")
