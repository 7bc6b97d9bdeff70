"""When to join again after a failure, and when not: back-off with jitter. Standard library only."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from frelay.errors import CertificateRefused, FrelayError, HandOffFailed, PeerGone, Refused, RelayUnreachable

__all__ = ["NoRelay", "Retry", "random_pause", "read_retry"]

# A relay may send any number. We never wait longer than a day because of it.
_LONGEST_RETRY_AFTER: Final = 86400.0


class NoRelay(RelayUnreachable):
    """The server is not trusted, or is no relay: another try would find the same, so there is none."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How often to join again after a failure that may pass, and how long to pause before.

    ``tries`` limits the tries after the first one; with None only ``wait`` limits them. The pause is ``first`` seconds,
    then twice that, and so on up to ``longest``. We wait a random part of it, at least half, so that a thousand
    functions that lost one relay do not come back at the same moment. The relay's ``retry_after``, up to one day, is
    added. After a join that reached WAITING the pauses begin again with ``first``.
    """

    tries: int | None = None
    first: float = 0.5
    longest: float = 30.0

    def __post_init__(self) -> None:
        if self.tries is not None and self.tries < 0:
            raise ValueError("retry: the number of tries must be 0 or more")
        if not 0 < self.first <= self.longest:
            raise ValueError("retry: the first pause must be more than 0 and at most the longest")

    def pause_after(self, error: FrelayError, tries: int, failures: int) -> float | None:
        """Seconds to wait after ``error``; None if there must be no other try.

        ``tries`` is how many tries followed the first, ``failures`` how many in a row did not reach WAITING.
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
        return at_least + random_pause(self, failures)


def random_pause(retry: Retry, failures: int) -> float:
    """Seconds to pause after this many failures in a row, by the lengths of ``retry``."""
    # Without min(), 2.0**1024 would be an OverflowError after weeks of tries.
    ceiling = min(retry.longest, retry.first * 2.0 ** min(failures, 64))
    return random.uniform(ceiling / 2, ceiling)  # noqa: S311  not a secret


def read_retry(retry: Retry | bool | int | None) -> Retry | None:
    """The Retry of a ``retry=`` argument: True for the default one, a number for that many tries, None for none."""
    if retry is None or isinstance(retry, Retry):
        return retry
    if isinstance(retry, bool):
        return Retry() if retry else None
    return Retry(tries=retry)
