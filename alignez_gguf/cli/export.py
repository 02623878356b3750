"""`alignez-gguf export`: the main job."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alignez_gguf.cli import options
from alignez_gguf.control.layer_ranges import parse_layers
from alignez_gguf.readout import HOOKS

if TYPE_CHECKING:
    from alignez_gguf.engines.base import Engine
    from alignez_gguf.exporters import Format
    from alignez_gguf.pairs.pairs import PreferencePair
    from alignez_gguf.pipeline import Aspect, EditScoringEngine
    from alignez_gguf.prompts.chat_template import FramingChoice, HasMetadata
    from alignez_gguf.selection.scoring import EditScore

MAX_TOKENS = 48
"""Maximum tokens per answer of a pair, unless asked otherwise."""

_METHODS = ["ccs", "svd", "svd-diff", "mean", "logistic"]


@click.command()
@click.argument("model")
@click.option("-q", "--queries", help=options.QUERIES_HELP)
@options.column
@click.option("-o", "--output", type=options.FILE, help="The file to write.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["native", "stock", "glp", "merged", "peft"]),
    default="native",
    show_default=True,
    help="The form of OUTPUT; see `alignez-gguf convert --help`.",
)
@click.option(
    "--recipe",
    type=click.Choice(["auto", "paper"]),
    default="auto",
    show_default=True,
    help="auto chooses without labels; paper is AlignEZ to the letter.",
)
@click.option("--method", type=click.Choice(_METHODS), help="Try only this direction method; default: all.")
@click.option(
    "--read",
    "reading",
    type=click.Choice(["prompt", "response", "response-mean", "verdict", "refusal"]),
    help="Read hidden states only at this position.",
)
@click.option(
    "--hook", type=click.Choice(HOOKS), help="Read only this hook; default: all that the model has."
)
@click.option("--layers", help="Layers that may be edited, as 4-20, 4- or 3,5,8.")
@click.option(
    "--threshold",
    type=options.FiniteRange(0, 1),
    default=0.5,
    show_default=True,
    help="Threshold of --recipe paper.",
)
@click.option(
    "--kl-budget",
    type=options.FiniteRange(0, min_open=True),
    default=0.1,
    show_default=True,
    help="How far answers may move from the base model's, in nat per token.",
)
@click.option(
    "--scope",
    help="The time steps that are edited: generation (the default), all, or first:N.",
)
@click.option(
    "--gate",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="auto steers only requests that look harmful to the model, where it can tell; off steers all. A "
    "--format of other programs knows no gate.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=MAX_TOKENS,
    show_default=True,
    help="Maximum tokens per answer.",
)
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Pairs for each query.")
@click.option(
    "--pairs",
    "pairs_file",
    type=options.FILE,
    help="Preference pairs of your own instead of generated ones: a .jsonl, .json, .csv, .tsv or .parquet "
    "file with prompt, chosen and rejected (texts or messages), or with query, helpful and harmful.",
)
@click.option(
    "--mix",
    type=options.FiniteRange(0, min_open=True),
    help="With --pairs: generate pairs too, and count each given one this many times.",
)
@click.option(
    "--aspect",
    "aspects",
    multiple=True,
    help="NAME or NAME=WEIGHT, several times for several: safety (the default), helpfulness, or one of "
    "your --templates.",
)
@click.option("--force", is_flag=True, help="Go on where the personas show no safety behaviour to amplify.")
@click.option("--generator", help="URL of an OpenAI-compatible completions endpoint that writes the pairs.")
@click.option("--generator-model", help="The model's id there, if there are several.")
@click.option(
    "--api-key", envvar="ALIGNEZ_API_KEY", help="API key for --generator; better set in ALIGNEZ_API_KEY."
)
@click.option(
    "--for",
    "target_file",
    type=options.FILE,
    help="The GGUF that the file is for, where MODEL is another form of it: edits are chosen there.",
)
@click.option(
    "--choose",
    type=click.IntRange(1),
    help="Take this row of the table of an earlier run with the same --work-dir, and confirm it.",
)
@click.option(
    "--score-only", type=options.FILE, metavar="CONTROL", help="Only score this control file on MODEL."
)
@options.work_dir
@options.templates
@options.framing
@options.seed
@options.engine
@options.quiet
def export(
    model: str,
    queries: str | None,
    column: str | None,
    output: Path | None,
    form: Format,
    pairs_file: Path | None,
    mix: float | None,
    aspects: tuple[str, ...],
    generator: str | None,
    generator_model: str | None,
    api_key: str | None,
    target_file: Path | None,
    score_only: Path | None,
    scope: str | None,
    gate: str,
    layers: str | None,
    work_dir: Path | None,
    templates: Path | None,
    framing: FramingChoice,
    quiet: bool,
    threads: int | None,
    gpu_layers: int,
    parallel: int,
    context: int | None,
    **settings: Any,
) -> None:
    """Make the control file of MODEL from unlabelled queries.

    MODEL is a GGUF file, or a folder or hub id for transformers. It answers each query as a helpful and as a
    harmful persona; small probes find in each layer what tells the answers apart; the file makes llama.cpp
    remove it, or add its opposite, while it generates.

    \b
    Examples:
      alignez-gguf export model-Q4_K_M.gguf -q default -o safe.gguf
      alignez-gguf export model-Q4_K_M.gguf --pairs dpo.jsonl --mix 4 -q default -o safe.gguf
      alignez-gguf export org/model --for model-Q4_K_M.gguf -q default -o safe.gguf
    """
    from alignez_gguf import exporters
    from alignez_gguf.cli.choice import print_choice
    from alignez_gguf.cli.console import reporter
    from alignez_gguf.cli.convert import show
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.control.scope import Scope
    from alignez_gguf.pipeline import Settings, score_control
    from alignez_gguf.pipeline import export as run
    from alignez_gguf.prompts.chat_template import templates_of
    from alignez_gguf.prompts.queries import load_queries
    from alignez_gguf.prompts.templates import Templates
    from alignez_gguf.runtime import bindings
    from alignez_gguf.storage.atomic import require_writable
    from alignez_gguf.storage.workdir import WorkDirectory

    if output is None and score_only is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if queries is None and (pairs_file is None or mix is not None):
        raise click.UsageError("Missing option '-q' / '--queries'.")
    if mix is not None and pairs_file is None:
        raise click.UsageError("--mix says how much given pairs count: give them with --pairs.")
    if settings["choose"] is not None and work_dir is None:
        raise click.UsageError("--choose takes a row of an earlier run: give the --work-dir of that run.")
    if settings["choose"] is not None and len(aspects) > 1:
        raise click.UsageError("--choose takes a row of one table: export one aspect at a time.")
    chosen = Settings(
        scope=None if scope is None else Scope.parse(scope),
        gate=gate == "auto" and form == "native",
        aspects=_aspects(aspects),
        **settings,
    )
    given = _given(pairs_file, mix)
    asked = load_queries(queries, column) if queries is not None and (not given or mix is not None) else []
    if output is not None and form != "peft":
        require_writable(output)
    source = options.gguf_file(model)
    steered = target_file or source
    if steered is not None and (chosen.recipe == "auto" or score_only is not None):
        bindings.require_patched()
    say = reporter(quiet)
    with ExitStack() as opened:
        place = opened.enter_context(options.resumable(output or Path(f"{score_only}.score"), work_dir))
        engine, target, described = _engines(
            opened, source or model, target_file, (threads, gpu_layers, parallel, context)
        )
        chosen = replace(chosen, layers=parse_layers(layers, target.info.n_layer))
        if form == "stock" and chosen.hook is None and target.info.has_post_norm:
            say.note(
                "--hook residual: stock llama.cpp cannot add before the norm that follows the MLP of "
                f"{target.info.arch} models"
            )
            chosen = replace(chosen, hook="residual")
        default = Templates.paper if chosen.recipe == "paper" else Templates.default
        asking = templates_of(described, templates, framing, default=default)
        work = opened.enter_context(WorkDirectory(place))
        writer: Any = engine
        if generator is not None:
            from alignez_gguf.engines.endpoint import EndpointGenerator

            writer = EndpointGenerator(generator, model=generator_model, api_key=api_key)
        if score_only is not None:
            control = ControlFile.load(score_only)
            for aspect in chosen.aspects:
                one = replace(chosen, aspects=(aspect,))
                figures, n_queries = score_control(
                    control, target, asked, asking, one, work, say, generator=writer, given=given
                )
                click.echo(_line(figures, n_queries, aspect.name if len(chosen.aspects) > 1 else ""))
            return
        made = run(engine, asked, asking, chosen, work, say, target=target, generator=writer, given=given)
        if not quiet:
            print_choice(made, sys.stderr)
        assert output is not None
        if steered is None:
            made.control.save(output)
            written = exporters.Written((output,))
        else:
            written = exporters.write(form, made.control, steered, output, progress=say)
    show(written, quiet=quiet)


def _given(path: Path | None, mix: float | None) -> list[PreferencePair]:
    """The pairs of a file; next to generated ones each counts `mix` times."""
    if path is None:
        return []
    from alignez_gguf.pairs.pairs import load_pairs

    pairs = load_pairs(path)
    return pairs if mix is None else [replace(pair, weight=pair.weight * mix) for pair in pairs]


def _aspects(texts: tuple[str, ...]) -> tuple[Aspect, ...]:
    from alignez_gguf.pipeline import Aspect

    def parsed() -> Iterator[Aspect]:
        for text in texts:
            name, given, weight = text.partition("=")
            try:
                aspect = Aspect(name, float(weight) if given else 1.0)
            except ValueError:
                raise click.BadParameter(f"{text!r}: write NAME or NAME=WEIGHT.") from None
            if not 0 < aspect.weight < float("inf"):
                raise click.BadParameter(f"{text!r}: the weight must be a number above 0.")
            yield aspect

    aspects = tuple(parsed())
    if len({aspect.name for aspect in aspects}) < len(aspects):
        raise click.BadParameter("an aspect is named twice.")
    return aspects or (Aspect(),)


def _line(figures: EditScore, n_queries: int, aspect: str) -> str:
    """What `--score-only` prints of an aspect."""
    name = f"{aspect}: " if aspect else ""
    return (
        f"{name}gain {figures.gain:+.3f} +- {figures.standard_error:.3f} nat an answer, "
        f"KL {figures.kl:.3f} nat/token over {n_queries} queries"
    )


def _engines(
    opened: ExitStack,
    model: Path | str,
    target_file: Path | None,
    how: tuple[int | None, int, int, int | None],
) -> tuple[Engine, EditScoringEngine, HasMetadata | None]:
    """Open the engine that reads, the one that is edited, and the model that says how it is asked."""
    if isinstance(model, Path):
        engine = opened.enter_context(options.open_engine(model, *how))
        if target_file is None:
            return engine, engine, engine.model
        target = opened.enter_context(options.open_engine(target_file, *how))
        return engine, target, target.model
    from alignez_gguf.engines.transformers.engine import TransformersEngine

    source = opened.enter_context(TransformersEngine(model, n_ctx=how[3]))
    if target_file is None:
        return source, source, None
    target = opened.enter_context(options.open_engine(target_file, *how))
    return source, target, target.model
