"""bnaudit list, schema and doctor: what there is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from bnaudit.cli.common import CONFIG, PATHS, UNTRUSTED, explained, interruptible, show

if TYPE_CHECKING:
    from bnaudit.environments import Described


@click.command("list")
@click.argument(
    "what",
    type=click.Choice(["backends", "scenarios", "cases", "environments"]),
    default="backends",
    metavar="[WHAT]",
)
@PATHS
@click.option(
    "--env",
    "specifications",
    multiple=True,
    metavar="NAME=SPEC",
    help="Of environments: one more, as in bnaudit run; built if it has to be. Repeatable.",
)
@CONFIG
@click.option("--prune", is_flag=True, help="Remove the environments that were built.")
@click.option("-v", "--verbose", is_flag=True, help="Of environments: why others cannot run.")
def list_(
    what: str,
    paths: tuple[str, ...],
    specifications: tuple[str, ...],
    config: str | None,
    prune: bool,
    verbose: bool,
) -> None:
    """Lists backends (the default), scenarios, cases or environments.

    PATH limits scenarios and cases, as in bnaudit run. Of environments: interpreter, packages, the real
    frameworks that each can run, and what is in the cache.
    """
    with explained(), interruptible():
        if paths and what in ("backends", "environments"):
            raise click.UsageError(f"list {what} takes no PATH", click.get_current_context())
        for option, is_given in (
            ("--prune", prune),
            ("--env", specifications),
            ("--config", config),
            ("-v", verbose),
        ):
            if is_given and what != "environments":
                raise click.UsageError(
                    f"{option} belongs to list environments", click.get_current_context()
                )
        if what == "backends":
            _list_backends()
            return
        if what == "environments":
            _list_environments(specifications, config, prune=prune, verbose=verbose)
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


def _list_environments(
    given: Sequence[str], config: str | None, *, prune: bool, verbose: bool
) -> None:
    from bnaudit import building
    from bnaudit.render import environments as rendering
    from bnaudit.render.words import count

    if prune:
        size = sum(environment.size for environment in building.built())
        removed = len(building.prune())
        click.echo(
            f"removed {count(removed, 'environment')}, {rendering.bytes_of(size)}, "
            f"from {building.cache_folder()}"
        )
        return
    entries = _describe_environments(given, config)
    show(rendering.environments(entries, verbose=verbose))
    click.echo()
    for line in rendering.cache(list(building.built()), building.cache_folder()):
        click.echo(line)


def _describe_environments(given: Sequence[str], config: str | None) -> list[Described]:
    """This interpreter, those given, which are built where they have to be, and those of the settings."""
    from bnaudit import config as settings
    from bnaudit import environments
    from bnaudit.building import Request
    from bnaudit.progress import watch
    from bnaudit.subject import scratch_folder

    specifications = settings.load(config).with_given(given)
    asked = dict(environments.parse_all(given))
    entries = []
    with scratch_folder() as scratch:
        for name, spec in {environments.CURRENT: environments.CURRENT, **specifications}.items():
            try:
                found = environments.read(name, spec)
            except environments.EnvironmentSpecError as error:
                entries.append(environments.Described(name, spec, problem=str(error)))
                continue
            if isinstance(found, Request) and not found.is_built() and name not in asked:
                wanted = " ".join([found.python, *found.requirements])
                entries.append(environments.Described(name, wanted))
                continue
            place = environments.resolve(name, spec, watch(quiet=False))
            entries.append(environments.describe(name, spec, place, scratch))
    return entries


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
