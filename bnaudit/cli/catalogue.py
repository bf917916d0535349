"""bnaudit list, schema and doctor: what there is."""

from __future__ import annotations

import json

import click

from bnaudit.cli.common import PATHS, UNTRUSTED, explained, interruptible, show


@click.command("list")
@click.argument(
    "what",
    type=click.Choice(["backends", "scenarios", "cases", "environments"]),
    default="backends",
    metavar="[WHAT]",
)
@PATHS
@click.option("--prune", is_flag=True, help="Remove the environments that were built (--env).")
def list_(what: str, paths: tuple[str, ...], prune: bool) -> None:
    """Lists backends (the default), scenarios, cases or built environments.

    PATH limits scenarios and cases, as in bnaudit run.
    """
    with explained(), interruptible():
        if paths and what in ("backends", "environments"):
            raise click.UsageError(f"list {what} takes no PATH", click.get_current_context())
        if prune and what != "environments":
            raise click.UsageError(
                "--prune belongs to list environments", click.get_current_context()
            )
        if what == "backends":
            _list_backends()
            return
        if what == "environments":
            _list_environments(prune)
            return
        from bnaudit.render.console import scenario_list
        from bnaudit.scenario import load

        scenarios = load(paths)
        if what == "scenarios":
            show(scenario_list([(s.name, len(s.cases), s.description) for s in scenarios]))
        else:
            for scenario in scenarios:
                for case in scenario.cases:
                    click.echo(case.id)


def _list_backends() -> None:
    from bnaudit.render.console import backend_list
    from bnaudit.subject import Subject, scratch_folder
    from bnaudit.worker.backends import BACKENDS

    with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
        reasons = subject.describe(list(BACKENDS))
    entries = [
        (name, backend.kind, backend.default, reasons[name], backend.summary)
        for name, backend in BACKENDS.items()
    ]
    show(backend_list(entries))


def _list_environments(prune: bool) -> None:
    from bnaudit import environments

    for folder, request in environments.built():
        click.echo(f"{request['python']} {' '.join(request['requirements'])}\n    {folder}")
    if prune:
        click.echo(f"removed {len(environments.prune())} from {environments.cache_folder()}")
    elif not any(environments.built()):
        click.echo(f"none built yet; they would be in {environments.cache_folder()}")


@click.command()
@click.argument("what", type=click.Choice(["scenario", "report"]), default="scenario")
def schema(what: str) -> None:
    """Prints the JSON Schema of scenario files or of the report."""
    with explained():
        if what == "scenario":
            from bnaudit.scenario import json_schema
        else:
            from bnaudit.report import json_schema
        click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@click.command()
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def doctor(threads: int) -> int:
    """Shows what an audit would run on here, and what is missing."""
    with explained(), interruptible():
        from bnaudit.doctor import examine
        from bnaudit.render.console import examination

        found = examine(threads)
        show(examination(found))
        return UNTRUSTED if any(entry.is_fault for entry in found) else 0
