"""The buffers of losses that go through the tokens in chunks: their rows are no polynomial of batch and length."""

from __future__ import annotations

from autofit.spec.profile import MONOMIALS, Polynomial, RegimeProfile

CHUNK_ENTRIES, CHUNK_TOKENS = 32768, 4096
"""TRL's chunk: so many entries of the vocabulary for so many tokens.

Source: trl/trainer/utils.py 1.16, _CHUNKED_LOGPROB_CHUNK_SIZE; trl/kernels/chunked_logprob.py, TOKEN_CHUNK_SIZE."""


def bound_on(size: Polynomial, profile: RegimeProfile, num_tokens: int) -> float | None:
    """Return the most bytes of a tensor that the trace made with a row for each token, None where it has no bound.

    Args:
        size: a size of the tape.
        profile: whose regime has a fused loss.
        num_tokens: of the micro-batch.
    """
    for element in (2, 4):
        if profile.regime.loss == "liger":
            if _same(size, _rows(profile, profile.vocab_size * element, shifted=False), profile):
                return liger_chunk_tokens(num_tokens, profile) * profile.vocab_size * element
        elif profile.regime.loss == "chunked" and _same(
            size, _rows(profile, CHUNK_ENTRIES * element, shifted=True), profile
        ):
            return CHUNK_TOKENS * CHUNK_ENTRIES * element
    return None


def _same(size: Polynomial, other: Polynomial, profile: RegimeProfile) -> bool:
    """Whether two polynomials are the same; of a tape of one length, which has no powers of s, at that length."""
    tokens = profile.only_length
    return size == other if tokens is None else _in_batches(size, tokens) == _in_batches(other, tokens)


def _in_batches(size: Polynomial, sequence_tokens: int) -> tuple[float, float]:
    """The coefficients of 1 and b, at one length."""
    terms = list(zip(MONOMIALS, size, strict=True))
    constant, linear = (sum(c * sequence_tokens**j for (i, j), c in terms if i == power) for power in (0, 1))
    return constant, linear


def liger_chunk_tokens(num_tokens: int, profile: RegimeProfile) -> int:
    """Tokens of one chunk: as many as make its logits about as large as the hidden states.

    Source: liger_kernel/ops/fused_linear_cross_entropy.py 0.8.5, fused_linear_cross_entropy_forward.
    """
    num_chunks = -(-profile.vocab_size // profile.hidden_size)
    return min(num_tokens, 1 << (-(-num_tokens // num_chunks) - 1).bit_length())


def _rows(profile: RegimeProfile, row_bytes: int, *, shifted: bool) -> Polynomial:
    """The polynomial of a row for each token, or for each but a sequence's last."""
    b = 0 if profile.regime.masks_one_row else 1
    terms = {(b, 1): float(row_bytes), (b, 0): -float(row_bytes) if shifted else 0.0}
    return tuple(terms.get(monomial, 0.0) for monomial in MONOMIALS)
