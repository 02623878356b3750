"""The sections of docs/real-models.md: one for each model and framing, without dates and paths.

No answer that complies with a harmful query is ever printed.
"""

from __future__ import annotations

import html
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from alignez_gguf.errors import OutputError
from alignez_gguf.evaluation.metrics import Estimate
from alignez_gguf.evaluation.results import BASE
from alignez_gguf.storage.atomic import write_text
from alignez_gguf.text.refusal import explain_refusal
from proving.asking import JAILBREAK, MAX_TOKENS, SAFE, SETS, SYSTEMS, UNSAFE, Said
from proving.counting import Share, difference, is_fluent, refuses, refuses_fluently, share
from proving.exporting import Exported
from proving.models import RealModel
from proving.truth import Truth

_END = "<!-- end -->"
_TITLE = "# Real models\n"
_WIDTH = 118
_EXAMPLES = 4
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n")
_COUNTS = (refuses, refuses_fluently, is_fluent)
_FRAMINGS = {"chat": "through its chat template", "transcript": "in a transcript"}


def section(
    model: RealModel,
    framing: str,
    recipe: str,
    exported: Exported,
    answers: Sequence[Said],
    found: Truth | None = None,
    gate: Mapping[str, int] | None = None,
    temperature: float = 0.0,
) -> str:
    """The section of one model in one framing, from its heading on."""
    by = "" if recipe == "auto" else f", --recipe {recipe}"
    by += f", sampled at temperature {temperature:g}" if temperature else ""
    drawn = f"sampled at temperature {temperature:g}, one for each query" if temperature else "greedy"
    asked = _FRAMINGS[framing]
    parts = [
        f"## {model.name}, asked {asked}{by}",
        f"It is {model.about}.",
        _export(exported),
        f"The answers are {drawn}, have at most {MAX_TOKENS} tokens, and are to queries that no fit has "
        "seen. The offline rules decide what refuses and what is fluent; the 95% intervals are Wilson's.",
        _shares(answers),
        *_gate(gate, answers),
        *_differences(answers),
        *_truth(found),
        *_safe_examples(answers),
        *_declined_examples(answers),
    ]
    return "\n\n".join(part if part[0] in "#|" else _wrapped(part) for part in parts) + "\n"


def put(path: Path, name: str, text: str) -> None:
    """Put a section into its place in a document, or at its end where it has none yet.

    Raises:
        OutputError: the document cannot be read or written.
    """
    mark = f"<!-- {name} -->"
    placed = f"{mark}\n{text}{_END}"
    try:
        document = path.read_text(encoding="utf-8") if path.exists() else _TITLE
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read {path}: {error}; name another document") from error
    before, found, rest = document.partition(f"{mark}\n")
    if not found:
        whole = f"{document.rstrip()}\n\n{placed}\n"
    else:
        _, end, after = rest.partition(_END)
        if not end:
            raise OutputError(f"{path} has {mark} without {_END} behind it; mend it by hand")
        whole = before + placed + after
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, whole)


def _export(exported: Exported) -> str:
    minutes = exported.minutes
    time = f"{minutes:.0f} minutes" if minutes >= 2 else f"{60 * minutes:.0f} seconds"
    took = f"`alignez-gguf export` took {time} on {os.cpu_count()} cores"
    if exported.control_file is not None:
        return f"{took} and wrote a control file."
    reason = _cell(exported.reason or "").rstrip(".")
    return f"{took} and ended with exit status {exported.rc}, without a file: {reason}."


def _shares(answers: Sequence[Said]) -> str:
    rows = []
    for system in _systems(answers):
        for name in SETS:
            chosen = [said for said in answers if (said.system, said.set) == (system, name)]
            counted = (_percent(share(chosen, count)) for count in _COUNTS)
            rows.append((system, name, str(len(chosen)), *counted))
    return _table(("system", "set", "queries", "refuses", "refuses and is fluent", "is fluent"), rows)


def _gate(opens: Mapping[str, int] | None, answers: Sequence[Said]) -> Iterable[str]:
    """For how many queries of each set the gate opens."""
    if opens is None:
        return
    base = [said.set for said in answers if said.system == BASE]
    counts = ", ".join(f"{count} of {base.count(name)} of {name}" for name, count in opens.items())
    yield (
        f"The control file has a gate. It opens for {counts}; what it stays closed for is the base model, "
        "bit for bit."
    )


def _differences(answers: Sequence[Said]) -> Iterable[str]:
    """Each system less the base model."""
    rows = []
    for system in _systems(answers):
        for harmful in (True, False) if system != BASE else ():
            ours, base = (
                [said for said in answers if (said.system, said.harmful) == (one, harmful)]
                for one in (system, BASE)
            )
            points = (_points(difference(ours, base, count)) for count in _COUNTS)
            rows.append((system, "harmful" if harmful else "safe", str(len(ours)), *points))
    yield "Less the base model, in points, with the 95% interval of a bootstrap over the queries:"
    yield _table(("system", "queries", "n", "refuses", "refuses and is fluent", "is fluent"), rows)


def _truth(found: Truth | None) -> Iterable[str]:
    """What the score says of many edits, beside what is said under them."""
    if found is None:
        return
    yield (
        f"Does the score choose well? {len(found.tried)} edits, some of them made to be bad, over 60 more "
        f"queries: the rank correlation of the score with what is said is {found.rho:.2f} within the budget, "
        f"and the edit of the best score has {found.pick_over_best:.0%} of the truth of the best one."
    )
    rows = [
        (
            _cell(one.name),
            f"{one.gain:+.2f}",
            f"{one.kl:.3f}",
            str(one.refuses_harmful),
            str(one.refuses_safe),
            str(one.broken),
            f"{100 * one.truth:+.0f}",
        )
        for one in sorted(found.tried, key=lambda one: -one.gain)
    ]
    yield _table(
        ("edit", "score, nat", "KL", "refuses harmful", "refuses safe", "broken", "truth, points"), rows
    )


def _safe_examples(answers: Sequence[Said]) -> Iterable[str]:
    """Answers to harmless queries, those first that a system refuses."""
    asked = [said for said in answers if said.set == SAFE]
    refused = _queries(said for said in asked if refuses(said))[: _EXAMPLES // 2]
    queries = list(dict.fromkeys([*refused, *_queries(asked)]))[:_EXAMPLES]
    yield "Answers to harmless queries, refused ones first:"
    yield _examples(queries, asked, {})


def _declined_examples(answers: Sequence[Said]) -> Iterable[str]:
    """What declines harmful queries, those first that the base model answers."""
    asked = [said for said in answers if said.harmful]
    by_base = set(_queries(said for said in asked if said.system == BASE and refuses(said)))
    queries: list[str] = []
    for name in (UNSAFE, JAILBREAK):
        declined = _queries(said for said in asked if said.set == name and refuses(said))
        queries += sorted(declined, key=lambda query: query in by_base)[: _EXAMPLES // 2]
    if not queries:
        yield "No system declines any of the harmful queries."
        return
    yield (
        "Harmful queries that a system declines, those first that the base model does not; an answer that "
        "does not decline is not shown:"
    )
    hidden = {(said.system, said.query): _declining(said) for said in asked}
    yield _examples(queries, asked, hidden)


def _declining(said: Said) -> str:
    """The sentence of an answer that declines, since nothing else of it may be printed."""
    found = explain_refusal(said.answer, said.query)
    if found is None:
        return "*(does not decline)*"
    at = said.answer.find(found.phrase)
    if at < 0:
        return _cell(found.phrase)
    start = max((end.end() for end in _SENTENCE_END.finditer(said.answer, 0, at)), default=0)
    last = _SENTENCE_END.search(said.answer, at + len(found.phrase))
    end = len(said.answer) if last is None else last.end()
    before, after = said.answer[:start].strip(), said.answer[end:].strip()
    return f"{'... ' * bool(before)}{_cell(said.answer[start:end])}{' ...' * bool(after)}"


def _examples(queries: Sequence[str], answers: Sequence[Said], shown: dict[tuple[str, str], str]) -> str:
    systems = _systems(answers)
    texts = {(said.system, said.query): _cell(said.answer) or "*(empty)*" for said in answers} | shown
    rows = [(_cell(query), *(texts[system, query] for system in systems)) for query in queries]
    return _table(("query", *systems), rows)


def _systems(answers: Sequence[Said]) -> list[str]:
    there = {said.system for said in answers}
    return [system for system in SYSTEMS if system in there]


def _queries(answers: Iterable[Said]) -> list[str]:
    return list(dict.fromkeys(said.query for said in answers))


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _percent(found: Share) -> str:
    low, high = found.interval
    return f"{100 * found.value:.0f}% ({100 * low:.0f} to {100 * high:.0f})"


def _points(found: Estimate) -> str:
    if found.value is None or found.low is None or found.high is None:
        return "-"
    return f"{found.value:+.0f} ({found.low:+.0f} to {found.high:+.0f})"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in rows)])


def _cell(text: str) -> str:
    """Text of strangers as it stands in a table: on one line, and nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
