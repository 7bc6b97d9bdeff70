"""When to try again, and when not: back-off with jitter, and no try that cannot help. Standard library only."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from frelay.errors import CertificateRefused, FrelayError, HandOffFailed, PeerGone, Refused, RelayUnreachable

__all__ = ["NoRelay", "Retry", "read_retry"]

# A relay may name any number; one that says "in a million years" is asked again all the same.
_LONGEST_RETRY_AFTER: Final = 86400.0


class NoRelay(RelayUnreachable):
    """What answers is not to be trusted, or no relay: another try would meet the same."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how patiently to join again after a failure that may pass.

    ``tries`` is how many times at most after the first, None for no limit but ``wait``. The pause is drawn from the
    upper half of ``first``, twice that, and so on up to ``longest`` seconds, so that a thousand functions that lost
    one relay do not come back in one moment; it is never shorter than the relay's ``retry_after``, or a day where
    that is longer. A join that had got as far as WAITING starts over with ``first``.
    """

    tries: int | None = None
    first: float = 0.5
    longest: float = 30.0

    def __post_init__(self) -> None:
        if self.tries is not None and self.tries < 0:
            raise ValueError("retry: the number of tries is 0 or more")
        if not 0 < self.first <= self.longest:
            raise ValueError("retry: the first pause is more than 0 and at most the longest")

    def pause_after(self, error: FrelayError, tries: int, failures: int) -> float | None:
        """Seconds to wait after ``error``, None where no other try is to be made.

        ``tries`` is how many were made again already, ``failures`` how many in a row got no WAITING.
        """
        if self.tries is not None and tries >= self.tries:
            return None
        may_pass = isinstance(error, RelayUnreachable | HandOffFailed | PeerGone)
        if isinstance(error, NoRelay | CertificateRefused):
            may_pass = False
        at_least = 0.0
        if isinstance(error, Refused):
            may_pass = error.retry_after is not None
            at_least = min(error.retry_after or 0.0, _LONGEST_RETRY_AFTER)
        if not may_pass:
            return None
        # 2.0**1024 would be an OverflowError, after three weeks of trying.
        ceiling = min(self.longest, self.first * 2.0 ** min(failures, 64))
        return at_least + random.uniform(ceiling / 2, ceiling)  # noqa: S311  not a secret


def read_retry(retry: Retry | bool | int | None) -> Retry | None:
    """The Retry of a ``retry=`` argument: True for the default one, a number for that many tries, None for none."""
    if retry is None or isinstance(retry, Retry):
        return retry
    if isinstance(retry, bool):
        return Retry() if retry else None
    return Retry(tries=retry)
