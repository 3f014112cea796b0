"""From the name of a task in a recipe to what lm-eval evaluates.

A name is one of

* a path (it contains a slash or ends in ``.yaml``): an lm-eval task file, ``folder/name`` of a task, group or tag
  defined in the YAML files of a folder, or a folder with one task or group that no other group of it contains, such as
  the one that ``cloze.write_cloze_task`` writes;
* anything else: a task, group or tag registered with lm-eval, whose documents come from the hub.

Relative ``data_files`` of a local task count from the nearest folder, the YAML's own or one above it, under which the
file exists.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from pipeline.data import content

_GROUP_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata"}


@dataclass(frozen=True)
class ResolvedTask:
    """A task whose definition has been found and whose documents have not been read."""

    name: str
    """Name of the task, group or tag."""
    entries: tuple[str | dict[str, Any], ...]
    """What lm-eval's TaskManager loads: the configuration of each local task, or one registered name."""

    def load(self) -> dict[str, Task]:
        """Read the documents (from the hub for a registered name): lm-eval tasks by name, a group as its members."""
        local = not isinstance(self.entries[0], str)
        # The registry costs some 20 s to build and local tasks do not need it.
        manager = TaskManager(include_defaults=False) if local else _registry()
        tasks: dict[str, Task] = manager.load(list(self.entries))["tasks"]
        return tasks


def resolve_task(spec: str | Path) -> ResolvedTask:
    """Find the definition of a task.

    Raises:
        ValueError: there is no such task (the message lists the closest or all names), a folder's task is ambiguous, a
            group is defined in a way that is not supported, or a data file is missing.
    """
    if isinstance(spec, Path) or "/" in spec or spec.endswith(".yaml"):
        return _resolve_local(Path(spec).expanduser())
    registered = _registry().all_tasks
    if spec not in registered:
        raise ValueError(
            f"no task {spec!r} is registered with lm-eval ({_closest(spec, registered)}); "
            "a local task is given as a path, with a slash or ending in .yaml"
        )
    return ResolvedTask(spec, (spec,))


def task_content(spec: str | Path) -> list[dict[str, Any]]:
    """What tells a local task from any other, as JSON: its definition, and hashes of the code and data it names.

    Raises:
        ValueError: see :func:`resolve_task`.
    """
    return [_content(entry) for entry in resolve_task(spec).entries if isinstance(entry, dict)]


def _content(entry: dict[str, Any]) -> dict[str, Any]:
    code: set[str] = set()

    def named(value: Any) -> str:
        """A function that the definition names, or any other value that JSON has no form for."""
        if source := getattr(getattr(value, "__code__", None), "co_filename", None):
            code.add(source)
        return getattr(value, "__qualname__", repr(value))

    arguments = dict(entry.get("dataset_kwargs") or {})
    if "data_files" in arguments:  # where they lie is all the same
        arguments["data_files"] = _mapped(arguments["data_files"], lambda path: content.of_places([path])[0])
    definition = json.loads(json.dumps({**entry, "dataset_kwargs": arguments}, default=named))
    path = Path(str(entry.get("dataset_path", ""))).expanduser()
    local = "/" in str(path) and path.exists()
    return {
        "definition": definition,
        "code": content.of_files(sorted(code)),
        "data": content.of_tree(path) if local else None,
    }


@functools.cache
def _registry() -> TaskManager:
    return TaskManager()


def _resolve_local(path: Path) -> ResolvedTask:
    if path.is_dir():
        folder = _Folder(path)
        name = folder.only_root()
    else:
        folder = _Folder(path.parent)
        name = folder.name_of(path)
    return ResolvedTask(name, tuple(_load_config(file) for file in folder.task_files(name)))


class _Folder:
    """The tasks, groups and tags that the YAML files of one folder define."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, Path] = {}  # by name of the task or group
        self.members: defaultdict[str, list[str]] = defaultdict(list)  # of groups and of tags
        self.unsupported: set[str] = set()
        for file in sorted(directory.glob("*.yaml")):
            try:
                config = load_yaml(file, resolve_func=False)
            except (yaml.YAMLError, OSError, ValueError) as error:
                raise ValueError(f"{file} is not an lm-eval task file: {' '.join(str(error).split())}") from error
            name = config.get("group", config.get("task"))
            if not isinstance(name, str):
                continue  # a template that others include
            self.files[name] = file
            if "group" in config:
                members = _listed(config.get("task"))
                self.members[name] = [member for member in members if isinstance(member, str)]
                if config.keys() - _GROUP_KEYS or len(self.members[name]) < len(members):
                    self.unsupported.add(name)
            else:
                for tag in _listed(config.get("tag")):
                    self.members[tag].append(name)

    def only_root(self) -> str:
        inner = {member for members in self.members.values() for member in members}
        groups = [name for name in self.files if name in self.members and name not in inner]
        covered = {file for group in groups for file in self.task_files(group)}
        roots = groups + [name for name, file in self.files.items() if name not in self.members and file not in covered]
        if not roots:
            raise ValueError(f"{self.directory} holds no lm-eval YAML files")
        if len(roots) > 1:
            raise ValueError(
                f"{self.directory} holds several tasks, name one as {self.directory}/NAME: {', '.join(roots)}"
            )
        return roots[0]

    def name_of(self, path: Path) -> str:
        for name, file in self.files.items():
            if file == path:
                return name
        if path.name not in self.files and path.name not in self.members:
            known = sorted(self.files | self.members)
            if not known:
                raise ValueError(f"no task {path}: {self.directory} holds no lm-eval YAML files")
            raise ValueError(f"no task {path.name!r} in {self.directory} ({_closest(path.name, known)})")
        return path.name

    def task_files(self, name: str) -> list[Path]:
        """The files of the single tasks that ``name`` stands for, each once."""
        if name in self.unsupported:
            raise ValueError(
                f"{self.files[name]}: a local group can only list names of tasks, groups and tags, without overrides"
            )
        if name in self.members:
            nested = (self.task_files(member) for member in self.members[name])
            return list(dict.fromkeys(file for files in nested for file in files))
        if name not in self.files:
            raise ValueError(f"a group in {self.directory} has the member {name!r}, which no YAML file there defines")
        return [self.files[name]]


def _listed(value: Any) -> list[Any]:
    """A YAML value that holds several, one or no item."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _load_config(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = load_yaml(file)
    arguments = config.get("dataset_kwargs") or {}
    if "data_files" in arguments:
        config["dataset_kwargs"] = {
            **arguments,
            "data_files": _mapped(arguments["data_files"], lambda path: _absolute(path, file)),
        }
    return config


def _mapped(data_files: Any, change: Callable[[str], str]) -> Any:
    """``data_files`` as the datasets library takes them (a path, a list, or either by split), each path changed."""
    if isinstance(data_files, dict):
        return {split: _mapped(value, change) for split, value in data_files.items()}
    if isinstance(data_files, list):
        return [_mapped(value, change) for value in data_files]
    return change(data_files)


def _absolute(data_files: str, file: Path) -> str:
    if "://" in data_files:
        return data_files
    for folder in file.resolve().parents:
        if (folder / data_files).is_file():
            return str(folder / data_files)
    raise ValueError(f"{file}: data file {data_files} exists neither under {file.resolve().parent} nor above it")


def _closest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    if len(known) <= 10 or not close:
        shown = known[:10]
        return f"{len(known)} are: {', '.join(shown)}{', ...' if len(known) > len(shown) else ''}"
    return f"closest of {len(known)}: {', '.join(close)}"
