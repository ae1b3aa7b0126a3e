"""Logs lose and double no line over a resume; bars and lines stay out of each other's way."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from perl_vlm.errors import PerlVlmError
from perl_vlm.train import log
from perl_vlm.train.log import MetricLog, SampleLog, progress, read_log, say


def steps(path: Path, stage: str = "rm") -> list[int]:
    return [line["step"] for line in read_log(path) if line["stage"] == stage]


def test_one_flushed_json_line_for_each_step(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = MetricLog(path, stage="rm")
    metrics.log(1, {"loss": 0.1 + 0.2, "n": 3, "tensor": torch.tensor(0.5), "bad": math.nan, "worse": -math.inf})
    line = json.loads(path.read_text())
    assert line.pop("time") > 1e9
    assert line == {
        "stage": "rm", "step": 1, "loss": 0.1 + 0.2, "n": 3, "tensor": 0.5, "bad": None, "worse": None
    }  # fmt: skip
    assert math.isnan(metrics.read()[0]["bad"])
    metrics.sync()
    metrics.close()
    metrics.close()


@pytest.mark.parametrize("key", ["stage", "step", "time"])
def test_a_metric_cannot_take_the_place_of_a_fixed_key(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        MetricLog(tmp_path / "m.jsonl", stage="rm").log(1, {key: 1.0})


@pytest.mark.parametrize("torn", ["", '{"stage": "rm", "step": 8, "lo', "\x00\x00", '{"stage": "rm", "step": 8}'])
def test_resuming_goes_on_after_the_checkpoint_without_lost_or_doubled_lines(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = MetricLog(path, stage="rm")
    for step in range(1, 8):
        whole.log(step, {"loss": step / 3})
        if step % 2 == 0:
            whole.log(step, {"eval": step / 7})
    whole.close()
    expected = [{k: v for k, v in line.items() if k != "time"} for line in read_log(path)]
    with path.open("a") as file:
        file.write(torn)

    resumed = MetricLog(path, stage="rm", start_step=4)
    assert steps(path) == [1, 2, 2, 3, 4, 4]
    for step in range(5, 8):
        resumed.log(step, {"loss": step / 3})
        if step % 2 == 0:
            resumed.log(step, {"eval": step / 7})
    assert [{k: v for k, v in line.items() if k != "time"} for line in read_log(path)] == expected


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "rm", "step": 1}\n{"stage": "rm", "step": 2}')
    MetricLog(path, stage="rm", start_step=2).log(3, {})
    assert steps(path) == [1, 2, 3]


def test_nothing_to_cut_leaves_the_file_untouched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricLog(path, stage="rm").log(1, {"loss": 0.1})
    before = (path.read_bytes(), path.stat().st_ino)
    MetricLog(path, stage="rm", start_step=1).close()
    assert (path.read_bytes(), path.stat().st_ino) == before


def test_beginning_again_drops_the_stage_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for stage in ("rm", "ppo"):
        metrics = MetricLog(path, stage=stage)
        for step in range(4):
            metrics.log(step, {})
        metrics.close()
    MetricLog(path, stage="ppo").close()
    assert steps(path) == [0, 1, 2, 3]
    assert steps(path, "ppo") == []


def test_an_altered_row_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"stage": "rm", "step": 1}\nnonsense\n{"stage": "rm", "step": 3}\n'
    path.write_text(text)
    with pytest.raises(PerlVlmError, match="row 2"):
        MetricLog(path, stage="rm", start_step=1)
    assert path.read_text() == text


def test_samples_survive_odd_text(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    odd = ["\ud800", "line\u2028break\nand\r", "<script>", '"']
    samples = SampleLog(path, stage="ppo")
    samples.log(2, [{"id": f"{index}", "response": text, "reward": math.nan} for index, text in enumerate(odd)])
    samples.log(3, [{"id": "x", "response": ""}])
    samples.sync()
    samples.close()
    again = SampleLog(path, stage="ppo", start_step=2)
    assert [line["response"] for line in again.read()] == odd
    assert {line["step"] for line in again.read()} == {2}
    with pytest.raises(ValueError, match="step"):
        again.log(3, [{"step": 1}])


def test_only_the_main_process_writes_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    metrics = MetricLog(tmp_path / "m.jsonl", stage="rm", tracker="wandb")
    metrics.log(1, {"loss": 1.0})
    metrics.sync()
    metrics.close()
    say("nothing")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_missing_tracker_says_how_to_get_it(tmp_path: Path, tracker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"accelerate.utils.is_{tracker}_available", lambda: False)
    with pytest.raises(PerlVlmError, match=f"pip install {tracker}"):
        MetricLog(tmp_path / "m.jsonl", stage="rm", tracker=tracker)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_gets_settings_values_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Fake:
        def __init__(self, project: str) -> None:
            calls.append(("project", project))

        def start(self) -> None:
            calls.append(("start",))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            calls.append(("config", values))

        def log(self, values: dict[str, Any], step: int) -> None:
            calls.append(("log", values, step))

        def finish(self) -> None:
            calls.append(("finish",))

    monkeypatch.setattr("accelerate.tracking.TrackioTracker", Fake)
    monkeypatch.setattr("accelerate.utils.is_trackio_available", lambda: True)
    config = {"rm": {"lr": 0.1, "revision": None}, "targets": ["a"]}
    metrics = MetricLog(tmp_path / "m.jsonl", stage="rm", tracker="trackio", project="p", config=config)
    metrics.log(4, {"loss": 0.5})
    metrics.close()
    assert calls == [
        ("project", "p"),
        ("start",),
        ("config", {"rm.lr": 0.1, "rm.revision": "None", "targets": "['a']"}),
        ("log", {"rm/loss": 0.5}, 4),
        ("finish",),
    ]
    assert steps(tmp_path / "m.jsonl") == [4]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_silent_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with progress(3, "rm") as bar:
        for _ in range(3):
            bar.update()
            bar.set_postfix(loss="0.5")
    assert stream.getvalue() == ""


def test_the_bar_shows_where_it_goes_on_from_and_lines_pass_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("sys.stdout", screen)
    with progress(10, "ppo", initial=4) as bar:
        bar.update()
        bar.set_postfix(kl="0.12")
        bar.refresh()
        say("a plain line")
    text = screen.getvalue()
    assert "ppo" in text
    assert "5/10" in text
    assert "kl=0.12" in text
    assert "a plain line\n" in text
    # The bar is wiped before the line and drawn again after it.
    before, after = text.split("a plain line\n")
    assert before.endswith("\r")
    assert "5/10" in after


def test_no_bar_off_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("RANK", "3")
    progress(3, "rm").close()
    assert screen.getvalue() == ""


def test_say_without_a_bar_is_a_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    captured = capsys.readouterr()
    assert captured.out == "hello\n"
    assert captured.err == ""
    assert log.is_main_process()
