"""The command line. Torch is imported only once the arguments are understood and something is to be trained."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from perl_vlm import __version__
from perl_vlm.cli_settings import UsageError
from perl_vlm.errors import PerlVlmError

VERBS = {
    "run": "the whole pipeline: reward model, PPO, evaluation",
    "sft": "supervised fine-tuning on the reference answers",
    "rm": "train the reward model",
    "ppo": "train the policy against the reward",
    "eval": "compare a policy with its anchor on held-out data",
    "data": "look at what the task will train on: --preview N [--out page.html], or --check all of it",
}
COMMANDS = {
    "tasks": "the registered tasks and where they come from",
    "new-task": "write a distribution with a task of your own to start from: NAME [--out DIR]",
    "models": "what a model is made of, and trained models as plain ones: inspect NAME, export RUN --out DIR",
    "eval": "measure finished runs by a suite of evaluations: --runs FOLDER ... [--suite NAME|FILE.yaml]",
    "study": "the papers' studies on a task: NAME --task TASK; `perl-vlm study` lists them",
    "plan": "peak memory and time of a stage before it runs: --model NAME --stage sft|rm|ppo --gpu 24GB|NAME",
    "doctor": "versions, devices, plugins, and what would go wrong",
}
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``perl-vlm`` with these arguments (the process's own where None) and return the exit code.

    0: done; 1: an error that the user can mend; 2: the command line or a config is not understood; 130: Ctrl-C. An
    error with an attribute ``exit_code``, or a PerlVlmError with ``code``, chooses its own.
    """
    try:
        with _own_warnings():
            code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("perl-vlm: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has closed it, as `head` does. Python must not fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        chosen = getattr(error, "exit_code", None)
        if chosen is None and isinstance(error, PerlVlmError):
            chosen = getattr(error, "code", 1)
        if chosen is None:
            raise
        print(f"perl-vlm: error: {error}", file=sys.stderr)
        return int(chosen)


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Print each of perl-vlm's own warnings once, in a line without the file and code that Python would show."""
    package = Path(__file__).resolve().parent
    seen: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is not UserWarning or package not in Path(filename).resolve().parents:
            plain(message, category, filename, lineno, file, line)
        elif str(message) not in seen:
            seen.add(str(message))
            print(f"perl-vlm: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        plain = warnings.showwarning
        warnings.showwarning = show
        yield


def _dispatch(argv: list[str]) -> int:
    first = argv[0] if argv else "--help"
    if first in ("-h", "--help"):
        print(_help())
        return 0
    if first == "--version":
        print(f"perl-vlm {__version__}")
        return 0
    if first in COMMANDS:
        return _command(first, argv[1:])
    if first.startswith("-"):
        raise UsageError(f"unknown option {first}. The task comes first: perl-vlm <task> <verb> [--key value ...]")
    return _task(first, argv[1:])


def _command(name: str, rest: list[str]) -> int:
    if name == "models":
        from perl_vlm.models_command import models

        return models(rest)
    if name == "plan":
        from perl_vlm.plan.command import plan

        return plan(rest)
    if name == "new-task":
        from perl_vlm.new_task import new_task

        return new_task(rest)
    if name in ("eval", "study"):
        from perl_vlm import registry

        return registry.load_command(name)(rest)
    if rest in (["-h"], ["--help"]):
        print(f"usage: perl-vlm {name}\n\n{COMMANDS[name]}")
        return 0
    if rest:
        raise UsageError(f"`perl-vlm {name}` takes no arguments, found {' '.join(rest)!r}")
    if name == "tasks":
        _list_tasks()
        return 0
    from perl_vlm.doctor import doctor

    return doctor()


def _task(name: str, rest: list[str]) -> int:
    from perl_vlm import registry

    try:
        entry = registry.find(name)
    except registry.UnknownTask as error:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = near and f"there is no task or command {name!r}. Did you mean `perl-vlm {near[0]}`?"
        raise UsageError(meant or str(error)) from error
    if entry.note:
        print(f"perl-vlm: warning: {entry.note}", file=sys.stderr)
    if not rest or rest[0] in ("-h", "--help"):
        print(_task_help(name))
        return 0
    verb, arguments = rest[0], rest[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"after `perl-vlm {name}` comes a verb, found {verb!r}.{hint} Verbs: {', '.join(VERBS)}")
    task = registry.load(name)
    from perl_vlm import cli_parse

    if "-h" in arguments or "--help" in arguments:
        print(cli_parse.help_text(task, verb))
        return 0
    parsed = cli_parse.parse(task, verb, arguments)
    for note in parsed.notes:
        print(f"perl-vlm: {note}", file=sys.stderr)
    if parsed.print_config:
        from perl_vlm.report.html import settings_yaml

        print(settings_yaml(parsed.config), end="")
        return 0
    if verb == "data":
        if parsed.check:
            from perl_vlm.data_check import check_data

            return check_data(task(parsed.config.task), parsed.config.out)
        from perl_vlm.preview import preview

        preview(task(parsed.config.task), parsed.preview, parsed.config.out)
        return 0
    from perl_vlm.train.pipeline import run_verb

    return run_verb(verb, task(parsed.config.task), parsed.config)


def _list_tasks() -> None:
    """Every registered task; a broken one says why and harms no other."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from perl_vlm import plugins, registry

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("task", "modality", "stages", "judged by", "from"):
        table.add_column(heading, overflow="fold")
    entries = registry.registered()
    examined = plugins.examine(entries.values())
    for name, found in examined.items():
        stages = ", ".join(verb for verb in VERBS if verb != "data")
        cells = ["broken", "", ""] if found.problem else [found.modality, stages, found.primary_metric]
        table.add_row(*map(Text, (registry.plain(name), *cells, entries[name].distribution)))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=False)
    console.print(table if table.row_count else "No task is registered; reinstall perl-vlm.")
    for text in (*(found.problem for found in examined.values() if found.problem), *registry.unreadable()):
        print(f"broken: {text}")
    for entry in entries.values():
        if entry.note:
            print(f"ignored: {entry.note}")


def _help() -> str:
    from perl_vlm import registry

    tasks = ", ".join(map(registry.plain, registry.registered())) or "none; reinstall perl-vlm"
    return "\n".join(
        [
            "usage: perl-vlm <task> <verb> [--config FILE|NAME] [--key value ...]",
            "       perl-vlm <command>",
            "",
            "LoRA reward models and LoRA PPO for language and vision-language models, on one frozen base.",
            "",
            f"tasks: {tasks}",
            "",
            *_columns("verbs", VERBS),
            "",
            *_columns("commands", COMMANDS),
            "",
            "`perl-vlm <task> <verb> --help` lists every setting; --version prints the version.",
        ]
    )


def _task_help(name: str) -> str:
    flags = {
        "--config FILE|NAME": "a YAML file or a shipped config; command line over YAML",
        "--model NAME": "tiny (bundled), a local folder, or a hub name",
        "--out FOLDER": "where the run goes; a fresh folder under runs/ when not given",
        "--resume": "continue the run in --out from its last good checkpoint",
        "--seed N": "seeds initialisation, data order and sampling",
        "--print_config": "write the resolved settings as YAML and stop",
    }
    return "\n".join(
        [
            f"usage: perl-vlm {name} <verb> [--config FILE|NAME] [--key value ...]",
            "",
            *_columns("verbs", VERBS),
            "",
            *_columns("settings most used", flags),
            "",
            f"`perl-vlm {name} <verb> --help` lists them all: --task.*, --lora.*, --sft.*, --rm.*, --ppo.*, --eval.*.",
        ]
    )


def _columns(title: str, rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"{title}:", *(f"  {name:<{width}}  {text}" for name, text in rows.items())]


if __name__ == "__main__":
    sys.exit(main())
