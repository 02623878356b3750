"""`alignez-gguf serve`: an OpenAI-compatible server and a page, with a strength for every request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from alignez_gguf.cli import options
from alignez_gguf.errors import require_extra

if TYPE_CHECKING:
    from alignez_gguf.prompts.chat_template import FramingChoice


@click.command()
@options.model
@click.option(
    "-c",
    "--control",
    "controls",
    multiple=True,
    metavar="[NAME=]FILE",
    help="A control file, under a name that requests can give; may be repeated. The first is the default.",
)
@options.strength
@options.scope
@click.option("--name", help="Model id in the API; default: the name of the file.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; one that is not local needs --api-key.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one."
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="ALIGNEZ_API_KEY",
    show_envvar=True,
    help="A key that clients have to send; may be repeated.",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Maximum tokens per answer."
)
@click.option(
    "--max-prompt", type=click.IntRange(1), help="Maximum tokens per prompt; default: the context length."
)
@click.option(
    "--max-body",
    type=click.IntRange(1),
    default=1 << 20,
    show_default=True,
    help="Maximum bytes per request body.",
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Maximum number of waiting requests.",
)
@click.option(
    "--grace",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Seconds that running requests get to finish when the server stops.",
)
@options.templates
@options.framing
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: the number of physical cores.")
@click.option("--gpu-layers", type=int, default=-1, show_default=True, help="Layers on the GPU; -1 is all.")
@click.option(
    "--parallel",
    type=click.IntRange(2, 250),
    default=16,
    show_default=True,
    help="Sequences decoded in parallel.",
)
@click.option(
    "--context", type=click.IntRange(16), help="Context length in tokens, prompt and answer together."
)
@options.rpc
@options.quiet
def serve(
    model: Path,
    controls: tuple[str, ...],
    strength: float,
    scope: str | None,
    name: str | None,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    max_tokens: int,
    max_prompt: int | None,
    max_body: int,
    queue: int,
    grace: int,
    templates: Path | None,
    framing: FramingChoice,
    threads: int | None,
    gpu_layers: int,
    parallel: int,
    context: int | None,
    quiet: bool,
) -> None:
    """Serve MODEL over HTTP as OpenAI's API does, with a strength for each request, and a page to see it.

    A request says how it is steered with one field more: "steering": {"strength": 0.8, "scope": "all",
    "control": "NAME"}. Neighbours never affect each other.

    \b
    Examples:
      alignez-gguf serve model-Q4_K_M.gguf -c safe.gguf
      ALIGNEZ_API_KEY=... alignez-gguf serve model-Q4_K_M.gguf -c safe.gguf --host 0.0.0.0
    """
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.runtime import bindings

    with require_extra("serve", "the server"):
        from alignez_gguf.server import run as serving
        from alignez_gguf.server.service import RequestLimits, Service

    if not serving.is_loopback(host) and not api_keys:
        raise click.UsageError(
            f"everybody could use a server on {host}; give --api-key, or leave --host {host} out."
        )
    if not all(api_keys):
        raise click.UsageError("an API key must not be empty.")
    named = dict(_named(text) for text in controls)
    if len(named) < len(controls):
        raise click.UsageError("two control files have the same name; write -c NAME=FILE.")
    loaded = {control: ControlFile.load(path) for control, path in named.items()}
    if loaded:
        bindings.require_patched()
    listening = serving.listen(host, port)
    with listening:
        service = Service(
            model,
            loaded,
            strength=strength,
            scope=scope,
            name=name,
            templates=templates,
            framing=framing,
            n_ctx=context,
            n_parallel=parallel,
            n_threads=threads,
            n_gpu_layers=gpu_layers,
            limits=RequestLimits(max_tokens, max_prompt, queue, max_body),
        )
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listening.getsockname()[1]}"

        def say_ready() -> None:
            if not quiet:
                click.echo(
                    f"{service.model.info}. The page is {url}, the API is {url}/v1; Ctrl-C stops it.",
                    err=True,
                )
                for warning in service.warnings:
                    click.echo(warning, err=True)

        serving.serve(service, listening, api_keys=api_keys, grace_seconds=grace, on_ready=say_ready)


def _named(text: str) -> tuple[str, Path]:
    """NAME=FILE, or FILE under the name that it has."""
    name, separator, path = text.partition("=")
    if separator and name and path and not Path(text).exists():
        return name, Path(path)
    return Path(text).stem, Path(text)
