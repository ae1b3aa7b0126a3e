"""The report shows what it is given and nothing that it is given can act."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import os
import re
import shutil
import socket
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perl_vlm.errors import PerlVlmError
from perl_vlm.report.html import Curve, Distribution, GalleryItem, Report, render, settings_yaml, write_report

PAYLOADS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror="document.title=\'ran\'">',
    "'><svg/onload=document.title='ran'>",
    "</style></title></pre></textarea><script>document.title='ran'</script>",
    "javascript:alert(1)",
    "]]><!--",
    "-->",
    "{{7*7}}{% raw %}${7*7}",
    "$\\frac{$ \\notatexcommand",
    "_hidden",
    "\u202eright to left \x00\x07\x9b \ud800 漢字 \N{SNOWMAN}",
    "",
)
CHROMIUM = shutil.which("chromium")


def png(size: tuple[int, int] = (8, 6)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(stream, format="PNG")
    return stream.getvalue()


def sample(text: str = "plain") -> Report:
    """A report that has ``text`` in every field that holds text, of every record."""
    points = [(float(step), step / 100) for step in range(60)]
    item = GalleryItem(png(), text, text, text, text, False, True, -0.25, 0.5)
    return Report(
        title=text,
        subtitle=text,
        headline=[(text, text, text)],
        facts={text: text},
        curves=[
            Curve(text, text, {text: points, text + " b": points[:5]}, text),
            Curve(text, text, {text: [(0.0, math.nan)]}, text),
        ],
        gallery=[
            item,
            dataclasses.replace(item, image_png=None, before_right=True, after_right=False),
            dataclasses.replace(item, before="", after_right=None),
        ],
        distributions=[Distribution(text, {text: [1.0, 2.0, math.inf], text + " b": [2.5]}, text)],
        settings={text: {text: [text, 1e-4, None, True]}},
        notes=[text],
    )


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def images(self) -> list[str]:
        return [attributes["src"] for tag, attributes in self.elements if tag == "img"]


def write(folder: Path, report: Report) -> str:
    path = folder / "report.html"
    write_report(path, report)
    return path.read_text("utf-8")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_in_every_field_adds_no_element_and_no_attribute(payload: str, tmp_path: Path) -> None:
    page, clean = Page(write(tmp_path, sample(payload))), Page(write(tmp_path, sample()))
    tags = {tag for tag, _ in clean.elements}
    assert "script" not in tags
    assert {tag for tag, _ in page.elements} <= tags
    known = {(tag, name) for tag, attributes in clean.elements for name in attributes}
    found = {(tag, name) for tag, attributes in page.elements for name in attributes}
    assert found <= known
    assert not any(name.startswith("on") for _, name in found)
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,", "data:image/svg+xml;base64,"))
        assert re.fullmatch(r"(border-top: 3px \w+ #[0-9a-f]{6})?", attributes.get("style", ""))


def test_every_field_is_shown() -> None:
    fields: dict[str, str] = {}

    def label(name: str) -> str:
        return fields.setdefault(name, f"field {name} <&>")

    report = Report(
        title=label("title"),
        subtitle=label("subtitle"),
        headline=[(label("label"), label("value"), label("explanation"))],
        facts={label("fact"): label("fact value")},
        curves=[Curve(label("curve"), label("x label"), {label("series"): [(0.0, 1.0)]}, label("curve note"))],
        gallery=[GalleryItem(None, label("prompt"), label("reference"), label("before"), label("after"), None, None)],
        distributions=[Distribution(label("distribution"), {label("column"): [1.0]}, label("distribution note"))],
        settings={"key": label("setting")},
        notes=[label("note")],
    )
    text = Page(render(report)).text
    assert [value for value in fields.values() if value not in text] == []


def test_the_policy_forbids_all_but_inline_style_and_inline_pictures() -> None:
    policies = [
        attributes["content"]
        for tag, attributes in Page(render(sample())).elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert "script-src" not in policies[0]


def test_the_page_names_no_outside_address() -> None:
    page = render(sample())
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page
    assert "@import" not in page


def test_a_report_without_optional_parts_is_whole(tmp_path: Path) -> None:
    page = Page(write(tmp_path, Report("Only a title")))
    assert page.text.count("Only a title") == 2
    tags = [tag for tag, _ in page.elements]
    assert "section" not in tags
    assert "img" not in tags
    assert {"html", "head", "body", "main", "h1"} <= set(tags)


def test_equal_reports_give_equal_bytes(tmp_path: Path) -> None:
    assert write(tmp_path, sample()) == write(tmp_path, sample())


def test_nothing_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "USER"):
        monkeypatch.setenv(name, "canary-5f1c")
    page = write(tmp_path, sample())
    pictures = [base64.b64decode(source.partition(",")[2]) for source in Page(page).images]
    assert "canary-5f1c" not in page
    assert all(b"canary-5f1c" not in picture for picture in pictures)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write(tmp_path, Report("old"))

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path / "report.html", Report("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text("utf-8") == before


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_report(tmp_path / "runs" / "a" / "report.html", Report("title"))
    assert (tmp_path / "runs" / "a" / "report.html").is_file()


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (False, True, ["✗ wrong", "✓ right", "became right"]),
        (True, False, ["✓ right", "✗ wrong", "became wrong"]),
        (True, True, ["✓ right", "✓ right", "stayed right"]),
        (False, False, ["✗ wrong", "✗ wrong", "stayed wrong"]),
        (None, True, ["✓ right"]),
        (None, None, []),
    ],
)
def test_right_and_wrong_are_said_in_words(before: bool | None, after: bool | None, words: list[str]) -> None:
    text = Page(render(Report("t", gallery=[GalleryItem(None, "q", None, "a", "b", before, after)]))).text
    shown = text.partition("q before a")[2]
    assert re.findall(r"✗ wrong|✓ right|became \w+|stayed \w+", shown) == words


@pytest.mark.parametrize(
    ("rewards", "shown"),
    [
        ((-0.25, 0.5), "reward \N{MINUS SIGN}0.25 → 0.5 (+0.75)"),
        ((0.5, -0.25), "reward 0.5 → \N{MINUS SIGN}0.25 (\N{MINUS SIGN}0.75)"),
        ((0.5, 0.53), "reward 0.5 → 0.53 (+0.03)"),
        ((None, 0.5), "reward unknown → 0.5"),
        ((math.nan, math.inf), "reward not finite → not finite"),
    ],
)
def test_the_reward_change_is_signed(rewards: tuple[float | None, float | None], shown: str) -> None:
    item = GalleryItem(None, "q", None, "a", "b", None, None, *rewards)
    assert Page(render(Report("t", gallery=[item]))).text.endswith(shown)


def test_an_empty_answer_is_told_from_the_words_empty_answer() -> None:
    page = render(Report("t", gallery=[GalleryItem(None, "q", None, "", "empty answer", None, None)]))
    assert page.count('<em class="empty">empty answer</em>') == 1
    assert page.count('dir="auto">empty answer</span>') == 1


@pytest.mark.parametrize(
    ("answer", "card", "gallery"),
    [("yes", "panel card", "grid gallery"), ("w" * 15, "panel card long", "grid gallery"),
     ("w" * 161, "panel card long", "grid gallery wide")],
)  # fmt: skip
def test_long_answers_get_room(answer: str, card: str, gallery: str) -> None:
    page = Page(render(Report("t", gallery=[GalleryItem(None, "q", None, "a", answer, None, None)])))
    classes = [attributes.get("class") for _, attributes in page.elements]
    assert card in classes
    assert gallery in classes


def test_pictures_are_kept_to_the_byte_and_only_tiny_ones_get_hard_pixels() -> None:
    pictures = [png((64, 64)), png((640, 20))]
    items = [GalleryItem(data, "q", None, "a", "b", None, None) for data in pictures]
    page = Page(render(Report("t", gallery=items)))
    assert [base64.b64decode(source.partition(",")[2]) for source in page.images] == pictures
    classes = [attributes["class"] for tag, attributes in page.elements if tag == "img"]
    assert classes == ["picture small", "picture"]


@pytest.mark.parametrize(
    "data", [b"", b"<svg onload=alert(1)>", b"\xff\xd8\xff\xe0 a JPEG file, not a PNG", png()[:20]]
)
def test_a_picture_that_is_no_png_is_refused_by_number(data: bytes) -> None:
    item = GalleryItem(png(), "q", None, "a", "b", None, None)
    with pytest.raises(PerlVlmError, match="gallery item 2: a PNG file was expected"):
        render(Report("t", gallery=[item, dataclasses.replace(item, image_png=data)]))


def test_control_characters_are_shown_and_never_written() -> None:
    page = render(Report("bell\x07 nul\x00 tab\tline\nreturn\r c1\x9b"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    assert "bell\N{SYMBOL FOR BELL} nul\N{SYMBOL FOR NULL} tab\tline\nreturn c1\N{REPLACEMENT CHARACTER}" in page


NO_DATA: list[Any] = [{}, {"a": []}, {"a": [(0.0, math.nan), (math.inf, 1.0)]}, {"a": [(0, None), (1, 10**400)]}]


@pytest.mark.parametrize("series", NO_DATA)
def test_a_curve_without_finite_points_says_no_data(series: Any) -> None:
    page = Page(render(Report("t", curves=[Curve("c", "step", series)])))
    assert "no data" in page.text
    assert page.images == []


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [math.nan, -math.inf]}])
def test_a_distribution_without_finite_values_says_no_data(series: Any) -> None:
    page = Page(render(Report("t", distributions=[Distribution("d", series)])))
    assert "no data" in page.text
    assert page.images == []


def test_values_that_are_not_finite_are_counted() -> None:
    curve = Curve("c", "step", {"a": [(0, 1.0), (1, math.nan), (2, 3.0)], "b": [(0, math.inf)]})
    assert "2 values not finite" in Page(render(Report("t", curves=[curve]))).text
    column = Distribution("d", {"a": [1.0, math.nan]})
    assert "1 value not finite" in Page(render(Report("t", distributions=[column]))).text


def test_settings_are_yaml_that_reads_back() -> None:
    import yaml

    @dataclasses.dataclass
    class Knobs:
        lr: float = 1e-4
        path: Path = Path("data")

    settings = {"z": Knobs(), "a": (1, np.float32(0.5), np.int64(3)), "text": "- [x]: # ---\n...", "none": None}
    text = settings_yaml(settings)
    assert text.startswith("z:")
    read = yaml.safe_load(text)
    assert float(read["z"].pop("lr")) == 1e-4
    assert read == {"z": {"path": "data"}, "a": [1, 0.5, 3], "text": "- [x]: # ---\n...", "none": None}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine to open the report with")
def test_a_browser_runs_no_payload_and_requests_nothing(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    everything = " ".join(PAYLOADS).replace("alert(1)", "document.title='ran'")
    everything += f"\"><img src='http://127.0.0.1:{listener.getsockname()[1]}/'>"
    write_report(tmp_path / "report.html", dataclasses.replace(sample(everything), title="untouched"))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode("utf-8", "replace")
    with listener, pytest.raises(BlockingIOError):
        listener.accept()
    page = Page(dom)
    assert re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1] == "untouched"  # type: ignore[index]
    assert "script" not in {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "javascript:document.title" in page.text
