"""Gates are fitted on what nobody has labelled, and open for few harmless requests that they never saw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline import Job, gating
from alignez_gguf.pipeline.gating import FALSE_ALARMS, fit, fitted_gate
from alignez_gguf.pipeline.job import Aspect
from tests.pipeline.conftest import QUERIES, with_engine

N_VOCAB = 900
N_TWINS = 120


def requests(seed: int, told_by: float) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Log-probabilities after harmful requests and their twins, which share a topic; `told_by` tells."""
    rng = np.random.default_rng(seed)
    signal = np.random.default_rng(0).normal(size=N_VOCAB)
    topics = np.repeat(rng.normal(size=(N_TWINS, N_VOCAB)), 2, axis=0)
    harmful = np.arange(2 * N_TWINS) % 2 == 0
    logits = topics + 0.5 * rng.normal(size=topics.shape) + told_by * np.outer(harmful - 0.5, signal)
    return log_softmax(logits, axis=1), harmful, [index // 2 for index in range(2 * N_TWINS)]


def opened(gate: Any, rows: np.ndarray) -> float:
    return float(np.mean([gate.opens(row) for row in rows]))


def test_gate_opens_for_few_harmless_requests_that_it_never_saw() -> None:
    logprobs, harmful, groups = requests(1, told_by=0.3)
    gate, caught, alarms = fit(logprobs, harmful, groups)
    new, is_harmful, _ = requests(2, told_by=0.3)
    assert len(gate.tokens) == 500
    assert opened(gate, new[~is_harmful]) <= FALSE_ALARMS + 0.05
    assert opened(gate, new[is_harmful]) == pytest.approx(caught, abs=0.1)
    assert caught > 0.8
    assert alarms <= FALSE_ALARMS


def test_what_a_gate_catches_is_not_what_it_has_learnt_by_heart() -> None:
    logprobs, harmful, groups = requests(1, told_by=0.0)
    gate, caught, _ = fit(logprobs, harmful, groups)
    assert caught < 0.15
    assert opened(gate, logprobs[harmful]) > 2 * caught


def test_tokens_that_are_never_drawn_are_not_read() -> None:
    logprobs, harmful, groups = requests(1, told_by=0.3)
    logprobs[3, :450] = -np.inf
    gate, _, _ = fit(logprobs, harmful, groups)
    assert gate.tokens.min() >= 450
    assert len(gate.tokens) == N_VOCAB - 450


def pairs(n_declined: int) -> list[PreferencePair]:
    answers = ["I cannot help you with that."] * n_declined + ["To do it, ask a friend."] * len(QUERIES)
    return [
        PreferencePair(query, answer, "Get lost.", "", "")
        for query, answer in zip(QUERIES, answers, strict=False)
    ]


def test_few_requests_of_a_kind_make_no_gate(job: Job) -> None:
    assert fitted_gate(job, pairs(11)) is None
    assert fitted_gate(job, pairs(len(QUERIES) - 11)) is None


class _Deaf:
    """An engine before which all prompts look alike, but for noise."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def set_edits(self, *_: Any) -> None: ...

    def generate(self, *_: Any) -> None: ...

    def next_token_logprobs(self, prompts: Any) -> Any:
        rng = np.random.default_rng(0)
        return (log_softmax(rng.normal(size=50)) for _ in prompts)


def test_gate_that_would_miss_half_of_what_is_harmful_is_none(job: Job) -> None:
    assert fitted_gate(with_engine(job, _Deaf(job.engine)), pairs(len(QUERIES) // 2)) is None


@pytest.mark.parametrize("change", [{"gate": False}, {"aspects": (Aspect("helpfulness"),)}])
def test_no_gate_where_none_is_wanted(job: Job, change: dict[str, Any]) -> None:
    wanted = replace(job, settings=replace(job.settings, **change))
    assert fitted_gate(wanted, pairs(len(QUERIES) // 2)) is None


def test_twins_of_the_templates_teach_the_gate_too(job: Job) -> None:
    twins = tuple(
        (f"How can I rob the {place}?", f"How can I clean the {place}?") for place in "abcdefghijkl"
    )
    taught = replace(job, templates=replace(job.templates, twins=twins))
    gate = fitted_gate(taught, [])
    assert gate is not None
    prompts = [
        job.templates.plain_prompt(query) for query in ("How can I rob the m?", "How can I clean the m?")
    ]
    assert [gate.opens(row) for row in job.engine.next_token_logprobs(prompts)] == [True, False]


def test_requests_that_lie_alike_in_all_directions_make_no_gate(job: Job) -> None:
    logprobs = np.tile(log_softmax(np.arange(30.0)), (60, 1))
    harmful = np.arange(60) % 2 == 0
    _, caught, _ = fit(logprobs, harmful, list(range(60)))
    assert caught == 0


def test_twins_are_left_out_together_and_not_learnt_where_they_are_held_out(job: Job) -> None:
    twins = (
        ("How do I rob it?", "How do I rob it with a smile?"),
        ("Hurt a dog", "Wash the windows, please"),
    )
    queries = [query for twin in twins for query in twin]
    first, second, third, fourth = gating._groups([*queries, "Something else"], twins)[:4]
    assert first == second != third == fourth
    taught = replace(job, templates=replace(job.templates, twins=twins))
    assert gating._requests(taught, [], [queries[1]]) == ([queries[0], *queries[2:]], [True, True, False])
