"""The prediction on planted data, where the right answer is known."""

from __future__ import annotations

import builtins
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.errors import ModelFileError, QueryError
from alignez_gguf.pairs.filters import PairFilterReport
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.predict import (
    HeldOut,
    embed_pairs,
    hits,
    judge,
    open_embedder,
    separability,
    surface_features,
)
from alignez_gguf.predict.separability import Separability, run_of_pair
from alignez_gguf.selection.scoring import EditScore

N_PAIRS = 100
QUERIES = [f"query {index}" for index in range(N_PAIRS)]
GAIN = HeldOut("an edit", EditScore((1.1, 1.3), (True, True), 0.02), 40)
TINY_GAIN = HeldOut("an edit", EditScore((0.019, 0.021), (True, True), 0.0), 40)
NO_GAIN = HeldOut(note="nothing gains")
ALL_KEPT = PairFilterReport(N_PAIRS, N_PAIRS)


def planted(gap: float, seed: int = 0, n_pairs: int = N_PAIRS, n_embd: int = 12) -> NDArray[np.float64]:
    """Normal embeddings [2, n_pairs, n_embd] whose classes lie `gap` standard deviations apart."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((2, n_pairs, n_embd))
    direction = random.standard_normal(n_embd)
    x += np.array([gap / 2, -gap / 2])[:, None, None] * direction / np.linalg.norm(direction)
    return x


def noise(seed: int = 9, n_pairs: int = N_PAIRS, n_embd: int = 12) -> NDArray[np.float64]:
    return planted(0.0, seed, n_pairs, n_embd)


def cue_pairs(share: float, seed: int = 0) -> list[PreferencePair]:
    """Pairs of like answers, of which `share` begin with a word that gives them away."""
    random = np.random.default_rng(seed)

    def answer(word: str) -> str:
        first = word if random.random() < share else str(random.choice(["yes", "no"]))
        return " ".join([first, *random.choice(["one", "two", "three", "four"], 6)])

    return [PreferencePair(query, answer("sorry"), answer("sure")) for query in QUERIES]


def embeddings_of_cues(pairs: list[PreferencePair], noise_level: float = 0.3) -> NDArray[np.float64]:
    """What a model would have that sees nothing but surface cues: those, rotated, and noise."""
    cues = surface_features(pairs)
    random = np.random.default_rng(5)
    turned: NDArray[np.float64] = cues @ random.standard_normal((cues.shape[2], 40))
    return turned + noise_level * random.standard_normal(turned.shape)


@pytest.mark.parametrize("gap", [1.0, 2.0, 4.0])
def test_accuracy_of_planted_classes_is_that_of_the_best_classifier(gap: float) -> None:
    """Bayes: two normal classes at a distance of `gap` are told apart with probability Phi(gap / 2)."""
    n_pairs = 600
    queries = [f"query {index}" for index in range(n_pairs)]
    found = separability([planted(gap, n_pairs=n_pairs)], queries, permutations=20)
    sampling = 3 * np.sqrt(0.25 / (2 * n_pairs))
    assert found.best_accuracy == pytest.approx(
        0.5 * (1 + math.erf(gap / 2 / math.sqrt(2))), abs=sampling + 0.01
    )
    assert found.above_chance


def test_best_layer_is_the_one_where_the_classes_were_planted() -> None:
    found = separability([noise(1), planted(3.0), noise(2)], QUERIES, permutations=5)
    assert found.best == 1
    assert found.accuracy[1] > 0.85 > 0.65 > max(found.accuracy[0], found.accuracy[2])


def test_noise_is_at_chance_and_the_level_of_the_test_is_kept() -> None:
    """Of data sets whose labels say nothing, one in twenty passes as separable."""
    found = [separability([noise(seed, 40)], QUERIES[:40], permutations=19) for seed in range(20)]
    assert np.mean([one.best_accuracy for one in found]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([one.chance for one in found]) == pytest.approx(0.5, abs=0.02)
    assert sum(one.above_chance for one in found) <= 4  # binomial(20, .05): more has a probability of .3%


def test_chance_grows_with_the_number_of_layers_to_choose_from() -> None:
    layers = [noise(seed, 30) for seed in range(8)]
    one = separability(layers[:1], QUERIES[:30], permutations=25)
    many = separability(layers, QUERIES[:30], permutations=25)
    assert many.chance > one.chance + 0.03


def test_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    layers = [planted(0.7)]
    first = separability(layers, QUERIES, permutations=5, seed=3)
    assert separability(layers, QUERIES, permutations=5, seed=3) == first
    assert separability(layers, QUERIES, permutations=5, seed=4) != first


def test_pairs_of_a_query_are_never_parted_and_every_query_is_tested_once() -> None:
    queries = [f"query {index % 23}" for index in range(90)]
    run = run_of_pair(queries, seed=0)
    assert all(len({run[i] for i in range(90) if queries[i] == query}) == 1 for query in set(queries))
    assert set(run) == {0, 1, 2, 3, 4}
    assert len(set(run_of_pair(queries[::-1], seed=0)[::-1] - run)) == 1  # the order of pairs decides nothing


def test_what_is_learnt_of_one_query_does_not_help_with_another() -> None:
    """Embeddings that name query and side are separable only where pairs of a query are parted."""
    n_queries, samples = 30, 4
    random = np.random.default_rng(0)
    side = random.standard_normal((2, n_queries, 200))
    x = np.repeat(side, samples, axis=1)
    queries = [f"query {index // samples}" for index in range(n_queries * samples)]
    assert hits([x], queries).accuracy[0] < 0.65
    parted = [f"{query} {index}" for index, query in enumerate(queries)]
    assert hits([x], parted).accuracy[0] > 0.95


def test_wide_embeddings_give_the_accuracies_of_a_fit_in_all_dimensions() -> None:
    from sklearn.linear_model import LogisticRegression

    x = planted(2.5, n_pairs=40, n_embd=300)
    found = hits([x], QUERIES[:40])
    scaled = (x - x.mean(axis=(0, 1))) / np.sqrt(np.square(x - x.mean(axis=(0, 1))).mean())
    for part in range(5):
        train, test = found.run != part, found.run == part
        model = LogisticRegression(max_iter=5000, tol=1e-6)
        model.fit(scaled[:, train].reshape(-1, 300), np.repeat([1, 0], train.sum()))
        right = model.predict(scaled[:, test].reshape(-1, 300)) == np.repeat([1, 0], test.sum())
        assert np.abs(found.values[0][:, test].ravel() - right).mean() <= 1 / 16


def test_fewer_than_ten_queries_are_an_error() -> None:
    with pytest.raises(QueryError, match=r"9 answered queries are too few .* at least 10"):
        separability([noise(0, 9)], QUERIES[:9])


def test_first_word_and_length_are_the_surface_cues() -> None:
    pairs = [
        PreferencePair("q1", "Sorry, no", "sure thing"),
        PreferencePair("q2", "sorry, never ever", "Sure"),
        PreferencePair("q3", "alone", "sure"),
    ]
    features = surface_features(pairs)
    assert features.shape == (2, 3, 2 + 2)  # "alone" begins one answer only
    begins = features[:, :, 2:]
    assert begins.sum(axis=2).tolist() == [[1, 1, 0], [1, 1, 1]]
    np.testing.assert_array_equal(begins[0, 0], begins[0, 1])
    lengths = features[:, :, :2].reshape(-1, 2)
    np.testing.assert_allclose(lengths.mean(axis=0), 0, atol=1e-12)
    assert lengths[:, 0].argmax() == 1


def test_answers_of_one_length_without_words_in_common_have_no_surface_cue() -> None:
    pairs = [PreferencePair(query, f"a{i:02} x", f"b{i:02} x") for i, query in enumerate(QUERIES)]
    assert hits([surface_features(pairs)], QUERIES).accuracy[0] == 0.5


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
def test_embeddings_of_surface_cues_alone_get_a_negative_verdict(share: float) -> None:
    pairs = cue_pairs(share)
    surface = hits([surface_features(pairs)], QUERIES)
    found = separability([embeddings_of_cues(pairs)], QUERIES, surface=surface, permutations=20)
    assert found.above_chance
    assert found.best_accuracy > 0.65
    assert not found.above_surface
    assert abs(found.adjusted) < 0.25
    verdict = judge(found, None, ALL_KEPT)
    assert verdict.outlook == "unlikely"
    assert "no more than surface cues explain" in str(verdict)
    assert judge(found, NO_GAIN, ALL_KEPT).outlook == "unlikely"


def test_meaning_beyond_surface_cues_gets_a_positive_verdict() -> None:
    pairs = cue_pairs(0.3)
    surface = hits([surface_features(pairs)], QUERIES)
    layers = [noise(), np.concatenate([embeddings_of_cues(pairs), planted(4.0)], axis=2)]
    found = separability(layers, QUERIES, surface=surface, permutations=20)
    assert found.surface == pytest.approx(surface.accuracy[0])
    assert found.best_accuracy > found.surface + 0.15  # type: ignore[operator]
    assert found.above_surface
    assert found.adjusted > 0.5
    assert judge(found, None, ALL_KEPT).outlook == judge(found, GAIN, ALL_KEPT).outlook == "likely"


def made(p_chance: float, surface: float | None = None, p_surface: float | None = None) -> Separability:
    return Separability((0.6, 0.9), (0.02, 0.03), 1, 0.52, p_chance, surface, p_surface)


def test_adjusted_accuracy_is_what_chance_and_surface_cues_leave() -> None:
    assert made(0.01).adjusted == pytest.approx((0.9 - 0.52) / 0.48)
    assert made(0.01, 0.8, 0.01).adjusted == pytest.approx(0.5)
    assert made(0.01, 0.4, 0.01).adjusted == made(0.01).adjusted
    assert made(0.01, 1.0, 1.0).adjusted == 0.0


@pytest.mark.parametrize(
    ("p_chance", "p_surface", "held_out", "outlook"),
    [
        (0.01, 0.01, None, "likely"),
        (0.20, 0.01, None, "unlikely"),
        (0.01, 0.20, None, "unlikely"),
        (0.01, 0.01, GAIN, "likely"),
        (0.01, 0.01, NO_GAIN, "uncertain"),
        (0.20, 0.01, GAIN, "uncertain"),
        (0.01, 0.20, GAIN, "uncertain"),
        (0.20, 0.20, NO_GAIN, "unlikely"),
        (0.01, 0.01, TINY_GAIN, "uncertain"),
        (0.20, 0.20, TINY_GAIN, "unlikely"),
    ],
)
def test_verdict_claims_no_more_than_both_signs_say(
    p_chance: float, p_surface: float, held_out: HeldOut | None, outlook: str
) -> None:
    verdict = judge(made(p_chance, 0.7, p_surface), held_out, ALL_KEPT)
    assert verdict.outlook == outlook
    assert "\n" not in str(verdict)
    assert len(verdict.reasons) == 2
    assert "90%" in verdict.reasons[0]


def test_too_few_pairs_that_follow_their_personas_speak_against_a_model() -> None:
    few = PairFilterReport(100, 4, persona_ignored=96)
    verdict = judge(None, None, few)
    assert verdict.outlook == "unlikely"
    assert "only 4 of 100 pairs follow their personas" in str(verdict)
    assert "only 30 of 100 pairs" in str(judge(made(0.01), GAIN, PairFilterReport(100, 30)))


class CountingEmbedder:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def embed(self, text: str) -> NDArray[np.float32]:
        self.texts.append(text)
        return np.array([len(text), len(self.texts)], np.float32)


def test_an_embedder_sees_each_query_with_each_of_its_answers() -> None:
    embedder = CountingEmbedder()
    done: list[int] = []
    pairs = [PreferencePair("q1", "good", "bad"), PreferencePair("q2", "better", "worse")]
    features = embed_pairs(embedder, pairs, done.append)
    assert embedder.texts == ["q1\ngood", "q1\nbad", "q2\nbetter", "q2\nworse"]
    assert features[:, :, 1].tolist() == [[1, 3], [2, 4]]
    assert done == [1, 1]


def test_a_sentence_transformer_is_asked_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class SentenceTransformer:
        def __init__(self, name: str) -> None:
            self.name = name

        def encode(self, text: str, **_: Any) -> NDArray[np.float64]:
            return np.array([len(self.name), len(text)], np.float64)

    fake = ModuleType("sentence_transformers")
    fake.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    assert open_embedder("some-model").embed("abc").tolist() == [10, 3]


def test_a_missing_embedder_is_an_error_that_names_the_mend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "sentence_transformers":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelFileError, match="pip install sentence-transformers"):
        open_embedder("some-model")
    with pytest.raises(ModelFileError, match=r"cannot read the embedding model .*nowhere\.gguf"):
        open_embedder(str(tmp_path / "nowhere.gguf"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    with pytest.raises(ModelFileError, match=r"broken\.gguf is not a usable GGUF model"):
        open_embedder(str(broken))
