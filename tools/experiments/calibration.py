"""How often does `export` write a file where there is nothing to find?

    python3 tools/experiments/calibration.py [--exports 100] [--queries 48] [--json]

Exports of the demo model, each with another seed, from pairs of two answers that the model itself has given
to the plain prompt: nothing tells them apart but chance, and no edit brings the model nearer to them. A file
that is written all the same is a false one; at most one in twenty may be.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import setup_environment


def main(arguments: Sequence[str]) -> None:
    """Export again and again; print how the exports ended, or JSON as the last line."""
    options = _parse(arguments)
    ended: Counter[str] = Counter()
    for seed in range(options.exports):
        reason = _exported(seed, options.queries)
        ended[reason or "wrote a file"] += 1
        print(f"seed {seed}: {reason or 'WROTE A FILE'}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"exports": options.exports, "written": ended["wrote a file"]}))
    else:
        for how, count in ended.most_common():
            print(f"{count:4} {how}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export where there is nothing to find.")
    parser.add_argument("--exports", type=int, default=100, help="(default: 100)")
    parser.add_argument("--queries", type=int, default=48, help="of the demo, from its start (default: 48)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args(arguments)


def _exported(seed: int, n_queries: int) -> str:
    """Why an export wrote nothing, in its first words; empty where it would have written a file."""
    from alignez_gguf import demo
    from alignez_gguf.engines.base import GenerationRequest, Sampling
    from alignez_gguf.engines.llama.engine import LlamaEngine
    from alignez_gguf.errors import NoGainError, QueryError
    from alignez_gguf.pairs.pairs import PreferencePair
    from alignez_gguf.pipeline import Settings, export
    from alignez_gguf.progress import SilentReporter
    from alignez_gguf.prompts.templates import METADATA_KEY, Persona, Templates
    from alignez_gguf.storage.workdir import WorkDirectory

    queries = demo.FIT_QUERIES.read_text(encoding="utf-8").splitlines()[:n_queries]
    with (
        tempfile.TemporaryDirectory() as folder,
        LlamaEngine(demo.MODEL) as engine,
        WorkDirectory(folder) as work,
    ):
        shown = Templates.from_toml(engine.model.metadata(METADATA_KEY) or "")
        nobody = Persona("", shown.plain)
        templates = replace(shown, helpful=nobody, harmful=nobody)
        prompts = [templates.plain_prompt(query) for query in queries for _ in range(2)]
        requests = [GenerationRequest(prompt, 1000 * seed + index) for index, prompt in enumerate(prompts)]
        said = dict(engine.generate(requests, Sampling(max_tokens=24, stop=templates.stop)))
        texts = [said[index].text.strip() for index in range(len(said))]
        pairs = [
            PreferencePair(query, ours, theirs, "", "")
            for query, ours, theirs in zip(queries, texts[::2], texts[1::2], strict=True)
        ]
        settings = Settings(seed=seed, max_tokens=24)
        try:
            export(engine, [], templates, settings, work, SilentReporter(), target=engine, given=pairs)
        except (NoGainError, QueryError) as error:
            return str(error).split(":")[0].split(";")[0]
    return ""


if __name__ == "__main__":
    _parse(sys.argv[1:])  # --help and bad usage need no set-up
    setup_environment.enter()
    main(sys.argv[1:])
