"""`alignez-gguf runtime`: the patched llama-cpp-python, built and described."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from alignez_gguf.cli import options

if TYPE_CHECKING:
    from types import TracebackType

    from alignez_gguf.installer.status import RuntimeStatus
    from alignez_gguf.steering.patched import SteeringSupport


@click.group()
def runtime() -> None:
    """Build the patched llama-cpp-python, and say what is there."""


@runtime.command()
@click.option(
    "--cmake-args",
    envvar="CMAKE_ARGS",
    default="",
    show_envvar=True,
    help="Flags for the build of llama.cpp, as -DGGML_CUDA=on.",
)
@click.option("--rpc", is_flag=True, help="With RPC, which spreads a model over several machines.")
@click.option("--rebuild", is_flag=True, help="Build again, also where a built wheel is kept.")
@click.option(
    "--wheel",
    type=click.Path(exists=True, path_type=Path),
    help="Install this wheel, or the matching one of this folder, instead of compiling.",
)
@click.option(
    "--no-install", is_flag=True, help="Only build or check the wheel; the environment stays as it is."
)
@options.quiet
@click.pass_context
def build(
    context: click.Context,
    cmake_args: str,
    rpc: bool,
    rebuild: bool,
    wheel: Path | None,
    no_install: bool,
    quiet: bool,
) -> None:
    """Build llama-cpp-python with the steering patch, check it, and install it here.

    Takes about 4 minutes on 2 cores the first time and seconds after that. The library that comes out is
    checked with a quantized model in a process of its own; where the CPU does not bear the flags, it is built
    again with flags that it does.

    With --wheel, no compiler is needed: a wheel that tools/build_wheel.py made is checked in the same way and
    installed. It matches if it was built for this platform, with the patches of this alignez-gguf. No other
    place is searched for wheels, since they are code that runs here.

    \b
    Examples:
      alignez-gguf runtime build
      CMAKE_ARGS="-DGGML_CUDA=on" alignez-gguf runtime build
      alignez-gguf runtime build --wheel ~/Downloads
    """
    import shlex

    from alignez_gguf.installer.build import build_wheel, install, wheel_from
    from alignez_gguf.installer.status import status

    try:
        arguments = shlex.split(cmake_args)
    except ValueError as error:
        raise click.BadParameter(f"{cmake_args!r}: {error}", param_hint="--cmake-args") from error
    if rpc:
        arguments.append("-DGGML_RPC=ON")
    if wheel is not None and (rpc or rebuild or _is_given(context, "cmake_args")):
        raise click.UsageError("--wheel compiles nothing; leave out --cmake-args, --rpc and --rebuild")
    with _Progress(quiet) as progress:
        if wheel is not None:
            built = wheel_from(wheel, progress)
        else:
            built = build_wheel(progress, arguments, rebuild=rebuild)
            if built.cached:
                progress.say("this build is in the cache")
        if not no_install:
            progress.say("installing")
            install(built.path)
    click.echo(f"wheel: {built.path}")
    if built.cmake_args:
        click.echo(f"flags: {shlex.join(built.cmake_args)}")
    if built.reason:
        click.echo(f"built {built.reason}")
    if no_install:
        return
    found = status()
    if found.mend:
        click.echo(f"Error: {found.mend}", err=True)
        context.exit(1)
    click.echo(f"installed: llama-cpp-python {found.version} with the patch, in {found.location}")


@runtime.command("status")
@click.argument("model", type=options.FILE, required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.pass_context
def status_command(context: click.Context, model: Path | None, as_json: bool) -> None:
    """Say which llama-cpp-python is installed, whether it is patched, and whether it works on this machine.

    With MODEL, also which way steer() takes for it: the patch, or the adapters of stock llama.cpp. Exits 1
    where something is missing.

    \b
    Example:
      alignez-gguf runtime status --json
    """
    from alignez_gguf.installer.status import status

    found = status()
    support = None
    if model is not None and found.version is not None and found.quantized_products:
        from alignez_gguf.steering.patched import steering_support

        support = steering_support(model)
    if as_json:
        import dataclasses
        import json

        document = dataclasses.asdict(found)
        if support is not None:
            document["model"] = dataclasses.asdict(support)
        click.echo(json.dumps(document))
    else:
        _print_table(found, support)
    if found.mend or (support is not None and support.steers == "no"):
        context.exit(1)


def _is_given(context: click.Context, name: str) -> bool:
    """Whether an option was given on the command line, and not by the environment."""
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _print_table(found: RuntimeStatus, support: SteeringSupport | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = {
        "llama-cpp-python": found.version or "none",
        "location": found.location or "-",
        "library": found.library or "-",
        "steering patch": "yes" if found.patched else "no",
        "patches": found.patches or "-",
        "steers": _STEERS[found.steers],
        "devices": "\n".join(f"{device.name}: {device.description}" for device in found.devices) or "-",
        "built with": found.system_info or "-",
        "quantized products": "work" if found.quantized_products else "do not work",
        "to do": found.mend or "nothing",
    }
    if support is not None:
        rows["this model"] = _STEERS[support.steers] + (f" ({support.reason})" if support.reason else "")
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value, overflow="fold"))
    Console().print(table)


_STEERS = {
    "patched": "through the patch",
    "stock": "through adapters of stock llama.cpp: no additions at layer 0",
    "no": "no",
}


class _Progress:
    """Tells a build on stderr: a line a step, and on a terminal a bar with the time left."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._quiet = quiet
        self._bar = Progress(
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=1.0, visible=False)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print a step."""
        self._bar.reset(self._task, visible=False)
        if not self._quiet:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def progress(self, fraction: float) -> None:
        """Move the bar of the running compilation."""
        self._bar.update(self._task, completed=fraction, visible=True)
