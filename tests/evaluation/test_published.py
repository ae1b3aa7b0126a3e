"""Published benchmarks: rows in their schema, scores put together as their authors do."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perl_vlm.cli import main
from perl_vlm.errors import BadRecord, PerlVlmError
from perl_vlm.types import Comparison, Message
from perl_vlm_eval.evaluations.published_sets import PublishedSets, PublishedSettings, findings
from perl_vlm_eval.published import FORMATS, SECTIONS


def png(color: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reward_bench(subset: str, number: int) -> dict[str, Any]:
    return {
        "prompt": f"Say {number}.", "chosen": "good", "chosen_model": "a", "rejected": "bad", "rejected_model": "b",
        "subset": subset, "id": number,
    }  # fmt: skip


def vl(name: str, ranking: list[int], image: Any) -> dict[str, Any]:
    return {
        "id": name, "query": "<image>\nWhat is it?", "response": ["first", "second"], "image": image,
        "human_ranking": ranking, "query_source": "x", "models": ["a", "b"],
    }  # fmt: skip


def test_reward_bench_weighs_math_like_all_code(tmp_path: Path) -> None:
    rows = [reward_bench("math-prm", number) for number in range(12)]
    rows += [reward_bench(f"hep-{language}", number) for language in ("cpp", "go") for number in range(6)]
    rows += [reward_bench("alpacaeval-easy", number) for number in range(6)]
    rows += [reward_bench("mt-bench-easy", number) for number in range(6)]
    evaluation = PublishedSets(PublishedSettings(path=write(tmp_path / "rows.jsonl", rows)))
    assert len(evaluation.rows) == 36
    right = np.array([1] * 12 + [0] * 6 + [1] * 6 + [1] * 6 + [0] * 6)
    scores = np.stack([right, np.full(36, 0.5)], axis=1)
    found = findings(evaluation.rows, scores, "rewardbench", []).figures
    reasoning = (984 * 1.0 + 164 * 0.0 + 164 * 1.0) / (984 + 2 * 164)
    chat = (100 * 1.0 + 28 * 0.0) / 128
    assert found["section/Reasoning"].estimate.value == pytest.approx(reasoning)
    assert found["section/Chat"].estimate.value == pytest.approx(chat)
    assert found["macro"].estimate.value == pytest.approx((reasoning + chat) / 2)
    assert found["overall"].estimate.value == pytest.approx(24 / 36)
    assert found["subset/hep-go"].estimate.value == 1.0
    assert sum(map(len, SECTIONS.values())) == 23, "as many subsets as its authors list"
    assert (SECTIONS["Safety"]["xstest-should-refuse"], SECTIONS["Safety"]["xstest-should-respond"]) == (250, 154)


@pytest.mark.parametrize("format", ["rewardbench", "vl_rewardbench"])
def test_all_right_is_no_certainty(format: str) -> None:
    sections = [("Chat", "alpacaeval-easy"), ("Reasoning", "math-prm")]
    rows = [
        Comparison(f"{section}-{place}", (Message("user", (f"{section} {place}?",)),), "yes", "no",
                   metadata={"section": section, "subset": subset})
        for section, subset in sections for place in range(12)
    ]  # fmt: skip
    figures = findings(rows, np.tile([1.0, 0.0], (24, 1)), format, []).figures
    for name, count in (("section/Chat", 12), ("section/Reasoning", 12), ("macro", 24), ("overall", 24)):
        estimate = figures[name].estimate
        assert (estimate.value, estimate.high) == (1.0, 1.0)
        assert estimate.low == pytest.approx(0.025 ** (1 / count))


def test_vl_reward_bench_goes_by_ranks_and_names() -> None:
    read = FORMATS["vl_rewardbench"].read
    bytes_row = {"bytes": png("red"), "path": None}
    kept = read(vl("RLAIF-V-12", [1, 0], bytes_row), "row 1", None)
    assert (kept.chosen, kept.rejected, kept.metadata["section"]) == ("second", "first", "hallucination")
    assert kept.messages[0].text == "What is it?"
    assert len(kept.images) == 1
    sections = {
        name: read(vl(name, [0, 1], bytes_row), "row", None).metadata["section"]
        for name in ("mathverse_3", "mmmu-2", "wildvision-battle_1", "hallucination_pair-7", "RLHF-V_1", "17")
    }
    assert list(sections.values()) == ["reasoning", "reasoning", "general", "hallucination", "hallucination", "general"]
    with pytest.raises(BadRecord, match=r"ranks \[0, 0\]"):
        read(vl("x", [0, 0], bytes_row), "row 3", None)


def test_multimodal_reward_bench_tells_bias_from_toxicity(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png("blue"))
    row = {
        "ID": "pairs_4", "Text": "Who?", "Image": "images/a.png", "Output1": "one", "Output2": "two",
        "Better": "Output2", "Category": "safety",
    }  # fmt: skip
    read = FORMATS["multimodal_rewardbench"].read
    kept = read(row, "row", tmp_path)
    assert (kept.chosen, kept.rejected, kept.metadata["section"]) == ("two", "one", "safety/bias")
    assert read({**row, "ID": "hateful_1"}, "row", tmp_path).metadata["section"] == "safety/toxicity"
    assert (
        read({**row, "ID": "MathVista-1", "Category": "reasoning"}, "row", tmp_path).metadata["section"]
        == "reasoning/math"
    )
    assert read({**row, "Category": "vqa"}, "row", tmp_path).metadata["section"] == "vqa"
    with pytest.raises(BadRecord, match="Output1 or Output2"):
        read({**row, "Better": "both"}, "row", tmp_path)
    with pytest.raises(BadRecord):
        read({**row, "Image": "../outside.png"}, "row", tmp_path)


def test_bad_rows_are_named(tmp_path: Path) -> None:
    rows = [reward_bench("alpacaeval-easy", 1), reward_bench("no-such-subset", 2), {"prompt": "only"}]
    with pytest.raises(
        PerlVlmError, match=r"(?s)2 of 3 rows.*row 2: RewardBench has no subset.*row 3: there is no 'chosen'"
    ):
        _ = PublishedSets(PublishedSettings(path=write(tmp_path / "rows.jsonl", rows))).rows
    with pytest.raises(ValueError, match="either a path or a dataset"):
        PublishedSets(PublishedSettings())


@pytest.mark.slow
def test_a_vlm_reward_model_is_scored_on_pictures(whole_run: Path, tmp_path: Path) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    rows = []
    for number, color in enumerate(["red", "green", "blue", "white"] * 3):
        (tmp_path / "set" / "images" / f"{number}.png").write_bytes(png(color))
        rows.append(vl(f"RLHF-V_{number}", [number % 2, 1 - number % 2], f"images/{number}.png"))
    write(tmp_path / "set" / "test.jsonl", rows)
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"evaluations:\n- kind: reward_bench\n  format: vl_rewardbench\n  path: {tmp_path / 'set'}\n")
    assert main(["eval", "--suite", str(suite), "--runs", str(whole_run), "--out", str(tmp_path / "out")]) == 0
    cell = json.loads((tmp_path / "out" / "results.json").read_text())["cells"][0]
    # The same two answers to every picture, the better one taking turns: a model that sees nothing has one half.
    assert cell["figures"]["overall"]["estimate"]["items"] == 12
    assert cell["figures"]["section/hallucination"]["estimate"]["low"] is not None
