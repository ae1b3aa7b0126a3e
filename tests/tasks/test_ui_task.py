"""The ui_automation task on drawn screens and on records in the documented columns."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl_vlm.errors import PerlVlmError
from perl_vlm.testing import check_task
from perl_vlm.types import SPLITS, Comparison, Example, ImageSlot, Message, Rating
from perl_vlm_ui_automation import UiAutomation, UiAutomationConfig
from perl_vlm_ui_automation.actions import format_action, parse_action

RIGHT = '{"action":"click","x":5,"y":6}'


def made(**settings: Any) -> UiAutomation:
    return UiAutomation(UiAutomationConfig(**({"train_size": 400, "validation_size": 40, "test_size": 40} | settings)))


def test_listing_the_task_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'playwright', 'miniwob', 'datasets'}"
    code = f"import sys, perl_vlm_ui_automation.task as t; t.UiAutomation(); assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"feedback": "pairs", "target": "point"},
        {"kinds": ("click", "type", "scroll"), "elements": 0},
    ],
)
def test_drawn_screens_are_sound(settings: dict[str, Any]) -> None:
    check_task(made(**settings), samples=8)


def test_drawn_screens_show_what_the_instruction_names() -> None:
    task = made(kinds=("click", "type", "scroll"))
    kinds: Counter[str] = Counter()
    for example in task.examples("train"):
        screen = example.images[0]
        action = parse_action(example.reference or "")
        kind = example.metadata["kind"]
        kinds[kind] += 1
        instruction = example.messages[0].text.split("\n")[0]
        if kind == "click":
            button = screen.buttons[(action.element or 0) - 1]  # type: ignore[attr-defined]
            assert instruction == f"click the {button.name}"
            assert screen.load().getpixel((button.x, button.y)) == button.shade
            assert (
                example.metadata["boxes"] == [list(button.box)] == [example.metadata["elements"][str(action.element)]]
            )
        elif kind == "type":
            place = instruction.removeprefix("type what is ")
            line = next(line for line in example.messages[0].text.split("\n")[1:] if line.endswith(place))
            assert action.text == f"a {screen.buttons[int(line[0]) - 1].name}"  # type: ignore[attr-defined]
        else:
            button = next(one for one in screen.buttons if instruction == f"scroll to the {one.name}")  # type: ignore[attr-defined]
            assert action.direction == ("up" if button.y < 32 else "down")
    assert min(kinds.values()) > 80


def test_a_click_on_a_drawn_screen_may_name_the_element_or_a_point_in_it() -> None:
    task = made(kinds=("click",))
    for example in list(task.examples("train"))[:50]:
        x0, y0, x1, y1 = example.metadata["boxes"][0]
        number = parse_action(example.reference or "").element
        for other in example.metadata["elements"]:
            answer = f'{{"action":"click","element":{other}}}'
            assert task.verify(example, answer) == float(int(other) == number)
        assert task.verify(example, f'{{"action":"click","x":{x0},"y":{y1}}}') == 1.0
        assert task.verify(example, f'{{"action":"click","x":{x1 + 1},"y":{y0}}}') == 0.0


def test_points_are_the_answers_where_they_are_asked_for_or_nothing_is_listed() -> None:
    for settings in ({"target": "point"}, {"elements": 0}):
        task = made(kinds=("click",), **settings)
        for example in list(task.examples("train"))[:20]:
            point = parse_action(example.reference or "").point
            assert point is not None
            assert max(point) < 64
    assert made(kinds=("click",), elements=0).examples("train")[0].messages[0].text.count("\n") == 0


def test_a_hasty_demonstrator_is_right_more_often_than_not_and_leaves_room() -> None:
    task = made(kinds=("click",))
    shown = task.demonstrations("train")
    right = 0
    for example in shown:
        screen = example.images[0]
        name = example.messages[0].text.split("\n")[0].removeprefix("click the ")
        button = screen.buttons[(parse_action(example.reference or "").element or 0) - 1]  # type: ignore[attr-defined]
        right += button.name == name
        assert button.color == name.split()[0]  # hasty, not blind
    assert 0.5 < right / len(shown) < 0.8
    assert not {example.id for example in shown} & {example.id for example in task.examples("train")}


def test_labels_are_even_and_true() -> None:
    task = made()
    assert task.reward_head().kind == "labels"
    ratings = [rating for rating in task.preferences("train") if isinstance(rating, Rating)]
    assert 150 < sum(rating.label for rating in ratings) < 250
    pairs = [pair for pair in made(feedback="pairs").preferences("train") if isinstance(pair, Comparison)]
    for rating, pair in zip(ratings, pairs, strict=True):
        assert rating.images == pair.images
        assert rating.response == (pair.chosen if rating.label else pair.rejected)


def test_no_screen_is_in_two_splits_whatever_the_seed() -> None:
    seen: dict[Any, str] = {}
    for seed in range(3):
        task = made(data_seed=seed)
        for split in SPLITS:
            for record in (*task.examples(split), *task.preferences(split), *task.demonstrations(split)):
                assert seen.setdefault(record.images[0], split) == split


def test_an_answer_that_is_no_action_fails_and_is_counted() -> None:
    task = made(kinds=("click",))
    example = task.examples("test")[0]
    nothing = {"success": 0.0, "parsed": 0.0, "type_match": 0.0}
    for answer in ("", "click 1", f"I would {example.reference}", '{"action":"click"}', "{" * 9999):
        assert task.evaluate(example, answer) == nothing
        assert task.verify(example, answer) == 0.0
    assert task.evaluate(example, example.reference or "") == dict.fromkeys(nothing, 1.0)
    assert task.evaluate(example, '{"action":"wait"}') == nothing | {"parsed": 1.0}
    assert task.evaluate(example, '{"action":"click","element":99}') == nothing | {"parsed": 1.0, "type_match": 1.0}


def test_an_example_without_a_right_action_cannot_be_judged() -> None:
    example = Example("a", (Message("user", (ImageSlot(), "click")),), origin="x.jsonl row 3")
    task = made()
    assert task.verify(example, "x") is None
    with pytest.raises(PerlVlmError, match=r"x\.jsonl row 3 has no right action"):
        task.evaluate(example, "x")
    wrong = Example("a", example.messages, reference="click", origin="x.jsonl row 3")
    with pytest.raises(PerlVlmError, match=r"reference of x\.jsonl row 3 is no action: the answer is no JSON"):
        task.evaluate(wrong, "x")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kinds": ()}, "task.kinds"),
        ({"kinds": ["click", "swipe"]}, "click, type, scroll"),
        ({"tolerance": 1.5}, "share of the screen"),
        ({"elements": -1}, "task.elements"),
        ({"browsers": 0}, "task.browsers"),
        ({"source": "miniwob", "env": " , "}, "task.env"),
        ({"source": "hub"}, "screenspot"),
        ({"source": "hub", "format": "screenagent"}, "task.dataset is not given"),
        ({"source": "local"}, "task.path"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UiAutomationConfig(**settings)


def picture(number: int, size: tuple[int, int] = (40, 80)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def columns(folder: Path, rows: Sequence[Mapping[str, Any]], **settings: Any) -> UiAutomation:
    for number in range(len(rows)):
        (folder / f"{number}.png").write_bytes(picture(number))
    named = [{"image": f"{number}.png", **row} for number, row in enumerate(rows)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, named)))
    return UiAutomation(UiAutomationConfig(source="local", path=str(folder / "data.jsonl"), **settings))


def test_documented_columns_with_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": f"open {i}", "chosen": RIGHT, "rejected": '{"action":"wait"}'} for i in range(100)]
    task = columns(tmp_path, rows)
    assert task.reward_head().kind == "pairs"
    check_task(task, samples=4)


def test_documented_columns_with_labels(tmp_path: Path) -> None:
    answers = [(RIGHT, True), ("tap on it", False)]
    rows = [
        {"prompt": f"open {i}", "completion": answers[i % 2][0], "label": answers[i % 2][1], "metadata": {"kind": "a"}}
        for i in range(100)
    ]
    task = columns(tmp_path, rows, feedback="pairs")
    assert task.reward_head().kind == "labels"
    check_task(task, samples=4)


def test_the_screen_of_documented_columns_is_known_from_metadata_or_the_picture(tmp_path: Path) -> None:
    screen = {"frame": [400, 800], "boxes": [[0, 0, 9, 9]], "elements": {"1": [3, 3, 5, 5]}}
    rows = [{"prompt": f"open {i}", "reference": RIGHT, "metadata": screen if i % 2 else {}} for i in range(60)]
    task = columns(tmp_path, rows, tolerance=0.1)
    examples = [example for split in SPLITS for example in task.examples(split)]
    with_boxes = next(example for example in examples if example.metadata)
    without = next(example for example in examples if not example.metadata)
    assert task.verify(with_boxes, '{"action":"click","x":0,"y":9}') == 1.0
    assert task.verify(with_boxes, '{"action":"click","element":1}') == 1.0
    assert task.verify(with_boxes, '{"action":"click","x":10,"y":6}') == 0.0
    assert task.verify(without, '{"action":"click","x":9,"y":6}') == 1.0  # a tenth of the picture's 40 pixels
    assert task.verify(without, '{"action":"click","x":10,"y":6}') == 0.0
    assert task.verify(without, '{"action":"click","x":5,"y":14}') == 1.0  # and of its 80
    assert task.verify(without, '{"action":"click","element":1}') == 0.0


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"reference": "click it"}, r"data.jsonl row \d+: the reference is no action: the answer is no JSON"),
    ({"chosen": "click it", "rejected": RIGHT}, "the (reference|chosen) is no action"),
    ({"reference": RIGHT, "metadata": {"frame": [0, 5]}}, "metadata `frame` is"),
    ({"reference": RIGHT, "metadata": {"boxes": [1, 2, 3, 4]}}, "metadata `boxes` is"),
    ({"reference": RIGHT, "metadata": {"elements": [[1, 2, 3, 4]]}}, "metadata `elements` is"),
]


@pytest.mark.parametrize(("row", "said"), BAD_ROWS)
def test_bad_rows_of_documented_columns_are_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    task = columns(tmp_path, [{"prompt": f"open {i}", **row} for i in range(100)])
    with pytest.raises(PerlVlmError, match=said):
        task.examples("train")


def test_columns_that_are_called_otherwise_are_renamed(tmp_path: Path) -> None:
    rows = [{"prompt": f"open {i}", "action": RIGHT} for i in range(60)]
    with pytest.raises(PerlVlmError, match="no right answer"):
        columns(tmp_path, rows).examples("test")
    assert columns(tmp_path, rows, columns={"reference": "action"}).examples("test")[0].reference == RIGHT


def test_actions_of_a_drawn_screen_are_canonical() -> None:
    for example in list(made(kinds=("click", "type", "scroll")).examples("train"))[:60]:
        assert format_action(parse_action(example.reference or "")) == example.reference
