"""Bigram-Backcopy: a random process whose best predictor needs attention that can rest.

    x_1 ~ unigram over the tokens that are no triggers
    x_{i+1} = x_{i-1}            if x_i is a trigger
    x_{i+1} ~ P(. | x_i)         otherwise, P the bigram table of a text

(Guo et al., arXiv 2410.13835). Since x_1 is no trigger, the token before a trigger never is: a
trigger is only ever drawn after a non-trigger, and what follows it is that non-trigger, from which
the next token is drawn again. A token that only triggers follow in the text (or nothing does) would
repeat for ever (a t a t a ...), so its row of P is the text's unigram distribution. A head that
copies has nothing to do at the other tokens: it rests on the first token of the row.

Counts stay integers, so sampling is exact, and only the pairs that occur are stored.

Axes: N documents, T tokens of a document, V token ids, K distinct pairs.
"""

from __future__ import annotations

import numpy as np

from data.documents import Documents


class BackcopyProcess:
    """The process over the bigrams of a text.

    text: documents end to end, of tokens < ``vocab_size``; pairs are counted within documents.
    trigger_ids: distinct token ids that occur in the text, and not all that do.
    """

    def __init__(self, text: Documents, vocab_size: int, trigger_ids: np.ndarray):
        tokens = text.tokens.astype(np.int64)
        self.trigger_ids = np.sort(np.asarray(trigger_ids, np.int64))
        self.is_trigger_V = np.zeros(vocab_size, bool)
        self.is_trigger_V[self.trigger_ids] = True
        self.unigram_V = np.bincount(tokens, minlength=vocab_size)
        self.first_V = np.where(self.is_trigger_V, 0, self.unigram_V)

        within = np.ones(len(tokens), bool)
        within[text.starts_N + text.lengths_N - 1] = False
        is_pair = within[:-1]
        pair_K, count_K = np.unique(
            tokens[:-1][is_pair] * vocab_size + tokens[1:][is_pair], return_counts=True
        )
        pair_K, count_K = self._with_fallbacks(pair_K, count_K, vocab_size)
        self._vocab_size = vocab_size
        self._pair_K = pair_K
        self._count_K = count_K
        # Pairs are sorted by their first token: one running sum serves every row of the table.
        self._sum_K = count_K.cumsum()
        self._total_V = np.bincount(pair_K // vocab_size, count_K, vocab_size).astype(np.int64)
        self._before_V = self._total_V.cumsum() - self._total_V

    def _with_fallbacks(
        self, pair_K: np.ndarray, count_K: np.ndarray, vocab_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        from_K, to_K = np.divmod(pair_K, vocab_size)
        occurs = np.flatnonzero(self.unigram_V)
        stuck = np.setdiff1d(occurs, from_K[~self.is_trigger_V[to_K]])
        kept_K = ~np.isin(from_K, stuck)
        pairs = (stuck[:, None] * vocab_size + occurs).ravel()
        pair_K = np.concatenate([pair_K[kept_K], pairs])
        count_K = np.concatenate([count_K[kept_K], np.tile(self.unigram_V[occurs], len(stuck))])
        order = np.argsort(pair_K, kind="stable")
        return pair_K[order], count_K[order]

    def transition_VV(self) -> np.ndarray:
        """float64: P, row-normalised; rows of tokens that don't occur are 0. Takes V^2 memory."""
        table_VV = np.zeros((self._vocab_size, self._vocab_size))
        table_VV[self._pair_K // self._vocab_size, self._pair_K % self._vocab_size] = self._count_K
        return table_VV / np.maximum(1, self._total_V)[:, None]

    def sample(self, num_documents: int, num_tokens: int, rng: np.random.Generator) -> Documents:
        """Documents of ``num_tokens`` each; O(N T log K), one vectorised step a position."""
        tokens_TN = np.empty((num_tokens, num_documents), np.int64)
        first_sum_V = self.first_V.cumsum()
        draw_N = rng.integers(0, first_sum_V[-1], num_documents)
        tokens_TN[0] = np.searchsorted(first_sum_V, draw_N, side="right")
        for i in range(1, num_tokens):
            last_N = tokens_TN[i - 1]
            draw_N = self._before_V[last_N] + rng.integers(0, self._total_V[last_N])
            index_N = np.searchsorted(self._sum_K, draw_N, side="right")
            tokens_TN[i] = self._pair_K[index_N] % self._vocab_size
            if i >= 2:
                copies_N = self.is_trigger_V[last_N]
                tokens_TN[i, copies_N] = tokens_TN[i - 2, copies_N]
        dtype = np.uint16 if self._vocab_size <= 2**16 else np.uint32
        offsets_N1 = np.arange(num_documents + 1, dtype=np.int64) * num_tokens
        return Documents.end_to_end(tokens_TN.T.astype(dtype).ravel(), offsets_N1)

    def log_probabilities(self, tokens_NT: np.ndarray) -> np.ndarray:
        """float64 [N, T]: log P(x_i | x_1 .. x_{i-1}) in nats of whole documents; may be -inf.

        Its negative mean over any labels is the loss of the best predictor of those labels.
        """
        tokens_NT = np.asarray(tokens_NT, np.int64)
        last_NT, next_NT = tokens_NT[:, :-1], tokens_NT[:, 1:]
        pair_NT = last_NT * self._vocab_size + next_NT
        index_NT = np.searchsorted(self._pair_K, pair_NT).clip(max=len(self._pair_K) - 1)
        count_NT = np.where(self._pair_K[index_NT] == pair_NT, self._count_K[index_NT], 0)
        bigram_NT = count_NT / np.maximum(1, self._total_V[last_NT])
        copy_NT = np.zeros_like(bigram_NT)
        copy_NT[:, 1:] = tokens_NT[:, 2:] == tokens_NT[:, :-2]
        probability_NT = np.empty(tokens_NT.shape)
        probability_NT[:, 0] = self.first_V[tokens_NT[:, 0]] / self.first_V.sum()
        probability_NT[:, 1:] = np.where(self.is_trigger_V[last_NT], copy_NT, bigram_NT)
        with np.errstate(divide="ignore"):
            return np.log(probability_NT)

    def stationary_loss(self) -> float:
        """Expected loss in nats a token of the best predictor, far from a document's start.

        A non-trigger ``a`` is drawn from 1 / (1 - P_a(triggers)) times, each trigger and its copy
        leading back to it, until a non-trigger ``b`` is drawn. With nu the stationary distribution
        of these moves and pi_a = nu_a / (1 - P_a(triggers)), the loss is
        sum_a pi_a H(P_a) / sum_a pi_a (1 + P_a(triggers)): a copy is a second, certain token.
        """
        from_K, to_K = np.divmod(self._pair_K, self._vocab_size)
        probability_K = self._count_K / self._total_V[from_K]
        entropy_V = np.bincount(
            from_K, -probability_K * np.log(probability_K), minlength=self._vocab_size
        )
        moves_K = ~self.is_trigger_V[to_K]
        move_V = np.bincount(from_K[moves_K], probability_K[moves_K], self._vocab_size)
        move_K = probability_K[moves_K] / move_V[from_K[moves_K]]
        nu_V = self.first_V / self.first_V.sum()
        change = 1.0
        while change > 1e-9:
            # Half of each step stays, which changes no fixed point and forbids oscillation.
            moved_V = np.bincount(to_K[moves_K], nu_V[from_K[moves_K]] * move_K, self._vocab_size)
            change = np.abs(moved_V - nu_V).sum()
            nu_V = (nu_V + moved_V) / 2
        pi_V = np.divide(nu_V, move_V, out=np.zeros_like(nu_V), where=nu_V > 0)
        return float(pi_V @ entropy_V / (pi_V @ (2 - move_V)))
