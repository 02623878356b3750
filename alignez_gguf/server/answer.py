"""One answer that grows token by token, and what is reported of its tokens."""

from __future__ import annotations

import codecs

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.engines.steered import log_softmax
from alignez_gguf.engines.text import StoppedText
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.sampling import Sampler
from alignez_gguf.server.jobs import Failed, Finished, Job, Piece, Ticket, TokenReport


class Answer:
    """An answer that is being written. `close` frees its sampler."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.last = -1
        """The token to be computed next."""
        self.finished = False
        self.steered: bool | None = None
        """What the gate of its control has decided; None without one."""
        self._n_tokens = 0
        sampling = self.job.sampling
        self._text = StoppedText(sampling.stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._n_fed = self._n_given = 0
        self._reports: list[TokenReport] = []
        self._sampler = Sampler(seed=self.job.seed, temperature=sampling.temperature, top_p=sampling.top_p)

    @property
    def job(self) -> Job:
        return self.ticket.job

    @property
    def done(self) -> bool:
        """Whether its sequences can be given to another."""
        return self.finished or self.ticket.cancelled

    def advance(self, context: Context, index: int, base_logits: NDArray[np.float32] | None) -> None:
        """Draw the next token from the logits at `index`.

        `base_logits` [n_vocab] are those of the unsteered model behind the same tokens, for the divergence.
        """
        token = self._sampler.sample(context, index)
        if context.model.ends_text(token):
            self._finish(Finished("stop", self._n_tokens, self.steered))
            return
        self.last = token
        self._n_tokens += 1
        data = context.model.piece(token)
        if self.job.n_alternatives is not None or base_logits is not None:
            self._reports.append(self._report(context, index, token, data, base_logits))
        text = self._decoder.decode(data)
        self._n_fed += len(text)
        self._give(self._text.feed(text))
        if self._text.stopped:
            self._finish(Finished("stop", self._n_tokens, self.steered))
        elif self._n_tokens == self.job.sampling.max_tokens:
            self._finish(Finished("length", self._n_tokens, self.steered))

    def fail(self, message: str) -> None:
        """Tell the listener that there will be no more."""
        self.finished = True
        self.ticket.listen(Failed(message))

    def close(self) -> None:
        self._sampler.close()

    def _finish(self, end: Finished) -> None:
        self._give(self._text.finish())
        self.finished = True
        self.ticket.listen(end)

    def _give(self, text: str) -> None:
        """Hand out text, with the reports of the tokens that begin in it."""
        self._n_given += len(text)
        # Where nothing is held back as a possible stop string, the text ends where the tokens do.
        all_given = self._n_given == self._n_fed and not self._text.stopped
        given = [report for report in self._reports if all_given or report.offset < self._n_given]
        if text or given:
            self._reports = self._reports[len(given) :]
            self.ticket.listen(Piece(text, tuple(given)))

    def _report(
        self,
        context: Context,
        index: int,
        token: int,
        data: bytes,
        base_logits: NDArray[np.float32] | None,
    ) -> TokenReport:
        logprobs = log_softmax(context.logits(index))
        alternatives: tuple[tuple[bytes, float], ...] = ()
        if self.job.n_alternatives:
            alternatives = tuple(
                (context.model.piece(int(one)), float(logprobs[one]))
                for one in _likeliest(logprobs, self.job.n_alternatives)
            )
        return TokenReport(
            data=data,
            logprob=None if self.job.n_alternatives is None else float(logprobs[token]),
            alternatives=alternatives,
            offset=self._n_fed,
            divergence=None if base_logits is None else _divergence(log_softmax(base_logits), logprobs),
        )


def _likeliest(logprobs: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The likeliest tokens, best first; without sorting the whole vocabulary."""
    found = np.argpartition(-logprobs, min(count, len(logprobs) - 1))[:count]
    return found[np.argsort(-logprobs[found], kind="stable")]


def _divergence(base: NDArray[np.float32], steered: NDArray[np.float32]) -> float:
    """KL(P_base || P_steered) in nat, of log-probabilities [n_vocab]."""
    possible = np.isfinite(base)  # some models never let a token be drawn
    terms = np.exp(base[possible], dtype=np.float64) * (base[possible] - steered[possible])
    return max(0.0, float(np.sum(terms)))
