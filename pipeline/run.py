"""Prune a language model: learn which weights to keep, export the result, measure it against layer-wise methods.

Examples:
    python pipeline/run.py run --recipe nano                      # a laptop; the embedded model, a few minutes
    python pipeline/run.py run --recipe smollm2 sparsities=[0.5]  # any field of the recipe by its dotted name
    python pipeline/run.py tune --recipe nano --space schedules   # search better settings
    ray job submit --working-dir . -- python pipeline/run.py run --recipe llama-3.2-1b   # a cluster

Where the package is installed, leap-prune stands for python pipeline/run.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
# This file's own folder, which Python puts first, would hide packages behind our module names.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "pipeline"]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

from pipeline.errors import UserError  # noqa: E402 - the path is set above
from pipeline.program import program  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog=program().removeprefix("python "),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("run", "run a recipe; finished stages are skipped"),
        ("plan", "print stages, sizes, a time estimate and what is finished already; start nothing"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--recipe", required=True, help="name of a recipe, or a .yaml file")
        command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the recipe")
        if name == "run":
            _add_modes(command)
    text = "print the variants of all runs side by side; write it as HTML too"
    compare = commands.add_parser("compare", help=text, description=text)
    compare.add_argument("filter", nargs="?", default="", help="MLflow's filter, such as \"tags.model = 'nano'\"")
    compare.add_argument("--experiment", default="leap", help="MLflow experiment")
    text = "upload what a tracking server missed; again uploads nothing twice"
    sync = commands.add_parser("sync", help=text, description=text)
    for command in (compare, sync):
        command.add_argument("--runs", type=Path, default=Path("runs"), help="the directory of the runs")
        command.add_argument("--uri", help="MLflow tracking URI; by default the runs' own")
    _add_tune(commands)
    for name, text in (
        ("recipes", "list the recipes"),
        ("fields", "list all fields of a recipe with their defaults and meaning"),
    ):
        commands.add_parser(name, help=text, description=text)
    return top


def _add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "search better settings of mask learning; the winner becomes a recipe"
    command = commands.add_parser("tune", help=text, description=f"{text}. A killed search continues.")
    command.add_argument("--recipe", required=True, help="name of a recipe, or a .yaml file")
    command.add_argument("--space", required=True, help="name of a space in tune_spaces/, or a .yaml file")
    command.add_argument("--trials", type=int, metavar="N", help="trials; by default as many as the space says")
    command.add_argument(
        "--search", choices=("optuna", "random", "grid"), default="optuna", help="who proposes trials (default: optuna)"
    )
    command.add_argument(
        "--against", choices=("tokens", "sparsity"), help="a second objective; prints what no other trial beats on both"
    )
    command.add_argument("--full", action="store_true", help="train every trial to its end")
    command.add_argument(
        "--confirm", action="store_true", help="run the winner and what it would replace with three seeds each"
    )
    _add_modes(command)
    command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the recipe")


def _add_modes(command: argparse.ArgumentParser) -> None:
    told = command.add_mutually_exclusive_group()
    told.add_argument("--quiet", action="store_true", help="print warnings and the result only")
    told.add_argument("--json", action="store_true", help="print JSON lines: progress, warnings, the result")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments. Overrides may stand before, between and after options, which argparse alone does not see."""
    top = parser()
    args, rest = top.parse_known_args(arguments)
    if any(text.startswith("-") or "overrides" not in args for text in rest):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parse(arguments)
    if importlib.util.find_spec("ray") is None:
        print("error: the pipeline's packages are not installed; pip install 'leap-prune[pipeline]'", file=sys.stderr)
        return 2
    try:
        if args.command == "recipes":
            from pipeline.commands.catalogue import list_recipes

            list_recipes()
        elif args.command == "fields":
            from pipeline.commands.catalogue import list_fields

            list_fields()
        elif args.command == "compare":
            from pipeline.commands.compare import compare

            compare(args.filter, args.runs, args.uri, args.experiment)
        elif args.command == "sync":
            from pipeline.commands.compare import upload

            return upload(args.runs, args.uri)
        elif args.command == "plan":
            from pipeline.commands.show import show_plan
            from pipeline.config.recipe import load

            show_plan(load(args.recipe, args.overrides))
        elif args.command == "tune":
            from pipeline.commands.tune import tune
            from pipeline.execution.progress import mode_for
            from pipeline.tuning.search import Options

            options = Options(proposer=args.search, trials=args.trials, against=args.against, stop_early=not args.full)
            tune(args.recipe, args.space, args.overrides, options, args.confirm, mode_for(args.quiet, args.json))
        else:
            from pipeline.commands.prune import prune
            from pipeline.config.recipe import load
            from pipeline.execution.progress import mode_for

            prune(load(args.recipe, args.overrides), mode_for(args.quiet, args.json))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except Exception as error:
        found = _mendable(error)
        if found is None:
            raise
        from pipeline.tracking.redaction import redact

        print(f"error: {redact(str(found))}", file=sys.stderr)
        return 2
    return 0


def _mendable(error: Exception) -> UserError | None:
    """The error that the user can mend; Ray is imported only to look into others."""
    if isinstance(error, UserError):
        return error
    from pipeline.execution.failures import mendable

    return mendable(error)


if __name__ == "__main__":
    sys.exit(main())
