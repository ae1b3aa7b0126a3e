"""Plugins are found without being imported, and a broken one harms no other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from perl_vlm import registry
from perl_vlm.cli import main
from perl_vlm.errors import PerlVlmError

Install = Callable[..., None]

GOOD = """
from perl_vlm.task import Task
class Good(Task):
    name = "{name}"
    modality = "text"
    primary_metric = "accuracy"
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a distribution with one module and one task on the path, as pip would."""

    def add(distribution: str, task: str, code: str, attribute: str = "Good") -> None:
        module = distribution.replace("-", "_")
        site = tmp_path / distribution
        meta = site / f"{module}-2.5.dist-info"
        meta.mkdir(parents=True)
        (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.5\n")
        (meta / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{task} = {module}:{attribute}\n")
        (site / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return add


def test_vqa_is_registered_by_perl_vlm():
    entry = registry.registered()["vqa"]
    assert (entry.distribution.split()[0], entry.value) == ("perl-vlm", "perl_vlm_vqa:VQA")
    assert registry.load("vqa").name == "vqa"


def test_listing_imports_nothing(install: Install):
    install("acme-lazy", "lazy", "raise RuntimeError('imported')")
    assert registry.registered()["lazy"] == registry.TaskEntry("lazy", "acme-lazy 2.5", "acme_lazy:Good")
    assert "acme_lazy" not in sys.modules


def test_a_third_party_task_loads(install: Install):
    install("acme-good", "captions", GOOD.format(name="captions"))
    assert registry.load("captions").__module__ == "acme_good"


def test_duplicates_name_both_distributions(install: Install):
    install("acme-one", "twin", GOOD.format(name="twin"))
    install("acme-two", "twin", GOOD.format(name="twin"))
    with pytest.raises(PerlVlmError, match=r"'twin' is registered twice.*acme-(one|two) 2.5.*acme-(one|two) 2.5"):
        registry.registered()


def test_an_unknown_name_is_answered_with_the_nearest_and_all(install: Install):
    install("acme-good", "captions", GOOD.format(name="captions"))
    with pytest.raises(PerlVlmError, match=r"'caption'. Did you mean 'captions'\? Registered tasks: captions, .*vqa"):
        registry.load("caption")


@pytest.mark.parametrize(
    ("code", "attribute", "cause"),
    [
        ("import no_such_module", "Good", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)", "Good", "SystemExit: 3"),
        ("x = 1", "Missing", "AttributeError"),
        ("class Good: pass", "Good", "is no subclass of perl_vlm.task.Task"),
        (GOOD.format(name="other"), "Good", "calls itself 'other'"),
        (GOOD.format(name="odd").replace('"text"', '"smell"'), "Good", "modality 'smell'"),
        (GOOD.format(name="odd").replace("primary_metric", "metric"), "Good", "does not name its primary_metric"),
        (GOOD.format(name="odd") + "    Config = dict\n", "Good", "Config that is no dataclass"),
    ],
)
def test_a_broken_plugin_names_its_distribution_and_the_cause(install: Install, code: str, attribute: str, cause: str):
    install("acme-odd", "odd", code, attribute)
    with pytest.raises(PerlVlmError) as caught:
        registry.load("odd")
    assert "acme-odd 2.5" in str(caught.value)
    assert cause in str(caught.value)


def test_tasks_shows_the_broken_beside_the_sound(install: Install, capsys: pytest.CaptureFixture[str]):
    install("acme-odd", "odd", "raise ValueError('no good')")
    assert main(["tasks"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "broken" in rows["odd"]
    assert "acme-odd 2.5" in rows["odd"]
    assert "image+text" in rows["vqa"]
    assert "ValueError: no good" in rows["broken:"]


def test_a_broken_plugin_leaves_other_tasks_usable(install: Install, capsys: pytest.CaptureFixture[str]):
    install("acme-odd", "odd", "raise ValueError('no good')")
    assert main(["vqa", "run", "--config", "none", "--print_config"]) == 0
    assert "source: generated" in capsys.readouterr().out
    assert main(["odd", "run"]) == 1
    assert "acme-odd 2.5" in capsys.readouterr().err
