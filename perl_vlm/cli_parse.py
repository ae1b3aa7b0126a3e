"""From arguments and YAML files to a RunConfig. The command line goes over the files, a later file over an earlier one.

Values are parsed and checked by jsonargparse, one setting at a time; settings are found by walking the dataclasses, so
that no class path, and nothing that would be imported or called, can stand in a config. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from perl_vlm import shipped
from perl_vlm.cli_settings import Setting, UsageError, expected, nearest, sections_of, settings_of, with_values
from perl_vlm.config import RunConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.task import Task

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

STAGES = ("sft", "rm", "ppo")
_SHORT = ("steps", "batch_size", "lr")
_NO_CONFIG = "none"
_OF_DATA = ("ppo.max_new_tokens", "ppo.reward_model")
"""Settings of a quickstart outside its task section that are about its own data: how long their answers are, and
whether the task can judge them."""
PREVIEW = Setting("preview", int, 8, "How many examples and how many preferences to show.")
CHECK = Setting(
    "check", bool, False, "Look at every record and name the bad ones by row; --out takes them all as JSON lines."
)


@dataclass(frozen=True)
class Parsed:
    """What a task verb was asked to do."""

    config: RunConfig
    """The resolved settings; ``config.task`` is an instance of the task's Config."""
    preview: int
    """For the data verb: how many records to show."""
    check: bool
    """For the data verb: look at every record instead of showing some."""
    print_config: bool
    """Write the resolved settings instead of running."""
    notes: tuple[str, ...]
    """What the user should be told of before it runs."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a verb, taken apart but not yet parsed."""

    values: dict[str, str]
    """Text by dotted key; the last one given."""
    configs: list[str]
    """``--config`` values in order."""
    print_config: bool


def parse(task: type[Task], verb: str, argv: Sequence[str]) -> Parsed:
    """Resolve the settings of ``perl-vlm <task> <verb> <argv>``.

    Raises:
        UsageError: an unknown key, a value of the wrong type, a config that cannot be read.
        PerlVlmError: values that contradict each other, or a task whose Config has no defaults.
    """
    defaults = default_config(task)
    settings = settings_of(defaults)
    command = f"perl-vlm {task.name} {verb}"
    known = settings | ({"preview": PREVIEW, "check": CHECK} if verb == "data" else {})
    arguments = split_arguments(argv, known, command)
    files, notes = _config_files(task, arguments, settings)
    parser = _parser(known, command)
    values: dict[str, Any] = {}
    rank: dict[str, int] = {}
    for place, (file, read) in enumerate(files):
        values |= _checked(parser, read, known, file)
        rank |= dict.fromkeys(read, place)
    values |= _checked(parser, arguments.values, known, None)
    rank |= dict.fromkeys(arguments.values, len(files))
    preview, check = values.pop("preview", PREVIEW.default), values.pop("check", CHECK.default)
    if preview < 1:
        raise UsageError(f"--preview is {preview}; it must be at least 1")
    _apply_short_forms(values, rank, verb)
    try:
        config = with_values(defaults, values)
    except ValueError as error:
        raise PerlVlmError(str(error)) from error
    return Parsed(config, preview, check, arguments.print_config, tuple(notes))


def default_config(task: type[Task]) -> RunConfig:
    """The settings when nothing is given. Raises PerlVlmError where the task's Config lacks a default."""
    try:
        return RunConfig(task=task.Config())
    except (TypeError, ValueError) as error:
        raise PerlVlmError(
            f"task {task.name!r} is broken: {task.Config.__qualname__}() failed ({error}). Every field of a task's "
            "Config needs a default, and the defaults must fit together."
        ) from error


def split_arguments(argv: Sequence[str], known: Mapping[str, Setting], command: str) -> Arguments:
    """Take ``--key value``, ``--key=value`` and bare switches apart.

    Raises UsageError for whatever is not a known flag, with the nearest ones, and for a missing value.
    """
    values: dict[str, str] = {}
    configs: list[str] = []
    print_config = False
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise UsageError(
                f"unexpected argument {word!r}. After `{command}` come settings as --key value; `{command} --help` "
                "lists them."
            )
        if key == "print_config":
            print_config = True
            continue
        if key != "config":
            _check_flag(key, known, command)
        if not equals:
            follows = bool(rest) and not rest[0].startswith("--")
            if not follows and not (key in known and known[key].is_switch):
                wanted = "a file or the name of a shipped config" if key == "config" else expected(known[key].hint)
                raise UsageError(f"--{key} needs a value: {wanted}")
            value = rest.pop(0) if follows else "true"
        if key == "config":
            configs.append(value)
        else:
            values[key] = value
    return Arguments(values, configs, print_config)


def parse_flags(settings: Mapping[str, Setting], argv: Sequence[str], command: str) -> dict[str, Any]:
    """The values of the flags that were given to a command without configs, by key, in their types.

    Raises UsageError for an unknown flag and for a value of the wrong type.
    """
    arguments = split_arguments(argv, settings, command)
    if arguments.configs:
        raise UsageError(f"`{command}` takes no --config; give its flags one by one")
    if arguments.print_config:
        raise UsageError(f"`{command}` takes no --print_config; `{command} --help` shows its flags and their defaults")
    return _checked(_parser(settings, command), arguments.values, settings, None)


def typed_values(settings: Mapping[str, Setting], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values that a file gives under some heading, by key, in their types.

    Args:
        where: the file and heading, as errors name them.

    Raises:
        UsageError: an unknown key, or a value of the wrong type.
    """
    for key in given:
        if key not in settings:
            near = nearest(key, settings)
            known = ", ".join(near or settings) or "none"
            raise UsageError(f"{where}: there is no setting {key}. {'Nearest' if near else 'There are'}: {known}.")
    return _checked(_parser(settings, where), given, settings, where)


def flags_help(settings: Mapping[str, Setting]) -> str:
    """A line for each flag: its name, what it means, its default."""
    width = max(len(key) for key in settings) + 2
    lines = []
    for key, setting in settings.items():
        default = "" if setting.default is None else f" (default: {setting.default})"
        indent = " " * (width + 4)
        text = textwrap.fill(setting.doc + default, 118, initial_indent=indent, subsequent_indent=indent).lstrip()
        lines.append(f"  {'--' + key:<{width}}  {text}")
    return "\n".join(lines)


def read_yaml(path: Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    """The settings of a YAML file by dotted key; sections may be nested or dotted.

    Raises UsageError, which names the file, for text that is no YAML mapping, a key that appears twice and a key that
    is unknown.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} should hold settings as `key: value` lines; it holds {type(content).__name__}")
    found: dict[str, Any] = {}
    _flatten(content, "", path, known, found)
    return found


def _flatten(
    content: dict[Any, Any], prefix: str, path: Path, known: Mapping[str, Setting], into: dict[str, Any]
) -> None:
    for name, value in content.items():
        key = f"{prefix}{name}"
        members = _members(key, known)
        if key in known:
            if key in into:
                raise UsageError(f"{path}: {key} is given twice; keep one of them")
            into[key] = value
        elif members and isinstance(value, dict):
            _flatten(value, f"{key}.", path, known, into)
        elif members and value is not None:  # a heading with nothing under it changes nothing
            raise UsageError(f"{path}: {key} is a section, found {value!r}. It holds {', '.join(members)}.")
        elif not members and (key != "task" or value):  # runs write `task: {}` for a task without settings
            sections = {one[: one.rindex(".")] for one in known if "." in one}
            near = nearest(key, [*known, *sections])
            hint = f"Nearest: {', '.join(near)}." if near else "`perl-vlm <task> <verb> --help` lists all."
            raise UsageError(f"{path}: there is no setting {key}. {hint}")


def _members(section: str, known: Mapping[str, Setting]) -> list[str]:
    return [key for key in known if key.startswith(f"{section}.")]


def _check_flag(key: str, known: Mapping[str, Setting], command: str) -> None:
    if key in known:
        return
    members = _members(key, known)
    if members:
        raise UsageError(f"--{key} is a section; give its settings one by one, such as --{members[0]}")
    near = nearest(key, known)
    hint = f"Nearest: {', '.join('--' + name for name in near)}." if near else f"`{command} --help` lists all."
    raise UsageError(f"`{command}` has no flag --{key}. {hint}")


def _config_files(
    task: type[Task], arguments: Arguments, settings: Mapping[str, Setting]
) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """The files with the settings that are taken from each, and what to say about them."""
    try:
        files = [shipped.config_path(name, task.name) for name in arguments.configs if name != _NO_CONFIG]
    except PerlVlmError as error:
        raise UsageError(str(error)) from error
    if arguments.configs or "model" in arguments.values:
        return [(file, read_yaml(file, settings)) for file in files], []
    quick = shipped.names().get(f"{task.name}/quickstart")
    if quick is None:
        return [], []
    read = read_yaml(quick, settings)
    taken = read
    if _names_other_data(arguments, read, settings):
        # What else it says is about the bundled model, whatever that reads.
        taken = {key: value for key, value in read.items() if not (key.startswith("task.") or key in _OF_DATA)}
    dropped = [key for key in _OF_DATA if key in read.keys() - taken.keys()]
    if any(key.startswith("task.") for key in read.keys() - taken.keys()):
        dropped.insert(0, "its task section")
    without = f" without {', '.join(dropped)} (about other data)" if dropped else ""
    return [(quick, taken)], [
        f"neither --config nor --model is given: using the shipped config {task.name}/quickstart{without} "
        "(--config none switches this off)"
    ]


def _names_other_data(arguments: Arguments, config: Mapping[str, Any], settings: Mapping[str, Setting]) -> bool:
    """Whether the command line names another source of data than a config speaks of."""
    if "task.source" not in arguments.values or "task.source" not in settings:
        return False
    return arguments.values["task.source"] != str(config.get("task.source", settings["task.source"].default))


def _apply_short_forms(values: dict[str, Any], rank: dict[str, int], verb: str) -> None:
    """Move ``steps``, ``batch_size`` and ``lr`` into the stage that is run, unless a later source set them there."""
    for short in _SHORT:
        value = values.pop(short, None)
        if value is None:
            continue
        if verb not in STAGES:
            stages = ", ".join(f"--{stage}.{short}" for stage in STAGES)
            raise UsageError(f"--{short} belongs to one stage, and {verb!r} is none; say which: {stages}")
        if rank[short] >= rank.get(f"{verb}.{short}", -1):
            values[f"{verb}.{short}"] = value


def _checked(
    parser: ArgumentParser, given: Mapping[str, Any], known: Mapping[str, Setting], file: Path | str | None
) -> dict[str, Any]:
    """The values of a file, or of the command line, in their types. Raises UsageError naming the first wrong one."""
    try:
        return _typed(parser, given, file)
    except argparse.ArgumentError:
        for key, value in given.items():
            try:
                _typed(parser, {key: value}, file)
            except argparse.ArgumentError as error:
                name = f"--{key}" if file is None else f"{file}: {key}"
                raise UsageError(f"{name} is {value!r}; expected {expected(known[key].hint)}") from error
        raise


def _typed(parser: ArgumentParser, given: Mapping[str, Any], file: Path | str | None) -> dict[str, Any]:
    if file is None:
        parsed = parser.parse_args([f"--{key}={value}" for key, value in given.items()])
    else:
        parsed = parser.parse_object(dict(given))
    return {key: parsed[key] for key in given}


def _parser(settings: Mapping[str, Setting], command: str) -> ArgumentParser:
    """A jsonargparse parser with one plain argument for each setting."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=command, exit_on_error=False, default_env=False)
    for setting in settings.values():
        parser.add_argument(f"--{setting.key}", type=setting.hint, default=setting.default)
    return parser


def help_text(task: type[Task], verb: str) -> str:
    """Every setting of the verb with its help, type and default."""
    from jsonargparse import ArgumentParser

    command = f"perl-vlm {task.name} {verb}"
    defaults = default_config(task)
    parser = ArgumentParser(prog=command, usage=f"{command} [--config FILE|NAME] [--key value ...]", default_env=False)
    general = parser.add_argument_group("run")
    config_help = (
        "A YAML file, or a shipped config by name; may be given several times, later over earlier. none: no config."
    )
    general.add_argument("--config", metavar="FILE|NAME", default=argparse.SUPPRESS, help=config_help)
    print_help = "Write the resolved settings as YAML and stop."
    general.add_argument("--print_config", action="store_true", default=argparse.SUPPRESS, help=print_help)
    if verb == "data":
        general.add_argument("--preview", metavar="N", type=int, default=PREVIEW.default, help=PREVIEW.doc)
        general.add_argument("--check", action="store_true", default=CHECK.default, help=CHECK.doc)
    groups = {"": general}
    for key, text in sections_of(defaults).items():
        groups[key] = parser.add_argument_group(key, text)
    for setting in settings_of(defaults, docs=True).values():
        group = groups[setting.key.rpartition(".")[0]]
        group.add_argument(f"--{setting.key}", type=setting.hint, default=setting.default, help=setting.doc or None)
    return parser.format_help()


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice.

    ``1e-4`` is a text to YAML 1.1, and so it stays one in a text setting, such as a commit of that spelling; where a
    number is wanted jsonargparse turns it into one.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
