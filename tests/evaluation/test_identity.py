"""What cells, items and rewards are known by."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl_vlm.data.images import ImageFile
from perl_vlm.types import Example, Message
from perl_vlm_eval import identity
from perl_vlm_eval.identity import basis, code_hash, data_hash, item_keys, reward_identity


class Drawn:  # no dataclass, no content_key: `load` is all that a source must have
    def __init__(self, color: str) -> None:
        self.color = color

    def load(self) -> Image.Image:
        return Image.new("RGB", (8, 8), self.color)


def example(name: str, text: str = "what is it?", **more: Any) -> Example:
    return Example(name, (Message("user", (text,)),), **more)


def picture(folder: Path, color: str) -> ImageFile:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(folder / "0.png")
    return ImageFile(folder / "0.png")


def test_items_are_known_by_what_they_say_on_any_machine(tmp_path: Path) -> None:
    one = example("row-1", images=(picture(tmp_path / "here", "red"),), reference="red")
    same = replace(one, id="row-7", images=(picture(tmp_path / "there", "red"),))
    other = replace(one, images=(picture(tmp_path / "else", "blue"),))
    assert item_keys([one]) == item_keys([same])
    assert item_keys([one]) != item_keys([other])
    assert item_keys([one]) != item_keys([replace(one, reference="crimson")])
    assert data_hash([one]) != data_hash([same]), "ids are part of a cell's hash"


def test_items_that_say_the_same_stay_apart() -> None:
    keys = item_keys([example("a"), example("b"), example("c", "and this?"), example("d")])
    assert len(set(keys)) == 4
    assert keys[1] == f"{keys[0]}-2"


def test_pictures_of_any_class_have_a_hash_of_what_they_show() -> None:
    red, again, blue = (example("a", images=(Drawn(color),)) for color in ("red", "red", "blue"))
    assert item_keys([red]) == item_keys([again])
    assert data_hash([red]) == data_hash([again])
    assert item_keys([red]) != item_keys([blue])


def test_a_task_s_code_is_part_of_what_figures_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "judging_task"
    package.mkdir()
    (package / "__init__.py").write_text("class Judging:\n    pass\n")
    (package / "rules.py").write_text("GOOD = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_hash(importlib.import_module("judging_task").Judging)
    (package / "rules.py").write_text("GOOD = 2\n")
    identity._code_hash.cache_clear()
    assert code_hash(sys.modules["judging_task"].Judging) != before
    assert code_hash(type("Made", (), {"__module__": "__main__"})) == ""


def test_rewards_are_known_by_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = {"learned": "mine"}, {"learned": "theirs"}
    assert reward_identity("0.5*learned + verify", mine) != reward_identity("0.5*learned + verify", theirs)
    assert reward_identity("verify", mine) == reward_identity("verify", theirs)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_rules.py").write_text("def good(**given):\n    return [1.0]\n")
    for spec in (f"python:{tmp_path / 'own_rules.py'}:good", "python:own_rules:good"):
        before = reward_identity(spec, {})
        (tmp_path / "own_rules.py").write_text((tmp_path / "own_rules.py").read_text() + "# other\n")
        assert reward_identity(spec, {}) != before, spec
    folder = tmp_path / "classifier"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    before = reward_identity(f"classifier:{folder}@good", {})
    (folder / "model.safetensors").write_bytes(b"two")
    assert reward_identity(f"classifier:{folder}@good", {}) != before


def test_all_records_are_hashed_unless_they_are_very_many(monkeypatch: pytest.MonkeyPatch) -> None:
    class Still:
        def environment(self) -> None:
            return None

    records = [example(str(place)) for place in range(50)]
    assert basis(Still(), records, 5) == records  # type: ignore[arg-type]
    monkeypatch.setattr(identity, "MOST_HASHED", 20)
    assert len(basis(Still(), records, 5)) == 5  # type: ignore[arg-type]
