"""The choice of an edit against exhaustive enumeration on a model whose every edit is known."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.edits import Edits, LayerEdit
from alignez_gguf.errors import NoGainError
from alignez_gguf.selection import (
    _AMOUNTS,
    Candidate,
    Divergence,
    Scored,
    Search,
    Selection,
    Source,
    gains,
    layer_sets,
    leaks,
    span,
)

N_QUERIES, N_VOCAB, N_LAYER = 12, 7, 6
LAYERS = tuple(range(N_LAYER))
SOURCES = [Source("mean", "prompt", 1), Source("ccs", "response", 1), Source("svd-diff", "prompt", 2)]
AMOUNTS = [(operation, amount) for operation, amounts in _AMOUNTS.items() for amount in amounts]


def distributions(seed: int, count: int = N_QUERIES) -> NDArray[np.float32]:
    # close enough together that every token is plausible to somebody
    logits = np.random.default_rng(seed).normal(scale=0.5, size=(count, N_VOCAB))
    return (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)


HELPFUL, HARMFUL = distributions(0), distributions(1)
BASE = np.log(distributions(2))


def kl(p: NDArray[np.float32], q: NDArray[np.float32]) -> float:
    return sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def test_gain_is_the_drop_of_one_divergence_minus_the_drop_of_the_other() -> None:
    steered = distributions(3)
    expected = [
        (kl(helpful, np.exp(base)) - kl(helpful, changed))
        - (kl(harmful, np.exp(base)) - kl(harmful, changed))
        for helpful, harmful, base, changed in zip(HELPFUL, HARMFUL, BASE, steered, strict=True)
    ]
    np.testing.assert_allclose(gains(HELPFUL, HARMFUL, BASE, np.log(steered)), expected, atol=1e-5)


def test_no_edit_gains_nothing() -> None:
    np.testing.assert_array_equal(gains(HELPFUL, HARMFUL, BASE, BASE), np.zeros(N_QUERIES))


def test_leak_is_the_probability_that_moves_to_tokens_nobody_would_say() -> None:
    helpful = np.array([[0.6, 0.1, 0.2, 0.09, 0.01]], np.float32)
    harmful = np.array([[0.1, 0.6, 0.29, 0.009, 0.001]], np.float32)
    base = np.array([[0.3, 0.4, 0.29, 0.005, 0.005]], np.float32)
    to_helpful = np.array([[0.55, 0.1, 0.25, 0.095, 0.005]], np.float32)
    astray = np.array([[0.3, 0.1, 0.1, 0.2, 0.3]], np.float32)
    # only the last token is below 5% of the likeliest for all three
    assert leaks(helpful, harmful, np.log(base), np.log(to_helpful)) == pytest.approx([0.0])
    assert leaks(helpful, harmful, np.log(base), np.log(astray)) == pytest.approx([0.3 - 0.005])


def test_no_edit_leaks_nothing() -> None:
    np.testing.assert_array_equal(leaks(HELPFUL, HARMFUL, BASE, BASE), np.zeros(N_QUERIES))


def test_net_pays_for_the_leak_and_for_the_rest_of_the_answer() -> None:
    candidate = Candidate(SOURCES[0], "remove", 0.0, LAYERS)
    scored = Scored(candidate, gain=1.0, standard_error=0.1, leak=0.2)
    assert scored.net is None
    assert scored.bound == pytest.approx(math.log(2 / (1 + math.exp(-1.0))) + math.log(0.8))
    paid = replace(scored, divergence=Divergence(per_token=0.05, after_first=0.3))
    assert paid.net == pytest.approx(scored.bound - 0.3)
    assert replace(scored, leak=1.0).bound == -math.inf


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        ((0,), []),
        ((4, 7), [(4,), (7,)]),
        ((0, 1, 2), [(0,), (1, 2), (0, 1)]),
        (
            LAYERS,
            [(0, 1, 2), (3, 4, 5), (1, 2, 3, 4), (0, 1, 2, 3), (2, 3, 4, 5)],
        ),
    ],
)
def test_parts_are_halves_the_middle_and_two_thirds(
    layers: tuple[int, ...], parts: list[tuple[int, ...]]
) -> None:
    assert layer_sets(layers) == parts


@pytest.mark.parametrize(
    ("layers", "text"),
    [((0, 1, 2, 3), "0-3"), ((5,), "5"), ((2, 3), "2-3"), ((0, 2, 4), "0,2,4"), ((0, 1, 3), "0,1,3")],
)
def test_layers_are_written_as_people_write_them(layers: tuple[int, ...], text: str) -> None:
    assert span(layers) == text


KNOWN: list[Candidate] = []


def edits_of(candidate: Candidate) -> Edits:
    """A candidate as edits that name it: the fake model reads it back."""
    if candidate not in KNOWN:
        KNOWN.append(candidate)
    return {layer: LayerEdit(add=[KNOWN.index(candidate) + 1]) for layer in candidate.layers}


@dataclass
class FakeModel:
    """A model on which the figures of any candidate are a function of it."""

    gain_of: Callable[[Candidate], float]
    kl_of: Callable[[Candidate], float]
    after_first_of: Callable[[Candidate], float] = lambda _: 0.0
    spread: float = 0.01
    measured: list[Candidate] = field(default_factory=list)

    def first_token_logprobs(self, edits: Edits) -> NDArray[np.float32]:
        if not edits:
            return BASE
        wanted = self.gain_of(self._named(edits)) + self.spread * np.linspace(-1, 1, N_QUERIES)
        # Moving along the difference of the personas by t gains t |difference|^2.
        difference = HELPFUL - HARMFUL
        share = wanted / (difference**2).sum(axis=1)
        return (BASE + share[:, None] * difference).astype(np.float32)

    def divergence(self, edits: Edits) -> Divergence:
        candidate = self._named(edits)
        self.measured.append(candidate)
        return Divergence(self.kl_of(candidate), self.after_first_of(candidate))

    def net_of(self, candidate: Candidate) -> float:
        return math.log(2 / (1 + math.exp(-self.gain_of(candidate)))) - self.after_first_of(candidate)

    def _named(self, edits: Edits) -> Candidate:
        add = next(iter(edits.values())).add
        assert add is not None
        return KNOWN[round(float(add[0])) - 1]


def search(model: FakeModel, budget: float = 0.1, sources: list[Source] = SOURCES) -> Selection:
    return Search(model, edits_of, HELPFUL, HARMFUL, budget).run(sources, LAYERS)


def everything(layer_choices: list[tuple[int, ...]]) -> list[Candidate]:
    return [
        Candidate(source, operation, amount, layers)  # type: ignore[arg-type]
        for layers, source, (operation, amount) in itertools.product(layer_choices, SOURCES, AMOUNTS)
    ]


def table(seed: int, low: float, high: float) -> Callable[[Candidate], float]:
    """A random figure for every candidate."""

    def figure(candidate: Candidate) -> float:
        random = np.random.default_rng(zlib.crc32(f"{seed} {candidate!r}".encode()))
        return float(random.uniform(low, high))

    return figure


@pytest.mark.parametrize("seed", range(10))
def test_best_affordable_candidate_of_all_layers_is_found(seed: int) -> None:
    first = everything([LAYERS])
    whole, after = table(seed, 0.1, 2.0), table(seed + 200, 0.0, 1.0)
    model = FakeModel(
        # What the later rounds try gains next to nothing and costs the most.
        gain_of=lambda candidate: whole(candidate) if candidate in first else 0.05,
        kl_of=table(seed + 100, 0.0, 0.4),
        after_first_of=lambda candidate: after(candidate) if candidate in first else 3.0,
    )
    found = search(model)
    affordable = [candidate for candidate in first if model.kl_of(candidate) <= 0.1]
    best = max(affordable, key=model.net_of)
    assert found.chosen.candidate == best
    assert found.chosen.gain == pytest.approx(whole(best), abs=1e-4)
    assert found.chosen.net == pytest.approx(model.net_of(best), abs=1e-4)
    assert found.chosen.kl == model.kl_of(best)


@pytest.mark.parametrize("seed", range(10))
def test_best_affordable_candidate_is_found_among_all_that_were_tried(seed: int) -> None:
    model = FakeModel(table(seed, -1.0, 2.0), table(seed + 100, 0.0, 0.3), table(seed + 200, 0.0, 1.0))
    found = search(model)
    tried = [scored.candidate for scored in found.tried]
    assert set(everything([LAYERS])) <= set(tried)
    assert len(tried) == len(set(tried))
    gaining = [candidate for candidate in tried if model.gain_of(candidate) > 0.1]
    affordable = [candidate for candidate in gaining if model.kl_of(candidate) <= 0.1]
    assert found.chosen.candidate == max(affordable, key=model.net_of)
    assert found.affordable[0] == found.chosen
    nets = [scored.net or 0.0 for scored in found.affordable]
    assert nets == sorted(nets, reverse=True)
    assert all(model.kl_of(scored.candidate) <= 0.1 for scored in found.affordable)


def test_parts_of_the_best_four_are_tried() -> None:
    figures = table(0, 0.1, 2.0)
    model = FakeModel(gain_of=figures, kl_of=lambda _: 0.0)
    parts = {scored.candidate for scored in search(model).tried if scored.candidate.layers != LAYERS}
    four = sorted(everything([LAYERS]), key=figures, reverse=True)[:4]
    assert parts >= {
        Candidate(best.source, best.operation, best.amount, part)
        for best in four
        for part in layer_sets(LAYERS)
    }


def test_amounts_between_are_tried_for_the_best_part() -> None:
    def gain(candidate: Candidate) -> float:
        if candidate.source != SOURCES[1] or candidate.operation != "add":
            return -1.0
        return candidate.amount if candidate.layers == LAYERS else 3.0 - abs(candidate.amount - 1.4)

    model = FakeModel(gain, kl_of=lambda candidate: 0.05 if candidate.layers == (3, 4, 5) else 0.2)
    chosen = search(model).chosen.candidate
    assert (chosen.source, chosen.operation, chosen.layers) == (SOURCES[1], "add", (3, 4, 5))
    assert abs(chosen.amount - 1.4) < min(abs(amount - 1.4) for amount in _AMOUNTS["add"])


def test_part_of_the_layers_is_chosen_where_all_layers_cost_too_much() -> None:
    model = FakeModel(
        gain_of=lambda candidate: 0.1 * len(candidate.layers) + 0.01 * candidate.amount,
        kl_of=lambda candidate: 0.02 * len(candidate.layers),
    )
    found = search(model, budget=0.09)
    assert len(found.chosen.candidate.layers) == 4
    assert found.chosen.kl == pytest.approx(0.08)


def test_divergence_is_measured_only_where_a_candidate_could_be_chosen() -> None:
    figures = table(3, -1.0, 2.0)
    model = FakeModel(gain_of=figures, kl_of=lambda _: 0.05)
    found = search(model)
    four = sorted(everything([LAYERS]), key=figures, reverse=True)[:4]
    assert model.measured[:4] == four
    assert len(model.measured) == len(set(model.measured))
    assert all(figures(candidate) >= figures(four[3]) for candidate in model.measured)
    assert {scored.candidate for scored in found.tried if scored.kl is not None} == set(model.measured)


@pytest.mark.parametrize("seed", range(5))
def test_divergence_is_not_measured_below_the_net_of_the_fourth_best(seed: int) -> None:
    model = FakeModel(table(seed, -1.0, 2.0), table(seed + 1, 0.0, 0.2), table(seed + 2, 0.0, 0.5))
    search(model)
    affordable = [candidate for candidate in everything([LAYERS]) if model.kl_of(candidate) <= 0.1]
    fourth = sorted((model.net_of(candidate) for candidate in affordable), reverse=True)[3]
    assert len(model.measured) == len(set(model.measured))
    for candidate in model.measured:
        assert math.log(2 / (1 + math.exp(-model.gain_of(candidate)))) > fourth - 1e-3


def test_search_is_deterministic_also_where_gains_are_equal() -> None:
    def run() -> Selection:
        return search(FakeModel(gain_of=lambda _: 1.0, kl_of=lambda _: 0.05))

    first, second = run(), run()
    assert first == second
    assert first.chosen.candidate == Candidate(SOURCES[0], "remove", 0.0, LAYERS)


def test_tried_candidates_come_best_first_with_the_queries_and_the_budget() -> None:
    found = search(FakeModel(gain_of=table(0, -1, 2), kl_of=lambda _: 0.05), budget=0.2)
    all_gains = [scored.gain for scored in found.tried]
    assert all_gains == sorted(all_gains, reverse=True)
    assert (found.n_queries, found.budget) == (N_QUERIES, 0.2)


def test_every_measurement_is_told() -> None:
    told: list[str] = []
    model = FakeModel(gain_of=table(0, 0.1, 2), kl_of=lambda _: 0.05)
    found = Search(model, edits_of, HELPFUL, HARMFUL, 0.1, told.append).run(SOURCES, LAYERS)
    assert len(told) == len(found.tried) + len(model.measured)
    assert "svd-diff rank 2, prompt, remove+add 0.5x" in told


def test_standard_error_is_that_of_the_mean_over_queries() -> None:
    found = search(FakeModel(gain_of=lambda _: 1.0, kl_of=lambda _: 0.05, spread=0.3))
    each = 0.3 * np.linspace(-1, 1, N_QUERIES)
    assert found.chosen.standard_error == pytest.approx(each.std(ddof=1) / math.sqrt(N_QUERIES), rel=1e-3)


def test_nothing_gains() -> None:
    model = FakeModel(gain_of=table(0, -2.0, -0.1), kl_of=lambda _: 0.0)
    with pytest.raises(
        NoGainError, match=r"nothing makes this model safer.*the best, .* gains -0\.\d+ \+- 0"
    ) as no:
        search(model)
    assert "give more queries" in str(no.value)
    assert model.measured == []


def test_everything_that_gains_is_over_the_budget() -> None:
    model = FakeModel(gain_of=lambda _: 1.0, kl_of=lambda _: 0.5)
    with pytest.raises(
        NoGainError, match=r"within 0\.1 nat per token.*\+1\.000.* at 0\.5 nat.*raise --kl-budget"
    ):
        search(model)


def test_gain_within_what_chance_explains_is_not_chosen() -> None:
    # 12 queries spread evenly over .2 +- 1: a standard error of .189
    with pytest.raises(NoGainError, match=r"for certain .*\+0\.200 \+- 0\.189"):
        search(FakeModel(gain_of=lambda _: 0.2, kl_of=lambda _: 0.0, spread=1.0))


def test_smaller_gain_that_is_certain_is_chosen_over_a_greater_one_that_is_not() -> None:
    class Uneven(FakeModel):
        def first_token_logprobs(self, edits: Edits) -> NDArray[np.float32]:
            self.spread = 3.0 if edits and self._named(edits).source.method == "ccs" else 0.01
            return super().first_token_logprobs(edits)

    model = Uneven(gain_of=lambda c: 0.5 if c.source.method == "ccs" else 0.3, kl_of=lambda _: 0.0)
    assert search(model).chosen.candidate.source.method == "mean"


def test_single_query_makes_nothing_certain() -> None:
    model = FakeModel(gain_of=lambda _: 5.0, kl_of=lambda _: 0.0)
    single = slice(1)

    class Single(FakeModel):
        def first_token_logprobs(self, edits: Edits) -> NDArray[np.float32]:
            return model.first_token_logprobs(edits)[single]

    with pytest.raises(NoGainError, match="inf"):
        Search(Single(model.gain_of, model.kl_of), edits_of, HELPFUL[single], HARMFUL[single]).run(
            SOURCES, LAYERS
        )


def test_directions_that_edit_nothing_are_an_error_too() -> None:
    model = FakeModel(gain_of=lambda _: 1.0, kl_of=lambda _: 0.0)
    with pytest.raises(NoGainError, match="no direction was found"):
        Search(model, lambda _: {}, HELPFUL, HARMFUL).run(SOURCES, LAYERS)
