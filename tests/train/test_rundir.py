"""The run's folder: whose it is, what may go on in it, and files that are whole or absent."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from perl_vlm.errors import PerlVlmError
from perl_vlm.train import rundir
from perl_vlm.train.rundir import RunDir, fresh_out, latest_out

CONFIG = {"model": "tiny", "out": None, "resume": False, "rm": {"lr": 1e-5, "betas": (0.9, 0.99)}, "task": None}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("before", ["absent", "empty", "killed while writing"])
def test_a_new_run(tmp_path: Path, before: str, resume: bool) -> None:
    out = tmp_path / "runs" / "a"
    if before != "absent":
        out.mkdir(parents=True)
    if before == "killed while writing":
        (out / ".tmp-config.yaml").write_text("model: ti")
    run = RunDir.create(out, CONFIG, resume=resume)
    stored = yaml.safe_load(run.config.read_text())
    assert stored["rm"] == {"lr": 1e-5, "betas": [0.9, 0.99]}
    assert [path.name for path in out.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("model", ["tiny", "other"])
def test_another_run_in_the_folder_is_refused_and_untouched(tmp_path: Path, model: str) -> None:
    RunDir.create(tmp_path, CONFIG, resume=False)
    before = snapshot(tmp_path)
    with pytest.raises(PerlVlmError) as caught:
        RunDir.create(tmp_path, {**CONFIG, "model": model}, resume=False)
    assert snapshot(tmp_path) == before
    for part in (str(tmp_path), "already holds a run", "--resume", "another --out", "Nothing has been touched"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_content_is_refused_and_untouched(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PerlVlmError, match=r"thesis\.tex"):
        RunDir.create(tmp_path, CONFIG, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(PerlVlmError, match="is a file"):
        RunDir.create(tmp_path / "f", CONFIG, resume=False)


def test_resume_with_the_same_settings_keeps_everything(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, {**CONFIG, "threshold": math.nan}, resume=False)
    run.metrics.write_text("{}\n")
    before = snapshot(tmp_path)
    again = {**CONFIG, "threshold": math.nan, "out": "elsewhere", "resume": True}
    assert RunDir.create(tmp_path, again, resume=True) == run
    assert snapshot(tmp_path) == before


def test_resume_with_other_settings_lists_them(tmp_path: Path) -> None:
    RunDir.create(tmp_path, CONFIG, resume=False)
    other = {"model": "big", "rm": {"lr": 2e-5, "betas": (0.9, 0.99), "extra": 1}}
    with pytest.raises(PerlVlmError) as caught:
        RunDir.create(tmp_path, other, resume=True)
    text = str(caught.value)
    for part in (
        "model (the run: 'tiny'; given: 'big')",
        "rm.lr (the run: 1e-05; given: 2e-05)",
        "rm.extra (the run: absent; given: 1)",
        "task (the run: None; given: absent)",
    ):
        assert part in text
    assert "betas" not in text
    assert "out (" not in text


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "!!python/object/apply:os.system ['true']"])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(PerlVlmError, match=r"config\.yaml"):
        RunDir.create(tmp_path, CONFIG, resume=True)


def test_a_config_that_yaml_cannot_hold_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(PerlVlmError, match="plain YAML"):
        RunDir.create(tmp_path / "new", {"a": object()}, resume=False)
    assert not (tmp_path / "new").exists()


def test_a_summary_marks_the_run_as_done(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, CONFIG, resume=False)
    assert not run.is_done()
    run.write_summary({"metrics": {"a": 0.1, "b": math.nan, "c": [math.inf, 1, True]}, "stage": "rm"})
    assert run.is_done()
    assert json.loads(run.summary.read_text()) == run.read_summary()
    assert run.read_summary() == {"metrics": {"a": 0.1, "b": None, "c": [None, 1, True]}, "stage": "rm"}


@pytest.mark.parametrize("text", ["", '{"metrics": {', "[]", "\xff"])
def test_a_torn_summary_is_not_done(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path)
    run.summary.write_bytes(text.encode("latin-1"))
    assert not run.is_done()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    run.write_summary({"a": 1})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.write_summary({"a": 2})
    assert run.read_summary() == {"a": 1}


def test_fresh_and_latest_out(tmp_path: Path) -> None:
    def given() -> Path:
        return fresh_out(tmp_path, "vqa", "rm", "Hub Org/Model-3B")

    def latest() -> Path | None:
        return latest_out(tmp_path, "vqa", "rm", "Hub Org/Model-3B")

    first = tmp_path / "vqa" / "rm-Hub-Org-Model-3B"
    assert latest() is None
    assert given() == first
    assert not first.exists()
    for number in range(1, 12):
        expected = first if number == 1 else first.with_name(f"{first.name}-{number}")
        assert given() == expected
        RunDir.create(given(), CONFIG, resume=False)
        assert latest() == expected
    (tmp_path / "vqa" / f"{first.name}-99").mkdir()
    (tmp_path / "vqa" / f"{first.name}-other").mkdir()
    RunDir.create(tmp_path / "vqa" / f"{first.name}-more", CONFIG, resume=False)
    assert latest() == first.with_name(f"{first.name}-11")
    assert given() == first.with_name(f"{first.name}-12")


@pytest.mark.parametrize(
    ("name", "folder"), [("../../etc", "rm-etc"), ("..", "rm-run"), ("/", "rm-run"), ("", "rm-run"), ("a b", "rm-a-b")]
)
def test_a_name_cannot_leave_the_base(tmp_path: Path, name: str, folder: str) -> None:
    assert fresh_out(tmp_path, "vqa", "rm", name) == tmp_path / "vqa" / folder


def test_the_folder_is_refused_without_importing_torch() -> None:
    root = Path(rundir.__file__).parents[2]
    code = "import sys, perl_vlm.train.rundir; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
