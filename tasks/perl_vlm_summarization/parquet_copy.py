"""Data sets that are a loading script on the hub, which ``datasets`` 4 and later refuse to run.

The hub keeps the rows that such a script gave as Parquet files, on a branch of the data set: a folder for each
configuration, in it one for each split.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from perl_vlm.data.arrow_table import ArrowTable
from perl_vlm.data.places import once
from perl_vlm.data.sources import Opened
from perl_vlm.data.splits import Openers, split_named
from perl_vlm.data.tables import Table
from perl_vlm.errors import PerlVlmError

if TYPE_CHECKING:
    from perl_vlm_summarization.task import SummarizationConfig

SCRIPTS = ("openai/summarize_from_feedback",)
"""The data sets that are opened so."""
BRANCH = "refs/convert/parquet"


def open_copy(config: SummarizationConfig) -> Opened:
    """The splits of a configuration. Raises PerlVlmError where the hub does not give them."""
    import datasets

    name, folder = str(config.hub_name), config.dataset_config
    place = f"{name}/{folder}" if folder else name
    # The branch knows no configurations by name: its files are found by their folder.
    where = {"revision": BRANCH, **({"data_dir": folder} if folder else {})}

    def guarded(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            # A network that fails shows up as errors of httpx, huggingface_hub, fsspec or datasets, by version.
            raise PerlVlmError(
                f"The Parquet copy of {place!r} cannot be had from the hub ({type(error).__name__}: {error}). Without "
                "a network, use --task.source generated, or --task.source local --task.path FOLDER with its files; "
                "--task.dataset trl-lib/tldr-preference has the same comparisons."
            ) from error

    def opener(part: str) -> Callable[[], Table]:
        load = partial(datasets.load_dataset, name, split=part, **where)
        return once(lambda: ArrowTable(guarded(load), f"{place} {part}"))

    names: list[str] = guarded(lambda: datasets.get_dataset_split_names(name, **where))
    only = config.hub_split
    if only is not None and only not in names:
        raise PerlVlmError(f"{place} has no split {only!r}; it has {', '.join(names)}. --task.dataset_split names one.")
    tables: Openers = {split_named(part): opener(part) for part in names} if only is None else {None: opener(only)}
    return Opened(tables, place, None, config.columns)
