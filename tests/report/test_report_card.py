"""The model card is read by hubs and by people, and no value can leave its place in it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from perl_vlm.report.card import write_model_card

# As huggingface_hub finds the front matter of a card.
FRONT_MATTER = re.compile(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\r|\n|$))")

PAYLOADS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[click](javascript:alert(1))",
    "![x](https://example.org/x.png)",
    "<https://example.org>",
    "https://example.org www.example.org",
    "a | b | c",
    "`code` ``` ~~~",
    "x\n---\nlicense: stolen\n---\n# heading",
    "\n```\n</code>\n<script>alert(1)</script>\n````\n",
    "\n    indented\n\n- item\n\n# heading\n\n| a |\n| --- |\n",
    "- 1. + nested",
    "1. nested",
    "---",
    "]]> {{7*7}} &lt;b&gt; \\",
    "&#60;script&#62;",
    "*bold* _low_ ~~gone~~ $x$",
    "yes",
    "\u2028---\u2028\x85 \x00 \ud800 漢字",
)


def card(folder: Path, **changes: Any) -> str:
    values: dict[str, Any] = {
        "title": "A policy",
        "base_model": "someone/some-model",
        "base_revision": "abc123",
        "stage": "ppo",
        "task": "vqa",
        "license": "apache-2.0",
        "metrics": {"policy/accuracy": 0.25, "gain/accuracy": 0.125},
        "ci95": {"gain/accuracy": (0.0625, 0.1875)},
        "parameters": {"total": 1500000, "trainable": {"policy": {"vision": 61440}}},
        "command": "perl-vlm vqa run",
        "versions": {"torch": "2.6.0"},
        "how_to_load": "import peft",
        "limits": ["Knows shapes only."],
        "settings": {"seed": 0},
    }
    write_model_card(folder / "README.md", **(values | changes))
    return (folder / "README.md").read_text("utf-8")


def payload_card(folder: Path, text: str) -> str:
    return card(
        folder,
        title=text,
        base_model=text,
        base_revision=text,
        stage=text,
        task=text,
        license=text,
        metrics={text: 0.5},
        ci95={text: (0.25, 0.75)},
        parameters={text: {text: 7}},
        command=text,
        versions={text: text},
        how_to_load=text,
        limits=[text, text],
        settings={text: [text]},
        pipeline_tag=text,
    )


def front_matter(page: str) -> dict[str, Any]:
    found = FRONT_MATTER.match(page)
    assert found is not None
    return yaml.safe_load(found[2])


def body(page: str) -> str:
    found = FRONT_MATTER.match(page)
    assert found is not None
    return page[found.end() :]


def test_the_front_matter_says_what_hubs_ask_for(tmp_path: Path) -> None:
    assert front_matter(card(tmp_path)) == {
        "base_model": "someone/some-model",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "image-text-to-text",
        "tags": ["perl-vlm", "lora", "ppo", "vqa"],
    }


@pytest.mark.parametrize(("stage", "tag"), [("rm", "reward-model"), ("ppo", "ppo"), ("run", "ppo"), ("sft", "sft")])
def test_the_stage_is_a_tag(stage: str, tag: str, tmp_path: Path) -> None:
    assert front_matter(card(tmp_path, stage=stage))["tags"] == ["perl-vlm", "lora", tag, "vqa"]


def test_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    page = card(tmp_path, license=None, base_revision=None, limits=[], metrics={}, ci95={}, versions={}, settings={})
    assert "license" not in front_matter(page)
    assert "| base revision | not pinned |" in page
    assert not re.search("## (Limits|Measured|Settings)", page)


@pytest.mark.parametrize(
    ("base_model", "in_front"),
    [("gpt2", True), ("org/model-1.5_b", True), ("/models/mine", False), ("../mine", False), ("C:\\mine", False)],
)
def test_only_names_that_a_hub_can_know_stand_in_the_front_matter(
    base_model: str, in_front: bool, tmp_path: Path
) -> None:
    assert ("base_model" in front_matter(card(tmp_path, base_model=base_model))) is in_front


def test_figures_are_shown_with_their_intervals(tmp_path: Path) -> None:
    page = card(tmp_path, metrics={"gain/accuracy": 0.125, "policy/kl": math.nan, "x": math.inf})
    assert "| gain/accuracy | 0.125 | 0.0625 to 0.1875 |" in page
    assert "| policy/kl | not measured |  |" in page
    assert "| x | not measured |  |" in page
    assert "| trainable / policy / vision | 61,440 |" in page


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_front_matter_holds_a_payload_as_plain_text(payload: str, tmp_path: Path) -> None:
    front = front_matter(payload_card(tmp_path, payload))
    line = " ".join(payload.split()).replace("\ud800", "\\ud800")
    assert set(front) <= {"base_model", "library_name", "license", "pipeline_tag", "tags"}
    assert front["license"] == front["pipeline_tag"] == payload_line(line)
    assert front["tags"] == ["perl-vlm", "lora", payload_line(line), payload_line(line)]


def payload_line(line: str) -> str:
    """A lone surrogate stands in YAML as an escape, which reads back as itself."""
    return line.replace("\\ud800", "\ud800")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_in_every_field_makes_no_markup(payload: str, tmp_path: Path) -> None:
    markdown = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed to read the card with")
    # Inline HTML on, as on hubs before they clean it; tables and strikethrough are their dialect.
    reader = markdown.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    kinds = [token.type for token in walk(reader.parse(body(payload_card(tmp_path, payload))))]
    clean = [token.type for token in walk(reader.parse(body(payload_card(tmp_path, "plain"))))]
    ignored = {"text", "text_special", "softbreak"}
    assert [kind for kind in kinds if kind not in ignored] == [kind for kind in clean if kind not in ignored]


def walk(tokens: Any) -> Any:
    for token in tokens:
        yield token
        yield from walk(token.children or [])


@pytest.mark.parametrize("payload", PAYLOADS)
def test_markdown_shows_a_payload_literally(payload: str, tmp_path: Path) -> None:
    markdown = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed to read the card with")
    reader = markdown.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = reader.parse(body(card(tmp_path, title="A " + payload, limits=["A " + payload])))
    shown = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    line = "A " + " ".join(payload.split()).replace("\x00", "\ufffd").replace("\ud800", "\\ud800")
    assert shown.count(line) == 2


def test_code_that_holds_fences_stays_inside_its_fence(tmp_path: Path) -> None:
    code = "a = 1\n```\n# not a heading\n`````\nb = 2"
    assert f"``````python\n{code}\n``````" in card(tmp_path, how_to_load=code)


def test_bare_addresses_do_not_become_links(tmp_path: Path) -> None:
    page = body(card(tmp_path, title="https://example.org", limits=["see WWW.example.org"]))
    assert "https://" not in page
    assert "WWW." not in page


def test_settings_are_shown_as_yaml(tmp_path: Path) -> None:
    page = card(tmp_path, settings={"ppo": {"lr": 0.5, "targets": ("a", "b")}})
    shown = re.search(r"```yaml\n(.*?)\n```", page, re.DOTALL)
    assert shown is not None
    assert yaml.safe_load(shown[1]) == {"ppo": {"lr": 0.5, "targets": ["a", "b"]}}


def test_nothing_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-5f1c")
    assert "canary-5f1c" not in card(tmp_path)


def test_writing_again_replaces_the_card_and_leaves_no_draft(tmp_path: Path) -> None:
    card(tmp_path)
    assert "Another title" in card(tmp_path, title="Another title")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
