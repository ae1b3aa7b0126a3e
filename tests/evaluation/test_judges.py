"""A judge behind an endpoint, against a real server on this machine."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl_vlm.errors import PerlVlmError
from perl_vlm.types import Example, ImageSlot, Message
from perl_vlm_eval.judges import TOKEN, EndpointJudge, is_endpoint, read_verdict


class Green:
    def load(self) -> Image.Image:
        return Image.new("RGB", (4, 4), "green")


EXAMPLES = [
    Example("a", (Message("user", ("What is {first}?",)),), (), "yes"),
    Example("b", (Message("user", (ImageSlot(), "Which colour?")),), (Green(),), None),
]


class Server:
    """Says what ``judge`` makes of the text it is sent, and counts."""

    def __init__(self) -> None:
        self.judge: Callable[[str], Any] = lambda text: "A"
        self.asked: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append({"path": self.path, **given})
                outer.tokens.append(self.headers.get("Authorization"))
                said = outer.judge(given["messages"][0]["content"][-1]["text"])
                body = said if isinstance(said, bytes) else json.dumps(
                    {"choices": [{"message": {"content": said}}]}
                ).encode()  # fmt: skip
                self.send_response(outer.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.given = f"openai:http://127.0.0.1:{self.http.server_port}/v1#good-judge"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv(TOKEN, raising=False)
    running = Server()
    yield running
    running.close()


def likes(word: str) -> Callable[[str], str]:
    """Prefers the answer with a word in it."""

    def judge(text: str) -> str:
        first, second = text.split("[Answer A]")[1].split("[Answer B]")
        if (word in first) == (word in second):
            return "Both alike.\nTIE"
        return f"It has it.\n\n**{'A' if word in first else 'B'}**\n"

    return judge


def test_a_win_is_one_in_both_orders(server: Server, tmp_path: Path) -> None:
    server.judge = likes("green")
    judge = EndpointJudge(server.given, tmp_path)
    assert judge.compare(EXAMPLES, ["red", "it is green"], ["green!", "red"]) == [1.0, 0.0]
    assert judge.compare(EXAMPLES, ["red", "red"], ["blue", "green"]) == [0.5, 1.0]
    assert {one["path"] for one in server.asked} == {"/v1/chat/completions"}
    assert {one["model"] for one in server.asked} == {"good-judge"}


def test_judges_of_one_name_are_told_apart(server: Server, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("{prompt} {first} {second}")
    same, elsewhere = (
        EndpointJudge(server.given, tmp_path),
        EndpointJudge("openai:http://other/v1#good-judge", tmp_path),
    )
    told = EndpointJudge(server.given, tmp_path, own=own)
    assert same.identity == EndpointJudge(server.given, tmp_path / "cache").identity
    assert len({same.identity, elsewhere.identity, told.identity}) == 3
    assert {same.name, elsewhere.name, told.name} == {"good-judge"}


def test_a_judge_that_likes_the_first_answer_gives_ties(server: Server, tmp_path: Path) -> None:
    server.judge = lambda text: "A"
    assert EndpointJudge(server.given, tmp_path).compare(EXAMPLES, ["x", "y"], ["z", "w"]) == [0.5, 0.5]


def test_pictures_texts_and_the_token_arrive(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "secret-1")
    judge = EndpointJudge(server.given, tmp_path)
    judge.compare(EXAMPLES, ["one {second}", "two"], ["three", "four"])
    assert set(server.tokens) == {"Bearer secret-1"}
    contents = [one["messages"][0]["content"] for one in server.asked]
    texts = [content[-1]["text"] for content in contents]
    assert any("What is {first}?" in text and "one {second}" in text and "three" in text for text in texts)
    assert any("[A right answer]\nyes" in text for text in texts)
    pictures = [part["image_url"]["url"] for content in contents for part in content if part["type"] == "image_url"]
    assert len(pictures) == 2
    with Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2]))) as picture:
        assert picture.getpixel((0, 0)) == (0, 128, 0)
    assert not any("secret-1" in path.read_text() for path in tmp_path.rglob("*.json"))


def test_nothing_is_asked_twice(server: Server, tmp_path: Path) -> None:
    first = EndpointJudge(server.given, tmp_path).compare(EXAMPLES, ["x", "y"], ["z", "w"])
    asked = len(server.asked)
    assert asked == 4
    server.judge = lambda text: "B"
    assert EndpointJudge(server.given, tmp_path).compare(EXAMPLES, ["x", "y"], ["z", "w"]) == first
    assert len(server.asked) == asked
    EndpointJudge(server.given, tmp_path).compare(EXAMPLES, ["x", "other"], ["z", "w"])
    assert len(server.asked) == asked + 2


def test_a_little_nonsense_is_a_tie_and_much_is_an_error(server: Server, tmp_path: Path) -> None:
    examples = [Example(str(place), EXAMPLES[0].messages) for place in range(10)]
    answers = [str(place) for place in range(10)]
    server.judge = lambda text: "who knows" if "[Answer A]\n3\n" in text else likes("!")(text)
    judge = EndpointJudge(server.given, tmp_path / "one")
    found = judge.compare(examples, answers, [f"{answer}!" for answer in answers])
    assert found == [1.0, 1.0, 1.0, 0.5] + [1.0] * 6
    assert judge.warnings == ["the judge good-judge gave no verdict in 1 of 20 answers: ties"]
    server.judge = lambda text: "I cannot compare them."
    with pytest.raises(PerlVlmError, match="no verdict in 20 of 20"):
        EndpointJudge(server.given, tmp_path / "two").compare(examples, answers, answers[::-1])


def test_what_no_server_of_the_kind_would_say(server: Server, tmp_path: Path) -> None:
    server.judge = lambda text: b"<html>hello</html>"
    with pytest.raises(PerlVlmError, match="OpenAI-compatible"):
        EndpointJudge(server.given, tmp_path).compare(EXAMPLES, ["x", "y"], ["z", "w"])
    server.judge = lambda text: b'{"rewards": [1]}'
    with pytest.raises(PerlVlmError, match="an object with 'rewards'"):
        EndpointJudge(server.given, tmp_path).compare(EXAMPLES, ["x", "y"], ["z", "w"])


def test_one_that_is_down_is_named(tmp_path: Path) -> None:
    judge = EndpointJudge("openai:http://127.0.0.1:9/v1#gone", tmp_path, retries=0, timeout=2)
    with pytest.raises(PerlVlmError, match=r"the judge http://127\.0\.0\.1:9/v1"):
        judge.compare(EXAMPLES, ["x", "y"], ["z", "w"])


@pytest.mark.parametrize(
    "given", ["openai:127.0.0.1/v1#m", "openai:http://h/v1", "openai:http://u:p@h/v1#m", "openai:http://h/v1?key=1#m"]
)
def test_addresses_that_cannot_be_used(given: str, tmp_path: Path) -> None:
    assert is_endpoint(given)
    with pytest.raises(PerlVlmError, match=TOKEN):
        EndpointJudge(given, tmp_path)


def test_a_template_without_places_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Which is better: {first} or something else?")
    with pytest.raises(PerlVlmError, match="no place for prompt, second"):
        EndpointJudge("openai:http://h/v1#m", tmp_path, own=tmp_path / "t.txt")


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("Because.\nA", "A"), ("b", "B"), ("\n**TIE**\n\n", "TIE"), ("Final verdict: (B).", "B"), ("Answer: A", "A"),
        ("A is better", None), ("", None), ("A\nor so", None), ("AB", None),
    ],
)  # fmt: skip
def test_reading_verdicts(said: str, verdict: str | None) -> None:
    assert read_verdict(said) == verdict
