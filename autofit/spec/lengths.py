"""How long the sequences of a data set are: what decides the longest batch, the average one, and what cutting loses."""

from __future__ import annotations

import math

from msgspec import Struct


class LengthBin(Struct, frozen=True, kw_only=True):
    """Neighbouring lengths, and how many of the sequences that were measured have them."""

    num_sequences: int
    min_tokens: int
    max_tokens: int
    mean_tokens: float

    def share_above(self, tokens: int) -> float:
        """Share of the bin's sequences that are longer."""
        if tokens < self.min_tokens:
            return 1.0
        num = max(0, self.max_tokens - tokens)
        first, slope = self._density_after(tokens)
        return num * first + slope * num * (num + 1) / 2

    def mean_cut(self, tokens: int) -> float:
        """Mean length of the bin's sequences, each cut at so many tokens."""
        if tokens <= self.min_tokens:
            return float(tokens)
        num = max(0, self.max_tokens - tokens)
        first, slope = self._density_after(tokens)
        lost = first * num * (num + 1) / 2 + slope * num * (num + 1) * (2 * num + 1) / 6
        return max(float(self.min_tokens), self.mean_tokens - lost)

    def _density_after(self, tokens: int) -> tuple[float, float]:
        """Share of the sequences that have a length, and how it changes with the next.

        As if shares grew or fell evenly over the bin's lengths, which its mean decides; none is negative.
        """
        num = self.max_tokens - self.min_tokens + 1
        if num == 1:
            return 0.0, 0.0
        middle = (self.min_tokens + self.max_tokens) / 2
        steepest = 2 / (num - 1)
        slope = max(-steepest, min(steepest, 12 * (self.mean_tokens - middle) / (num**2 - 1)))
        return (1 + slope * (tokens - middle)) / num, slope / num


class LengthPercentile(Struct, frozen=True, kw_only=True):
    """The shortest length that a share of the sequences does not exceed."""

    fraction: float
    tokens: int
    interval_tokens: tuple[int, int] | None = None
    """Where that length of all sequences lies with 95 % confidence; None: all were measured, and it is known."""


class LengthDistribution(Struct, frozen=True, kw_only=True):
    """Lengths of a data set's sequences, before anything is cut.

    Sums over the distribution are sums over at most some seventy bins: exact where no more lengths occur, and otherwise
    as near as the bins are narrow.
    """

    path: str
    read_as: str
    """Which columns, and how they become one sequence."""
    tokenizer: str | None
    """None: the data says how many tokens a sequence has."""
    num_sequences: int
    """Of the whole data set."""
    num_measured_sequences: int
    """Fewer than `num_sequences`: a random sample, drawn with the same chance for each."""
    mean_tokens: float
    mean_interval_tokens: tuple[float, float] | None
    """Where the mean of all sequences lies with 95 % confidence; None: all were measured."""
    max_tokens: int
    """The longest: of a sample, the longest of it and of those that take most bytes in the file."""
    percentiles: tuple[LengthPercentile, ...]
    bins: tuple[LengthBin, ...]
    """In ascending order, without overlap."""

    @property
    def is_sample(self) -> bool:
        """Whether some sequences were not measured, so that a longer one may occur."""
        return self.num_measured_sequences < self.num_sequences

    def shares(self) -> list[float]:
        """Share of the sequences in each bin."""
        return [each.num_sequences / self.num_measured_sequences for each in self.bins]

    def means(self, cut_tokens: int) -> list[float]:
        """Mean length in each bin, sequences cut at so many tokens."""
        return [each.mean_cut(cut_tokens) for each in self.bins]

    def mean_cut(self, cut_tokens: int) -> float:
        """Mean length of a sequence cut at so many tokens."""
        return math.fsum(share * mean for share, mean in zip(self.shares(), self.means(cut_tokens), strict=True))

    def share_above(self, tokens: int) -> float:
        """Share of the sequences that are longer than so many tokens."""
        return math.fsum(share * each.share_above(tokens) for share, each in zip(self.shares(), self.bins, strict=True))

    def share_lost(self, cut_tokens: int) -> float:
        """Share of all tokens that lie behind a cut."""
        return max(0.0, 1 - self.mean_cut(cut_tokens) / self.mean_tokens)

    def epoch_tokens(self, cut_tokens: int) -> float:
        """Tokens of all sequences, cut at so many."""
        return self.num_sequences * self.mean_cut(cut_tokens)

    def shares_up_to(self, num_drawn: int) -> list[float]:
        """Chance that none of so many sequences, drawn at random, lies above each bin.

        As a batch is drawn: no sequence twice. Of a sample, or where more are drawn than there are, as from infinitely
        many.
        """
        total = self.num_measured_sequences
        reached = [sum(each.num_sequences for each in self.bins[: end + 1]) for end in range(len(self.bins))]
        if self.is_sample or num_drawn > total:
            return [(num / total) ** num_drawn for num in reached]
        every = _log_orders(total, num_drawn)
        return [math.exp(_log_orders(num, num_drawn) - every) if num >= num_drawn else 0.0 for num in reached]

    def expected_longest(self, num_drawn: int, cut_tokens: int) -> float:
        """Mean length of the longest of so many sequences drawn at random and cut: what a batch is padded to."""
        up_to = self.shares_up_to(num_drawn)
        below = [0.0, *up_to[:-1]]
        return math.fsum(mean * (to - low) for mean, to, low in zip(self.means(cut_tokens), up_to, below, strict=True))


class PackedRows(Struct, frozen=True, kw_only=True):
    """A data set packed into rows: what a trainer then counts as its sequences."""

    row_tokens: int
    """Room in a row."""
    num_rows: int
    """Rows of the whole data set."""
    mean_sequences: float
    """Sequences in a row."""
    mean_tokens: float
    """Tokens in a row; the rest of it stays empty."""

    @property
    def fill_fraction(self) -> float:
        """Share of a row that is filled."""
        return self.mean_tokens / self.row_tokens


class Cut(Struct, frozen=True, kw_only=True):
    """What cutting sequences at a length loses, and what packing them then makes."""

    sequence_tokens: int
    sequences_cut_fraction: float
    tokens_lost_fraction: float
    packed: PackedRows


def _log_orders(num_sequences: int, num_drawn: int) -> float:
    """Logarithm of the number of ways to draw some of the sequences one after the other, none twice."""
    return math.lgamma(num_sequences + 1) - math.lgamma(num_sequences - num_drawn + 1)
