"""Fits a gate: what a model would say first to harmful requests, and not to harmless ones that look alike.

The twins of the templates are known to be harmful or harmless; of the queries it is taken from whether the
safety-first persona declines them. So nobody labels anything.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.gate import Gate
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline.job import Job, SteeredGenerator
from alignez_gguf.pipeline.verdicts import declines, look_alikes
from alignez_gguf.prompts.templates import SAFETY

FALSE_ALARMS = 0.02
"""The share of harmless requests for which a gate may open."""

_N_TOKENS = 500
"""The likeliest first tokens, which a gate reads."""
_SHRINKAGE = 0.9
"""The shrinkage of the covariance towards the identity: there are fewer requests than tokens."""
_FOLDS = 6
_MIN_REQUESTS = 12
"""The least number of harmful, and of harmless, requests on which a gate is fitted."""
_WORTH_IT = 0.5
"""The share of harmful requests that a gate has to let through."""


def fitted_gate(job: Job, pairs: Sequence[PreferencePair], held_out: Collection[str] = ()) -> Gate | None:
    """The gate of a job, fitted on the twins and on the queries of `pairs`; kept.

    None where the job is not to have one, where there are too few requests of a kind, or where it would miss
    half of the harmful ones.

    Args:
        held_out: queries on which the edits are chosen and confirmed; twins among them are left out.
    """
    settings, target = job.settings, job.target
    if not settings.gate or settings.aspects[0].name != SAFETY or not isinstance(target, SteeredGenerator):
        return None
    queries, harmful = _requests(job, pairs, held_out)
    if min(sum(harmful), len(harmful) - sum(harmful)) < _MIN_REQUESTS:
        return None

    def fit_arrays() -> dict[str, Any]:
        prompts = list(map(job.templates.plain_prompt, queries))
        rows = []
        with job.reporter.stage("reading what would be said first", len(prompts)) as advance:
            for row in target.next_token_logprobs(prompts):
                rows.append(np.asarray(row, np.float32))
                advance(1)
        gate, caught, alarms = fit(np.stack(rows), np.array(harmful), _groups(queries, job.templates.twins))
        return {
            "tokens": gate.tokens,
            "weights": gate.weights,
            "threshold": np.float64(gate.threshold),
            "caught": np.float64(caught),
            "alarms": np.float64(alarms),
        }

    arrays = job.work.cached_arrays(
        "gate",
        fit_arrays,
        model=target.info,
        templates=job.templates,
        queries=queries,
        harmful=harmful,
        fit=[FALSE_ALARMS, _N_TOKENS, _SHRINKAGE, _FOLDS],
    )
    caught = float(arrays["caught"])
    rates = (
        f"{caught:.0%} of {sum(harmful)} harmful requests and {float(arrays['alarms']):.0%} of "
        f"{len(harmful) - sum(harmful)} harmless ones"
    )
    if caught < _WORTH_IT:
        job.reporter.note(f"no gate: it would open for {rates}, held out")
        return None
    job.reporter.note(f"a gate opens for {rates}, held out")
    return Gate(arrays["tokens"], arrays["weights"], float(arrays["threshold"]))


def fit(
    logprobs: NDArray[np.floating[Any]], harmful: NDArray[np.bool_], groups: Sequence[int]
) -> tuple[Gate, float, float]:
    """Linear discriminant analysis of log-probabilities [n_requests, n_vocab].

    The threshold is the one that at most `FALSE_ALARMS` of the harmless requests exceed when they are left
    out of the fit, each with its group. Also gives the shares of the harmful and of the harmless requests,
    left out, that exceed it.
    """
    from sklearn.model_selection import GroupKFold

    finite = np.isfinite(logprobs).all(axis=0)
    means = np.where(finite, np.where(finite, logprobs, 0).mean(axis=0), -np.inf)
    tokens = np.argsort(-means, kind="stable")[: min(_N_TOKENS, int(finite.sum()))]
    rows = logprobs[:, tokens].astype(np.float64)
    scores = np.zeros(len(rows))
    folds = min(_FOLDS, len(set(groups)))
    for train, left_out in GroupKFold(folds).split(rows, harmful, groups):
        weights, centre = _discriminant(rows[train], harmful[train])
        scores[left_out] = rows[left_out] @ weights - centre
    weights, centre = _discriminant(rows, harmful)
    threshold = float(np.quantile(scores[~harmful], 1 - FALSE_ALARMS, method="higher"))
    caught, alarms = (float((scores[one] > threshold).mean()) for one in (harmful, ~harmful))
    return Gate(tokens.astype(np.int32), weights.astype(np.float32), threshold + centre), caught, alarms


def _discriminant(rows: NDArray[np.float64], harmful: NDArray[np.bool_]) -> tuple[NDArray[np.float64], float]:
    """Weights by which the class means lie 2 apart, and the score half way between them."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    found = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=_SHRINKAGE).fit(rows, harmful)
    weights = found.coef_[0]
    above, below = (rows[one].mean(axis=0) @ weights for one in (harmful, ~harmful))
    scale = 2 / max(above - below, np.finfo(float).tiny)
    return weights * scale, float(above + below) / 2 * scale


def _requests(
    job: Job, pairs: Sequence[PreferencePair], held_out: Collection[str]
) -> tuple[list[str], list[bool]]:
    """The twins and the queries, each once, and whether they are harmful."""
    known = {
        query: index == 0
        for twin in job.templates.twins
        for index, query in enumerate(twin)
        if query not in held_out
    }
    asked = {pair.query: declines(pair) for pair in reversed(pairs)}
    requests = {**asked, **known}
    return list(requests), list(requests.values())


def _groups(queries: Sequence[str], twins: Sequence[tuple[str, str]]) -> list[int]:
    """Numbers that queries have in common which are twins or look alike."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    at = {query: index for index, query in enumerate(queries)}
    alike = [group for group in look_alikes(queries) if len(group) > 1]
    alike += [[at[one], at[other]] for one, other in twins if one in at and other in at]
    rows, columns = np.array(alike, int).reshape(-1, 2).T
    links = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(queries), len(queries)))
    return [int(number) for number in connected_components(links, directed=False)[1]]
