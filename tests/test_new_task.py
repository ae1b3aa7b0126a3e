"""`perl-vlm new-task` writes a sound distribution, refuses names and folders that are taken, and asks nothing."""

from __future__ import annotations

import ast
import builtins
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from perl_vlm import new_task, registry
from perl_vlm.cli import main

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "perl-vlm-captions"


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a distribution's sources by its path, without what tools leave behind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(
            part in ("runs", "dist") or part.endswith(("cache", "cache__")) for part in parts
        ):
            found["/".join(parts)] = path.read_bytes()
    return found


def test_the_example_is_what_new_task_writes(tmp_path: Path) -> None:
    new_task.write("captions", tmp_path / "made")
    made, example = files_of(tmp_path / "made"), files_of(EXAMPLE)
    remedy = "rm -r examples/perl-vlm-captions && perl-vlm new-task captions --out examples/perl-vlm-captions"
    assert made == example, f"the template and the example have parted; write the example again: {remedy}"


def test_a_new_task_says_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)  # nothing is asked
    assert main(["new-task", "street_signs"]) == 0
    out, err = capfd.readouterr()
    assert "wrote the task street_signs to perl-vlm-street-signs" in out
    assert "perl-vlm street_signs run" in out
    assert err == ""
    folder = tmp_path / "perl-vlm-street-signs"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert (folder / "src" / "perl_vlm_street_signs" / "configs" / "quickstart.yaml").is_file()
    project = (folder / "pyproject.toml").read_text()
    assert 'name = "perl-vlm-street-signs"\n' in project
    assert f'[project.entry-points."{registry.GROUP}"]\nstreet_signs = "perl_vlm_street_signs:StreetSigns"\n' in project
    for text in files_of(folder).values():
        assert b"{{" not in text
        assert text.endswith(b"\n")


@pytest.mark.parametrize("name", ["counting", "example", "none", "value_error", "records", "image_data", "x", "a1_b2"])
def test_every_name_gives_python_whose_class_hides_nothing(tmp_path: Path, name: str) -> None:
    new_task.write(name, tmp_path / "made")
    names: list[str] = []
    for file in (tmp_path / "made").rglob("*.py"):
        tree = ast.parse(file.read_text())
        if file.name == "task.py":
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    names.append(node.name)
                elif isinstance(node, (ast.Import, ast.ImportFrom)):
                    names.extend(alias.asname or alias.name for alias in node.names)
    assert len(names) == len(set(names))
    assert not set(names) & set(dir(builtins))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("StreetSigns", "; street_signs would do"),
        ("street-signs", "; street_signs would do"),
        ("9lives", "begins with a letter"),
        ("", "begins with a letter"),
        ("_", "begins with a letter"),
        ("e\u0301t\u00e9", "lower-case letters"),
        ("../up", "; up would do"),
        ("a\nb", "; a_b would do"),
        ("{{ 7 * 7 }}", "begins with a letter"),
        ("a" * 41, "at most 40"),
        ("class", "a word of Python"),
        ("doctor", "a command of perl-vlm"),
        ("vqa", "a task 'vqa' already, of perl-vlm"),
        ("eval", "a command of perl-vlm"),
    ],
)
def test_a_name_that_no_task_can_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-task", name]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_no_task_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "path" / "perl_vlm_maps").mkdir(parents=True)
    (tmp_path / "path" / "perl_vlm_maps" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.chdir(tmp_path)
    assert main(["new-task", "maps"]) == 2
    assert "a package perl_vlm_maps already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["path"]


def test_folders_in_the_way_stay_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, said in (
        ("full", "is a folder that is not empty"),
        ("file", "is not a folder"),
        ("link", "is not a folder"),
    ):
        assert main(["new-task", "signs", "--out", str(tmp_path / name)]) == 1
        assert said in capsys.readouterr().err
    assert main(["new-task", "signs", "--out", str(tmp_path / "file" / "in")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert files_of(tmp_path) == {"file": b"mine", "full/README.md": b"mine"}
    (tmp_path / "empty").mkdir()
    assert main(["new-task", "signs", "--out", str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "pyproject.toml").is_file()


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-task", "--help"]) == 0
    assert "--out" in capsys.readouterr().out
    for argv in ([], ["--out", "x"], ["signs", "more"], ["signs", "--oot", "x"], ["signs", "--out"]):
        assert main(["new-task", *argv]) == 2
    assert capsys.readouterr().out == ""


def test_without_copier_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "copier", None)
    assert main(["new-task", "signs", "--out", str(tmp_path / "made")]) == 1
    assert "pip install copier" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_the_template_can_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "template"
    for path, text in files_of(new_task.TEMPLATE).items():
        (template / path).parent.mkdir(parents=True, exist_ok=True)
        (template / path).write_bytes(text)
    original = new_task.TEMPLATE
    with (template / "copier.yml").open("a") as file:
        file.write(f"_tasks: ['touch {tmp_path}/ran']\n")
    monkeypatch.setattr(new_task, "TEMPLATE", template)
    with contextlib.suppress(Exception):  # copier may well refuse such a template
        new_task.write("signs", tmp_path / "made")
    assert not (tmp_path / "ran").exists()
    settings = yaml.safe_load((original / "copier.yml").read_text())
    assert {key for key in settings if key.startswith("_")} == {"_subdirectory", "_templates_suffix"}


def test_it_needs_neither_git_nor_a_home_nor_torch(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from perl_vlm import new_task; new_task.write('captions', pathlib.Path('made')); "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path / "none")}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
    assert files_of(tmp_path / "made") == files_of(EXAMPLE)
    assert {path.name for path in tmp_path.iterdir()} == {"made"}
