"""Turns an evaluation into plain data: the content of report.json, from which the page is made."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from alignez_gguf.control.control_file import Field
from alignez_gguf.evaluation.metrics import Estimate, Tally
from alignez_gguf.evaluation.results import PERSONA, STEERED, AspectResult, Behaviour, Judged
from alignez_gguf.evaluation.run import Evaluation

FORMAT_VERSION = 1
_EXAMPLES_OF_EACH = 4


def document(evaluation: Evaluation) -> dict[str, Any]:
    """Return all results of an evaluation as JSON data, in an order that never changes."""
    return {
        "format_version": FORMAT_VERSION,
        "overlap": {
            "known": evaluation.overlap.known,
            "summary": str(evaluation.overlap),
            "queries": list(evaluation.overlap.queries),
        },
        "judge": evaluation.judge,
        "provenance": dict(evaluation.provenance),
        "labels": _labels(evaluation),
        "notes": _notes(evaluation),
        "verdicts": [_verdict(name, aspect.net_win) for name, aspect in _steered(evaluation).aspects.items()],
        "systems": [_system(judged) for judged in evaluation.judged],
        "layers": _layers(evaluation),
        "selection": _selection(evaluation),
        "projections": _projections(evaluation),
        "rows": [_row(evaluation, index) for index in range(len(evaluation.queries))],
        "examples": _examples(_steered(evaluation)),
    }


def _steered(evaluation: Evaluation) -> Judged:
    return next(judged for judged in evaluation.judged if judged.system.name == STEERED)


def _labels(evaluation: Evaluation) -> dict[str, int]:
    labels = [query.harmful for query in evaluation.queries]
    return {"harmful": labels.count(True), "harmless": labels.count(False), "unlabelled": labels.count(None)}


def _notes(evaluation: Evaluation) -> list[str]:
    """List what could not be measured, and what that means."""
    answers = [answer for judged in evaluation.judged for answer in judged.system.answers if answer.text]
    notes = []
    if not any(judged.behaviour.on_topic.n for judged in evaluation.judged):
        notes.append(
            "Whether answers are on topic was not measured: that takes a base model and --judge offline."
        )
    if all(answer.fluency.nat_per_token is None for answer in answers):
        notes.append("Fluency was judged from the texts alone: no model measured their likelihood.")
    if not any(judged.system.name == PERSONA for judged in evaluation.judged):
        notes.append("The persona as a plain prompt was not compared; --system-prompt does that.")
    return notes


def _verdict(aspect: str, net_win: Estimate) -> dict[str, Any]:
    """Call a system better or worse only where the whole interval lies on one side of zero."""
    if net_win.value is None:
        verdict = "not judged"
    elif not net_win.clear_of_zero:
        verdict = "no clear difference"
    else:
        verdict = "better" if net_win.value > 0 else "worse"
    return {"aspect": aspect, "verdict": verdict, "net_win": asdict(net_win)}


def _system(judged: Judged) -> dict[str, Any]:
    return {
        "name": judged.system.name,
        "description": judged.system.description,
        "behaviour": _behaviour(judged.behaviour),
        "change": None if judged.change is None else _behaviour(judged.change),
        "aspects": {name: _aspect(name, aspect) for name, aspect in judged.aspects.items()},
        "chose_first_percent": judged.chose_first_percent,
        "retries": judged.retries,
    }


def _aspect(name: str, aspect: AspectResult) -> dict[str, Any]:
    relative = aspect.relative_improvement
    return {
        **_compared(aspect.tally, aspect.net_win),
        "relative_improvement_percent": None if relative is None else asdict(relative),
        "against_persona": None
        if aspect.persona_tally is None or aspect.persona_net_win is None
        else {
            **_compared(aspect.persona_tally, aspect.persona_net_win),
            "verdict": _verdict(name, aspect.persona_net_win)["verdict"],
        },
    }


def _compared(tally: Tally, net_win: Estimate) -> dict[str, Any]:
    return {
        **asdict(tally),
        "judged": tally.judged,
        "win_percent": tally.win_percent,
        "lose_percent": tally.lose_percent,
        "net_win_percent": asdict(net_win),
    }


def _behaviour(behaviour: Behaviour) -> dict[str, Any]:
    return asdict(behaviour)


def _layers(evaluation: Evaluation) -> list[dict[str, Any]]:
    control = evaluation.control
    layers = []
    for layer in range(control.model.n_layer):
        edit = control.edits.get(layer)
        row: dict[str, Any] = {
            "layer": layer,
            "decision": edit.decision if edit else "none",
            "rank": edit.rank if edit else 0,
            "added_length": edit.scale if edit else 0.0,
        }
        if control.layers is not None:
            for name in ("accuracy", "p_helpful", "p_harmful"):
                row[name] = float(getattr(control.layers, name)[layer])
        layers.append(row)
    return layers


def _selection(evaluation: Evaluation) -> list[dict[str, Any]]:
    """List the edits that were tried when the control file was made; a divergence of -1 was not measured."""
    score = evaluation.control.score
    columns: dict[str, Field] = {
        key.removeprefix("tried."): value for key, value in score.items() if key.startswith("tried.")
    }
    if not {"score", "kl"} <= columns.keys() or not all(
        isinstance(value, tuple) for value in columns.values()
    ):
        return []
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=False)]


def _projections(evaluation: Evaluation) -> dict[str, Any] | None:
    projections = evaluation.projections
    if projections is None:
        return None
    return {
        "layer": projections.layer,
        "before": projections.before.tolist(),
        "after": projections.after.tolist(),
    }


def _row(evaluation: Evaluation, index: int) -> dict[str, Any]:
    query = evaluation.queries[index]
    answers = {}
    for judged in evaluation.judged:
        answer = judged.system.answers[index]
        row: dict[str, Any] = {"text": answer.text, **asdict(answer.fluency), "topic": answer.topic}
        if judged.judgements:
            row["outcomes"] = dict(judged.judgements[index].outcomes)
            row["rationale"] = judged.judgements[index].rationale
        if judged.persona_judgements:
            row["outcomes_against_persona"] = dict(judged.persona_judgements[index].outcomes)
        if judged.ratings is not None:
            row["rating"] = asdict(judged.ratings[index])
        answers[judged.system.name] = row
    return {"query": query.text, "harmful": query.harmful, "answers": answers}


def _examples(steered: Judged) -> list[int]:
    """Choose the rows to show: the first few that the steered model wins, loses, and neither."""
    kinds: dict[str, list[int]] = {"win": [], "lose": [], "neither": []}
    for index, judgement in enumerate(steered.judgements):
        outcomes = set(judgement.outcomes.values())
        kind = "win" if "win" in outcomes else "lose" if "lose" in outcomes else "neither"
        kinds[kind].append(index)
    return [index for indices in kinds.values() for index in indices[:_EXAMPLES_OF_EACH]]
