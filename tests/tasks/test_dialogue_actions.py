"""Dialogues with API calls: how they are written, read back and compared."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl_vlm_dialogue.actions import (
    MAX_DEPTH,
    Call,
    Heard,
    Result,
    Say,
    Value,
    canonical,
    parse_action,
    write_action,
    write_context,
)
from perl_vlm_dialogue.scoring import call_f1, match_action, normalise, same_action, token_f1

VALUES: st.SearchStrategy[Value] = st.recursive(
    st.text(max_size=12).map(lambda text: canonical(text)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=6).map(lambda key: " ".join(key.split())), inner, max_size=3),
    ),
    max_leaves=8,
)
NAMES = st.text("abcXYZ019_.-", max_size=12)
CALLS = st.builds(
    Call, NAMES, st.dictionaries(st.text(max_size=8).map(lambda k: " ".join(k.split())), VALUES, max_size=4)
)
TEXTS = st.text(min_size=1, max_size=40).map(lambda text: " ".join(text.split())).filter(bool)


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Say("Which tea?"), "say Which tea?"),
        (Call("show_menu"), "call show_menu()"),
        (Call("get_menu_items", {"query": "Chai Latte"}), "call get_menu_items(query=Chai Latte)"),
        (
            Call("add", {"id": "a-1", "options": [{"id": "milk", "option": "2% Milk"}], "n": "1"}),
            "call add(id=a-1, options=[{id=milk, option=2% Milk}], n=1)",
        ),
        (Call("find", {"name.movie": "Sing 2 (PG), 3D"}), 'call find(name.movie="Sing 2 (PG), 3D")'),
        (Call("find", {"none": "", "quote": 'a "b"'}), 'call find(none="", quote="a \\"b\\"")'),
        (Call("", {}), "call ()"),
    ],
)
def test_actions_are_written_on_a_line_and_read_back(action: Any, text: str) -> None:
    assert write_action(action) == text
    assert parse_action(text) == action
    assert parse_action(f"  {text}\n") == action


@pytest.mark.parametrize(
    "text",
    [
        "",
        "say",
        "say ",
        "Say hello",
        "hello",
        "call",
        "call f",
        "call f(",
        "call f)",
        "call f() and more",
        "call f(a)",
        "call f(a=)",
        "call f(=b)",
        "call f(a=b",
        "call f(a=b,)",
        "call f(a=b c=d)",
        "call f(a=b, a=c)",
        "call f(a=[b)",
        "call f(a={b})",
        "call f(a=b])",
        'call f(a="b)',
        'call f(a="b"c)',
        "call f(a=b\nc=d)",
        "call f g(a=b)",
        "call f(a=" + "[" * 5000,
        "call f(a=" + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + ")",
    ],
)
def test_what_is_no_action_is_none(text: str) -> None:
    assert parse_action(text) is None


def test_spaces_and_line_breaks_do_not_matter() -> None:
    assert parse_action("call f( a = b  c ,d=[ x ,y ] )") == Call("f", {"a": "b c", "d": ["x", "y"]})
    assert parse_action("say  two\n words ") == Say("two words")


@settings(deadline=None)
@given(CALLS)
def test_every_call_survives_the_way_there_and_back(call: Call) -> None:
    assert parse_action(write_action(call)) == call


@settings(deadline=None)
@given(TEXTS)
def test_every_text_survives_too(text: str) -> None:
    assert parse_action(write_action(Say(text))) == Say(text)


@settings(deadline=None)
@given(st.text(max_size=80), st.text('(){}[],=" ab', max_size=40))
def test_no_response_crashes_the_judge(text: str, body: str) -> None:
    wanted = Call("f", {"a": "b", "c": ["d", {"e": "f"}]})
    for response in (text, f"call f({body})", f"say {text}", f"call {text}"):
        given_action = parse_action(response)
        assert given_action is None or isinstance(given_action, (Say, Call))
        assert 0 <= match_action(given_action, wanted) <= 1


@settings(deadline=None)
@given(st.one_of(CALLS, TEXTS.map(Say)), st.one_of(CALLS, TEXTS.map(Say)))
def test_an_action_is_like_itself_and_no_more_like_another(one: Any, other: Any) -> None:
    assert match_action(one, one) == 1.0
    assert same_action(one, one)
    assert 0 <= match_action(one, other) <= 1
    assert match_action(None, one) == 0
    if same_action(one, other):
        assert match_action(one, other) == 1.0


def test_canonical_values_are_texts() -> None:
    value = {"n": 1, "x": 1.5, "ok": True, "none": None, "list": [" a  b ", {"k": False}]}
    assert canonical(value) == {"n": "1", "x": "1.5", "ok": "true", "none": "null", "list": ["a b", {"k": "false"}]}
    deep: Any = "x"
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than"):
        canonical(deep)
    with pytest.raises(ValueError, match="holds a bytes"):
        canonical({"a": b"x"})


TURNS = [
    Heard("a latte please"),
    Call("get", {"query": "latte"}),
    Result("get", {"items": [{"id": "latte-1"}]}),
    Call("", {}),
    Result("invalid", {}),
    Say("Which milk?"),
    Heard("user: agent: oat"),
]
LINES = [
    "user: a latte please",
    "call get(query=latte)",
    "result {items=[{id=latte-1}]}",
    "call ()",
    "result invalid {}",
    "agent: Which milk?",
    "user: user: agent: oat",
]


def test_a_context_has_a_line_for_each_turn() -> None:
    assert write_context(TURNS).splitlines() == LINES


def test_long_contexts_lose_their_oldest_turns() -> None:
    whole = "\n".join(LINES)
    for limit in range(1, len(whole) + 2):
        text = write_context(TURNS, limit)
        assert len(text) <= limit
        assert whole.endswith(text)
        kept = text.splitlines()
        if len(kept) > 1 or len(LINES[-1]) <= limit:
            assert kept == LINES[-len(kept) :]
        missing = len(LINES) - len(kept)
        assert missing == 0 or len("\n".join(LINES[missing - 1 :])) > limit


def test_texts_are_compared_as_in_squad() -> None:
    assert normalise("The  Cat, a DOG & an owl!") == "cat dog owl"
    assert token_f1("two red circles", "two red circles") == 1.0
    assert token_f1("The two red, red circles.", "two red circles") == pytest.approx(6 / 7)
    assert token_f1("blue", "two red circles") == 0.0
    assert (token_f1("", "red"), token_f1("!", "?"), token_f1("red", "the")) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("given_text", "wanted_text", "score", "same"),
    [
        ("say Which milk?", "say which milk", 1.0, True),
        ("say Which milk?", "call f()", 0.0, False),
        ("call f()", "call f()", 1.0, True),
        ("call f(a=x)", "call f()", 2 / 3, False),
        ("call g(a=x)", "call f(a=x)", 0.0, False),
        ("call f(b=y, a=X.)", "call f(a=x, b=y)", 1.0, True),
        ("call f(a=x)", "call f(a=x, b=y)", 4 / 5, False),
        ("call f(a=x, b=z)", "call f(a=x, b=y)", 2 / 3, False),
        ("call f(q=oat milk OR iced)", "call f(q=oat milk)", 5 / 6, False),
        ("call f(a=[x, y])", "call f(a=[y, x])", 1.0, True),
        ("call f(a=[x, x])", "call f(a=[y, x])", 2 / 3, False),
        ("call f(a=[{n=milk, v=oat}])", "call f(a=[{v=oat, n=milk}])", 1.0, True),
        ("call f(a={b=x})", "call f(a={b=x, c=y})", 4 / 5, False),
        ("call f(a=[oat milk, milk])", "call f(a=[milk, oat milk])", 1.0, True),
    ],
)
def test_calls_are_worth_their_names_and_arguments(given_text: str, wanted_text: str, score: float, same: bool) -> None:
    one, other = parse_action(given_text), parse_action(wanted_text)
    assert other is not None
    assert match_action(one, other) == pytest.approx(score)
    assert same_action(one, other) is same


def test_the_right_name_counts_where_there_are_no_arguments() -> None:
    assert call_f1({}, {}) == 1.0
    assert call_f1(json.loads('{"a": "b"}'), {}) == pytest.approx(2 / 3)
