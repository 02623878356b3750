"""Fitting CCS probes: against the reference loop, of which a part is run, and against logistic regression."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.figures import Measured, quantity, ratio
from benchmarks.setting import Setting
from benchmarks.timing import seconds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Embeddings = NDArray[np.float32]
    """[n_layer, n_pairs, n_embd]."""


@dataclass(frozen=True)
class Sizes:
    """Of the task.

    Attributes:
        n_layer, n_pairs, n_embd: of the embeddings.
        sampled_layers: that scikit-learn fits.
        sampled_epochs: the loop runs one in so many.
    """

    n_layer: int = 32
    n_pairs: int = 256
    n_embd: int = 4096
    sampled_layers: int = 2
    sampled_epochs: int = 5


def measure(setting: Setting, sizes: Sizes | None = None) -> Measured:
    """All layers with 10 restarts of 1000 epochs, as `export --recipe paper` fits them."""
    import numpy as np
    import sklearn
    import torch

    from alignez_gguf import directions
    from alignez_gguf.directions.ccs import RESTARTS

    sizes = sizes or Sizes()
    rng = np.random.default_rng(0)
    shape = (sizes.n_layer, sizes.n_pairs, sizes.n_embd)
    helpful, harmful = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    ours, loop, logistic = [], [], []
    for _ in range(setting.repeats):
        ours.append(seconds(lambda: directions.fit("ccs", helpful, harmful)))
        probe = statistics.median(_reference_probe(helpful, harmful, sizes) for _ in range(3))
        loop.append(probe * sizes.n_layer * RESTARTS)
        logistic.append(_logistic(helpful, harmful, sizes))
    what = f"{sizes.n_layer} layers x {sizes.n_embd}, {sizes.n_pairs} pairs"
    figures = {
        "seconds": quantity(
            f"{what}, {RESTARTS} restarts, held-out accuracy included", ours, " s", bound=30.0
        ),
        "vs_loop": ratio(
            "time of a loop over layers and restarts over ours", loop, ours, better="higher", bound=8.0
        ),
        "vs_logistic": ratio(
            "time of scikit-learn's logistic regression on all layers over ours",
            logistic,
            ours,
            better="higher",
        ),
    }
    return Measured(figures, {"torch": str(torch.__version__), "scikit-learn": sklearn.__version__})


def _reference_probe(helpful: Embeddings, harmful: Embeddings, sizes: Sizes) -> float:
    """Seconds of one probe on one layer, from a part of its epochs."""
    import torch

    from alignez_gguf.directions.probe_training import EPOCHS, LEARNING_RATE, WEIGHT_DECAY

    good, bad = torch.from_numpy(helpful[0]), torch.from_numpy(harmful[0])
    probe = torch.nn.Linear(sizes.n_embd, 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def train(epochs: int) -> None:
        for _ in range(epochs):
            p, q = probe(good).sigmoid(), probe(bad).sigmoid()
            loss = ((p + q - 1) ** 2 + torch.minimum(p, q)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    train(10)
    return seconds(lambda: train(EPOCHS // sizes.sampled_epochs)) * sizes.sampled_epochs


def _logistic(helpful: Embeddings, harmful: Embeddings, sizes: Sizes) -> float:
    """Seconds of scikit-learn's default logistic regression on all layers, from some of them."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    labels = np.repeat([1, 0], sizes.n_pairs)

    def fit() -> None:
        for layer in range(sizes.sampled_layers):
            LogisticRegression(max_iter=1000).fit(np.concatenate([helpful[layer], harmful[layer]]), labels)

    return seconds(fit) * sizes.n_layer / sizes.sampled_layers
