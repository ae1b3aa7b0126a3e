"""Rows of Arrow tables: what is stored, pictures in place, and a quick way through many of them."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl_vlm.data.arrow_table import ArrowTable, CellImage
from perl_vlm.data.images import ImageBytes, content_key
from perl_vlm.data.screening import peek_at


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade % 256, shade // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The datasets library, keeping its cache in a temporary folder."""
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


ROWS = 900


@pytest.fixture
def table(datasets: Any) -> ArrowTable:
    """Every place that a picture may have, in several chunks: structures, lists of them, plain bytes, nested lists."""
    features = datasets.Features(
        {
            "n": datasets.Value("int64"),
            "image": datasets.Image(),
            "images": datasets.List(datasets.Image()),
            "raw": datasets.Value("binary"),
            "deep": datasets.List(datasets.List(datasets.Value("large_binary"))),
            "said": datasets.List({"role": datasets.Value("string")}),
        }
    )

    def cell(number: int) -> Any:
        return [None, {"bytes": None, "path": f"{number}.png"}, {"bytes": png(number), "path": None}][number % 3]

    def part(start: int, end: int) -> Any:
        numbers = range(start, end)
        columns = {
            "n": list(numbers),
            "image": [cell(n) for n in numbers],
            "images": [[{"bytes": png(n + k), "path": None} for k in range(n % 4)] if n % 5 else None for n in numbers],
            "raw": [png(n + 7) if n % 2 else None for n in numbers],
            "deep": [[[png(n)], [], [png(n + 1), png(n + 2)]] for n in numbers],
            "said": [[{"role": "user"}] * (n % 3) for n in numbers],
        }
        return datasets.Dataset.from_dict(columns, features=features)

    whole = datasets.concatenate_datasets([part(0, 600), part(600, 601), part(601, ROWS)])
    return ArrowTable(whole, "t")


def plain(value: Any) -> Any:
    """The same with pictures read."""
    if isinstance(value, CellImage):
        return value.read()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def expected(n: int) -> dict[str, Any]:
    return {
        "n": n,
        "image": [None, {"bytes": None, "path": f"{n}.png"}, png(n)][n % 3],
        "images": [png(n + k) for k in range(n % 4)] if n % 5 else None,
        "raw": png(n + 7) if n % 2 else None,
        "deep": [[png(n)], [], [png(n + 1), png(n + 2)]],
        "said": [{"role": "user"}] * (n % 3),
    }


def test_one_row_and_many_rows_hold_what_is_stored(table: ArrowTable) -> None:
    order = list(range(ROWS))
    random.Random(0).shuffle(order)
    for indices in (range(ROWS), order[:300], [5, 5, 6, 7, 599, 600, 601, 602], []):
        assert [plain(row) for row in table.read(indices)] == [expected(n) for n in indices]
    for n in (0, 2, 599, 600, 601, ROWS - 1):
        assert plain(table.row(n)) == expected(n)
    assert len(table) == ROWS


def test_pictures_are_looked_at_where_they_lie(table: ArrowTable) -> None:
    rows = list(table.read(range(ROWS)))
    for n in (2, 602, 899):
        assert rows[n]["image"].peek() == peek_at(png(n))
        assert rows[n]["deep"][2][1].peek(10).head == png(n + 2)[:10]
        assert rows[n]["image"].load().getpixel((0, 0)) == (n % 256, n // 256, 0)
    assert isinstance(table.encoded(2, ("image",)), memoryview)


def test_equal_pictures_of_two_tables_have_one_key(datasets: Any) -> None:
    features = datasets.Features({"image": datasets.Image()})

    def sources(*shades: int) -> list[Any]:
        cells = {"image": [{"bytes": png(shade), "path": None} for shade in shades]}
        table = ArrowTable(datasets.Dataset.from_dict(cells, features=features), "data")
        return [table.row(index)["image"] for index in range(len(shades))]

    one, other = sources(1, 2), sources(2, 3, 2)
    assert one[1] != other[0], "as objects they differ"
    keys = [content_key(source) for source in (*one, *other)]
    assert keys[1] == keys[2] == keys[4] == content_key(ImageBytes(png(2), "elsewhere"))
    assert len(set(keys)) == 3


def test_a_row_that_cannot_be_read_does_not_take_its_neighbours_along(datasets: Any) -> None:
    import pyarrow as pa

    from perl_vlm.errors import BadRecord

    broken = pa.array([b"fine", b"\xff\xfe", b"good"]).view(pa.string())
    data = datasets.Dataset(pa.table({"prompt": broken}))
    first, second, third = ArrowTable(data, "t").read(range(3))
    assert (first, third) == ({"prompt": "fine"}, {"prompt": "good"})
    assert isinstance(second, BadRecord)
    assert second.origin == "t row 2"


def test_a_data_set_that_was_shuffled_keeps_its_own_order(datasets: Any) -> None:
    data = datasets.Dataset.from_dict({"n": list(range(50)), "image": [png(n) for n in range(50)]}).shuffle(seed=1)
    rows = list(ArrowTable(data, "t").read(range(50)))
    assert [row["n"] for row in rows] == data["n"]
    assert all(row["image"].read() == png(row["n"]) for row in rows)
