"""Columns as TRL users have them, and what is said of rows that are not so."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from perl_vlm.data.columns import detect_format, to_comparison, to_example, to_rating
from perl_vlm.errors import BadRecord
from perl_vlm.types import ImageSlot, Message

SLOT = ImageSlot()
ORIGIN = "train.jsonl row 12"


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def user(*content: Any) -> Message:
    return Message("user", content)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt", "chosen", "rejected"], "preference"),
        (["rejected", "chosen", "images"], "implicit_preference"),
        (["prompt", "completion", "label"], "unpaired"),
        (["prompt", "completion"], "prompt_completion"),
        (["messages", "images"], "messages"),
        (["prompt", "reference", "image"], "prompt"),
    ],
)
def test_formats_are_told_apart(columns: list[str], expected: str) -> None:
    assert detect_format(columns) == expected


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (["promt", "choosen"], "no column `prompt`; found: choosen, promt.*`promt` meant to be `prompt`"),
        (["prompt", "choosen", "rejected"], "no column `chosen`; found:.*`choosen` meant to be `chosen`"),
        (["a"], "no column `prompt`; found: a.*documented columns"),
        ([], "found: none"),
    ],
)
def test_missing_columns_name_what_is_there(columns: list[str], text: str) -> None:
    with pytest.raises(BadRecord, match=text) as caught:
        detect_format(columns, ORIGIN)
    assert caught.value.origin == ORIGIN


def test_plain_preference_with_everything() -> None:
    row = {
        "id": 7,
        "prompt": "which color?",
        "chosen": "red",
        "rejected": "blue",
        "images": [png(), png()],
        "margin": 2,
        "metadata": {"kind": "color"},
    }
    pair = to_comparison(row, ORIGIN)
    assert (pair.id, pair.chosen, pair.rejected, pair.margin, pair.origin) == ("7", "red", "blue", 2.0, ORIGIN)
    assert pair.messages == (user(SLOT, SLOT, "which color?"),)
    assert len(pair.images) == 2
    assert pair.metadata == {"kind": "color"}


def test_optional_columns_may_be_absent_or_null() -> None:
    bare = to_comparison({"prompt": "p", "chosen": "a", "rejected": "b"}, ORIGIN)
    null = dict.fromkeys(("margin", "images", "image", "id", "metadata", "reference"))
    assert to_comparison({"prompt": "p", "chosen": "a", "rejected": "b", **null}, ORIGIN) == bare
    assert (bare.id, bare.margin, bare.images, bare.metadata) == (ORIGIN, None, (), {})


def test_conversational_preference_with_explicit_prompt() -> None:
    row = {
        "prompt": [turn("system", "be brief"), turn("user", [{"type": "image"}, {"type": "text", "text": "what?"}])],
        "chosen": [turn("assistant", "red")],
        "rejected": [turn("assistant", [{"type": "text", "text": "blue"}])],
        "image": png(),
    }
    pair = to_comparison(row, ORIGIN)
    assert pair.messages == (Message("system", ("be brief",)), user(SLOT, "what?"))
    assert (pair.chosen, pair.rejected) == ("red", "blue")


def test_a_prompt_repeated_in_the_answers_is_taken_away() -> None:
    prompt = [turn("user", "what?")]
    row = {
        "prompt": "what?",
        "chosen": [*prompt, turn("assistant", "red")],
        "rejected": [*prompt, turn("assistant", "blue")],
    }
    pair = to_comparison(row, ORIGIN)
    assert (pair.messages, pair.chosen, pair.rejected) == ((user("what?"),), "red", "blue")


def test_implicit_conversations_share_all_but_the_last_turn() -> None:
    start = [turn("user", "hi"), turn("assistant", "hello"), turn("user", "what?")]
    row = {"chosen": [*start, turn("assistant", "red")], "rejected": [*start, turn("assistant", "redder")]}
    pair = to_comparison({**row, "images": [png()]}, ORIGIN)
    assert pair.messages == (user(SLOT, "hi"), Message("assistant", ("hello",)), user("what?"))
    assert (pair.chosen, pair.rejected) == ("red", "redder")
    row["rejected"][1] = turn("assistant", "go away")
    with pytest.raises(BadRecord, match="differ before their last turn"):
        to_comparison(row, ORIGIN)


def test_implicit_strings_are_cut_between_words() -> None:
    pair = to_comparison({"chosen": "The sky is blue", "rejected": "The sky is blurred"}, ORIGIN)
    assert (pair.messages, pair.chosen, pair.rejected) == ((user("The sky is"),), "blue", "blurred")
    with pytest.raises(BadRecord, match="do not begin with the same words"):
        to_comparison({"chosen": "red", "rejected": "rose"}, ORIGIN)


def test_implicit_transcripts_keep_their_turns() -> None:
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what is it?\n\nAssistant:"
    pair = to_comparison({"chosen": start + " it is red", "rejected": start + " it is blue"}, ORIGIN)
    assert [message.role for message in pair.messages] == ["user", "assistant", "user"]
    assert pair.messages[-1].text == "what is it?"
    assert (pair.chosen, pair.rejected) == ("it is red", "it is blue")


@pytest.mark.parametrize(
    ("label", "expected"), [(True, True), (False, False), (1, True), (0, False), ("true", True), ("False", False)]
)
def test_ratings(label: Any, expected: bool) -> None:
    rating = to_rating({"prompt": "p", "completion": "c", "label": label}, ORIGIN)
    assert (rating.messages, rating.response, rating.label) == ((user("p"),), "c", expected)


@pytest.mark.parametrize("label", [0.7, 2, "good", None, [1]])
def test_scores_are_no_labels(label: Any) -> None:
    with pytest.raises(BadRecord, match="label"):
        to_rating({"prompt": "p", "completion": "c", "label": label}, ORIGIN)


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "p"}, None),
        ({"prompt": "p", "reference": "r"}, "r"),
        ({"prompt": "p", "completion": "c"}, "c"),
        ({"prompt": "p", "completion": "c", "label": True}, "c"),
        ({"prompt": "p", "completion": "c", "label": False}, None),
        ({"prompt": "p", "chosen": "c", "rejected": "d"}, "c"),
        ({"prompt": "p", "chosen": "c", "rejected": "d", "reference": "r"}, "r"),
        ({"messages": [turn("user", "p"), turn("assistant", "c")]}, "c"),
        ({"messages": [turn("user", "p")]}, None),
        ({"chosen": "p c", "rejected": "p d"}, "c"),
    ],
)
def test_examples_of_every_format(row: dict[str, Any], reference: str | None) -> None:
    example = to_example(row, ORIGIN)
    assert (example.messages, example.reference) == ((user("p"),), reference)


def test_the_words_of_a_user_make_no_image_slot() -> None:
    words = "is <image> the same as <|image_pad|> or <fake_token_around_image>?"
    example = to_example({"prompt": words, "image": png()}, ORIGIN)
    assert example.messages == (user(SLOT, words),)
    assert to_example({"prompt": words}, ORIGIN).messages == (user(words),)
    parts = [{"type": "text", "text": words}]
    assert to_example({"prompt": [turn("user", parts)]}, ORIGIN).messages == (user(words),)


def test_images_go_before_the_first_user_text_of_plain_strings() -> None:
    turns = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    example = to_example({"prompt": turns, "images": [png(), png()]}, ORIGIN)
    assert example.messages[1] == user(SLOT, SLOT, "a")
    assert example.messages[3] == user("c")


def test_null_keys_of_arrow_parts_are_nothing() -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    assert to_example({"prompt": [turn("user", parts)], "image": png()}, ORIGIN).messages == (user(SLOT, "what?"),)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": ""}, "prompt.*empty"),
        ({"prompt": " \n"}, "prompt.*empty"),
        ({"prompt": []}, "prompt.*empty"),
        ({"prompt": "", "image": png()}, "prompt.*empty"),
        ({"prompt": None}, "column `prompt` holds NoneType"),
        ({"prompt": 3}, "column `prompt` holds int 3"),
        ({"prompt": {"role": "user"}}, "column `prompt` holds dict"),
        ({"prompt": ["hi"]}, "message 1.*str 'hi'"),
        ({"prompt": [turn("human", "hi")]}, "role 'human'.*system, user, assistant"),
        ({"prompt": [turn("user", "hi"), turn("system", "x")]}, "system message, which may only come first"),
        ({"prompt": [turn("user", "hi"), turn("assistant", "x")]}, "ends in a turn of the assistant"),
        ({"prompt": [turn("user", 3)]}, "content of `prompt, message 1` is int 3"),
        ({"prompt": [turn("user", [{"type": "video"}])]}, "holds the part dict"),
        ({"prompt": [turn("user", [{"type": "text"}])]}, "holds NoneType"),
        ({"prompt": [turn("user", [{"type": "image", "url": "http://a"}])]}, "carries its own url"),
        ({"prompt": [turn("user", [{"type": "image"}])]}, "1 .* parts, but the record has 0 images"),
        ({"prompt": [turn("user", [{"type": "text", "text": "a"}])], "image": png()}, "0 .* parts.*has 1 images"),
        ({"prompt": "p", "images": png()}, "not a list"),
        ({"prompt": "p", "images": [png()], "image": png()}, "both `image` and `images`"),
        ({"prompt": "p", "images": [None]}, "the image is NoneType"),
        ({"prompt": "p", "image": "a.png"}, "no image folder is known"),
        ({"prompt": "p", "reference": 3}, "column `reference` holds int 3"),
        ({"prompt": "p", "reference": " "}, "`reference` holds an empty response"),
        ({"prompt": "p", "completion": ""}, "`completion` holds an empty response"),
        ({"prompt": "p \ud800"}, "no valid Unicode"),
        ({"prompt": "p", "id": True}, "column `id`"),
        ({"prompt": "p", "metadata": "x"}, "column `metadata`"),
        ({"prompt": "p", "metadata": {"x": object()}}, "`metadata` is no JSON"),
    ],
)
def test_bad_examples(row: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRecord, match=text) as caught:
        to_example(row, ORIGIN)
    assert caught.value.origin == ORIGIN
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"chosen": ""}, "`chosen` holds an empty response"),
        ({"rejected": " "}, "`rejected` holds an empty response"),
        ({"rejected": "red"}, "the same text"),
        ({"rejected": None}, "column `rejected` holds NoneType"),
        ({"rejected": 4}, "column `rejected` holds int 4"),
        ({"chosen": [turn("user", "x")]}, r"turns of \['user'\]"),
        ({"chosen": [turn("assistant", "x"), turn("assistant", "y")]}, "exactly one turn"),
        ({"chosen": []}, "turns of nobody"),
        ({"chosen": [turn("assistant", [{"type": "image"}])]}, "Images belong to the prompt"),
        ({"margin": "wide"}, "column `margin` holds str 'wide'"),
        ({"margin": float("nan")}, "finite number"),
        ({"margin": True}, "finite number"),
    ],
)
def test_bad_comparisons(changes: dict[str, Any], text: str) -> None:
    row = {"prompt": "p", "chosen": "red", "rejected": "blue"}
    to_comparison(row, ORIGIN)
    with pytest.raises(BadRecord, match=text):
        to_comparison({**row, **changes}, ORIGIN)


def test_a_converter_names_the_columns_it_needs() -> None:
    with pytest.raises(BadRecord, match="no column `chosen`, `rejected`; found: completion, label, prompt"):
        to_comparison({"prompt": "p", "completion": "c", "label": True}, ORIGIN)
    with pytest.raises(BadRecord, match="no column `completion`, `label`"):
        to_rating({"prompt": "p", "chosen": "a", "rejected": "b"}, ORIGIN)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "bytes", "path"]), inner, max_size=3)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", 3]), "content": inner})
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "prompt",
        "chosen",
        "rejected",
        "completion",
        "label",
        "messages",
        "image",
        "images",
        "margin",
        "id",
        "reference",
        "metadata",
    ]
)


@settings(max_examples=500, deadline=None, database=None)
@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_no_row_does_more_than_raise_bad_record(row: dict[str, Any]) -> None:
    for convert in (to_example, to_comparison, to_rating):
        try:
            record = convert(row, ORIGIN)
        except BadRecord as error:
            assert error.origin == ORIGIN  # noqa: PT017 - what is raised is beside the point, where is not
        else:
            slots = sum(isinstance(part, ImageSlot) for message in record.messages for part in message.content)
            assert slots == len(record.images)
