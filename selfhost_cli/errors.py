"""Every error a person may meet, and the exit code it ends with.

    SelfhostError            1  failed, nothing left running
    ├── UsageError           2  the request itself makes no sense
    ├── NotSetUp             3  key, ssh, claude or box missing; nothing can be billed
    ├── NothingToRent        4  no offer within the limits
    ├── MayBeBilling         5  something may still cost money: always the headline
    ├── BoxFailed            1  this machine did not get ready: another one may
    ├── NotServable          1  what was asked for, which no other machine could serve either
    ├── Superseded           1  another command (usually `down`) took the rental over
    └── MarketError          1  the market said no
        ├── MarketUnreachable   no answer, or one that makes no sense
        │   └── TooOften        it wants silence for a while
        ├── KeyRefused       3  the account key is wrong or lacks a permission
        ├── NoCredit         3  the account cannot pay
        ├── OfferGone           somebody else was faster: try the next offer
        └── AnswerLost          the create call may or may not have worked

An error says what happened, to which thing, and (`remedy`) what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar


class SelfhostError(Exception):
    """Base of all errors shown to a person as `message` and `remedy`, without a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UsageError(SelfhostError):
    exit_code = 2


class NotSetUp(SelfhostError):
    exit_code = 3


class NothingToRent(SelfhostError):
    exit_code = 4


class MayBeBilling(SelfhostError):
    """`left`: what may be billed, where that is known: instance_id, label, gpu and dph_total of each."""

    exit_code = 5

    def __init__(self, message: str, remedy: str = "", *, left: Sequence[Mapping[str, object]] = ()) -> None:
        super().__init__(message, remedy)
        self.left = tuple(left)


class BoxFailed(SelfhostError):
    """The machine was given its chance and did not get ready; another one may."""


class NotServable(SelfhostError):
    """The model cannot be had, or not as it was asked for; the machine had no part in that."""


class Superseded(SelfhostError):
    """The rental's state is no longer the one this step started from."""


class MarketError(SelfhostError):
    """The market refused a request for a reason that trying again will not change."""


class MarketUnreachable(MarketError):
    """No answer, a server error, a rate limit, or an answer whose shape is not the contract's."""


class TooOften(MarketUnreachable):
    """A rate limit: nothing was done. `seconds`: not to be asked again before that."""

    def __init__(self, message: str, remedy: str = "", *, seconds: float) -> None:
        super().__init__(message, remedy)
        self.seconds = seconds


class KeyRefused(MarketError):
    exit_code = 3


class NoCredit(MarketError):
    exit_code = 3


class OfferGone(MarketError):
    pass


class AnswerLost(MarketError):
    """A create whose outcome is unknown: only looking for its label can tell."""


def in_profile(text: str, profile: str) -> str:
    """A text with each command in it made one for this profile: typed as shown, it must act on the right box."""
    if profile == "default":
        return text
    return text.replace("`selfhost ", f"`selfhost --profile {profile} ")


def plain(text: str) -> str:
    """A text without what could steer a terminal or turn its writing around: markets and boxes are strangers."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")
