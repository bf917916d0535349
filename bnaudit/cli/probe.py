"""bnaudit probe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from bnaudit.cli.common import (
    INCOMPLETE,
    Failure,
    console,
    explained,
    interruptible,
    make_room,
    save,
)

if TYPE_CHECKING:
    from bnaudit.probe import MemoryFormat
    from bnaudit.scenario import Dtype


@click.command(epilog="Exit: 0, 2 usage, 3 unavailable, crashed or without a mean, 130.")
@click.argument("backend")
@click.option(
    "--size",
    type=click.IntRange(3, 256),
    default=32,
    show_default=True,
    help="Values per channel: every pair of them is asked about, in a channel of its own.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Images that these values are spread over, in equal shares.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32", "float64"]),
    default="float32",
    show_default=True,
)
@click.option(
    "--memory-format",
    type=click.Choice(["contiguous", "channels_last", "strided"]),
    default="contiguous",
    show_default=True,
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Threads of the backend: orders depend on them.",
)
@click.option("--json", "target", metavar="FILE", help="Save the finding as JSON; - for stdout.")
def probe(
    backend: str,
    size: int,
    images: int,
    dtype: Dtype,
    memory_format: MemoryFormat,
    threads: int,
    target: str | None,
) -> None:
    """Shows in which order a backend adds up its mean, and in how many bits.

    BACKEND is one of bnaudit list, FILE.py:NAME or package.module:NAME.
    """
    context = click.get_current_context()
    if size % images:
        raise click.UsageError(f"{size} values cannot be shared by {images} images", context)
    if memory_format == "channels_last" and size == images:
        raise click.UsageError("channels_last takes several values in each image", context)
    with explained(), interruptible():
        from bnaudit import probe as probing
        from bnaudit.render.tree import finding_text
        from bnaudit.subject import Subject, scratch_folder

        make_room([("--json", target)])
        name = _one_backend(backend)
        setting = probing.Setting(images, size // images, dtype, memory_format)
        with scratch_folder() as scratch, Subject(threads=threads, scratch=scratch) as subject:
            try:
                finding = probing.probe(name, setting, subject, scratch)
            except probing.ProbeError as error:
                raise Failure(str(error), INCOMPLETE) from error
            text = finding.to_json(threads, subject.environment())
        screen = console(stderr=target == "-")
        screen.print(finding_text(finding, threads, screen.width))
        save(target, text)


def _one_backend(given: str) -> str:
    """The backend of this name; without a device, that on the cpu."""
    from bnaudit.selection import select
    from bnaudit.worker.backends import BACKENDS

    named = [backend.name for backend in select([given], [], BACKENDS) if backend.required]
    if len(named) != 1:
        raise click.UsageError(
            f"{given!r} is not the name of one backend", click.get_current_context()
        )
    return named[0]
