"""A node's own intent, and the promises that it gives to others, as state machines without I/O.

Rule 1: every state and every transition is in TRANSITIONS, nowhere else: the code looks them up there.
Rule 2: no clock, no randomness, no await. Time comes in as `now` (seconds, monotonic), a wish to be woken goes
out as `deadline`, orders go out as effects, draws come from the function given to the constructor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from protocols.advert.messages import Span
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.intent.messages import HOLD_MS, Answer, Held, Hold, NotHeld
from protocols.words import layers

GOSSIP_S: Final = 1.0  # an advert that changed reaches everybody within a few of these periods
LEAST_WAIT_PERIODS: Final = 4
JOIN_WAIT_S: Final = 1.0  # wait of a node that serves nothing yet, or closes a hole, while the mesh answers
URGENT_WAIT_S: Final = 0.3  # wait while no complete chain is served: nothing is at risk, time is
HOLD_TIMEOUT_S: Final = 10.0  # for all promises together
LOAD_TIMEOUT_S: Final = 600.0
ABORT_PAUSE_S: Final = (5.0, 15.0)  # uniform, so that two who stood in each other's way don't meet again
REPAIR_PAUSE_S: Final = (0.5, 2.0)  # the same when a layer has no holder, or loses its last one
JOIN_PAUSE_S: Final = (0.1, 0.5)  # the same for a node that serves nothing: trying again costs nobody anything
FAILURE_PAUSE_S: Final = (1.0, 60.0)  # first, cap; doubled with every failure in a row
_FAN_OUT: Final = 3  # peers that each peer passes an advert on to, at the least


class State(Enum):
    RESTING = "resting"  # nothing announced
    ANNOUNCED = "announced"  # the target is in our advert; waiting for what others announce
    CHECKING = "checking"  # the policy looks again, with the newest view
    ASKING = "asking"  # exclusive move: promises wanted before anything is released
    LOADING = "loading"  # fetching and opening the target
    PARTING = "parting"  # loaded; promises wanted before the old span goes
    PAUSED = "paused"  # aborted or failed; tries again after the deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """The policy wants the node to serve `target`.

    leaves: layers of `source` are given up, so promises are needed (false when nothing is served by anybody).
    exclusive: the old span must go before the new one can come.
    wait_s: between the announcement and the check.
    pause_s: least and most seconds before trying again when the check fails.
    """

    target: Span
    source: Span | None
    leaves: bool
    exclusive: bool
    wait_s: float
    pause_s: tuple[float, float] = ABORT_PAUSE_S


@dataclass(frozen=True, slots=True)
class Expired:
    """The deadline has passed."""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The newest view still wants this move."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The newest view, or a peer that should hold our layers, does not allow the move."""

    reason: str


@dataclass(frozen=True, slots=True)
class Guarded:
    """Every layer that we leave was promised by a peer."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The target is open and answers."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The target could not be fetched or opened."""

    reason: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The move lost its point: another release, or the node leaves."""

    reason: str


Event = Want | Expired | Confirmed | Refused | Guarded | Loaded | Failed | Cancelled


@dataclass(frozen=True, slots=True)
class Announce:
    """Put the target and epoch into the advert and publish it now."""

    target: Span
    epoch: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take the target out of the advert."""

    reason: str


@dataclass(frozen=True, slots=True)
class Recheck:
    """Ask the policy again; answer with Confirmed or Refused."""


@dataclass(frozen=True, slots=True)
class AskHolds:
    """Ask the peers that serve what we leave; answer with Guarded or Refused."""

    target: Span
    exclusive: bool
    epoch: int


@dataclass(frozen=True, slots=True)
class Vacate:
    """Stop serving the present span: no new sessions, then end its engine."""


@dataclass(frozen=True, slots=True)
class Load:
    """Fetch and open the target; answer with Loaded or Failed."""

    target: Span


@dataclass(frozen=True, slots=True)
class Switch:
    """Serve the target from now on; the old span ends when its sessions do."""

    target: Span


@dataclass(frozen=True, slots=True)
class Discard:
    """Stop loading, or end what was loaded."""


Effect = Announce | Withdraw | Recheck | AskHolds | Vacate | Load | Switch | Discard

TRANSITIONS: Final[Mapping[tuple[State, type], tuple[State, ...]]] = {
    (State.RESTING, Want): (State.ANNOUNCED,),
    (State.RESTING, Cancelled): (State.RESTING,),
    (State.RESTING, Expired): (State.RESTING,),
    (State.ANNOUNCED, Expired): (State.CHECKING,),
    (State.ANNOUNCED, Cancelled): (State.RESTING,),
    (State.CHECKING, Confirmed): (State.ASKING, State.LOADING),
    (State.CHECKING, Refused): (State.PAUSED,),
    (State.CHECKING, Cancelled): (State.RESTING,),
    (State.ASKING, Guarded): (State.LOADING,),
    (State.ASKING, Refused): (State.PAUSED,),
    (State.ASKING, Expired): (State.PAUSED,),
    (State.ASKING, Cancelled): (State.RESTING,),
    (State.LOADING, Loaded): (State.RESTING, State.PARTING),
    (State.LOADING, Failed): (State.PAUSED,),
    (State.LOADING, Refused): (State.PAUSED,),
    (State.LOADING, Expired): (State.PAUSED,),
    (State.LOADING, Cancelled): (State.RESTING,),
    (State.PARTING, Guarded): (State.RESTING,),
    (State.PARTING, Refused): (State.PAUSED,),
    (State.PARTING, Expired): (State.PAUSED,),
    (State.PARTING, Cancelled): (State.RESTING,),
    (State.PAUSED, Expired): (State.RESTING,),
    (State.PAUSED, Cancelled): (State.RESTING,),
}

_OVERDUE: Final = {
    State.LOADING: f"loading took longer than {LOAD_TIMEOUT_S:.0f} s",
    State.ASKING: "the peers that should keep our layers did not answer",
    State.PARTING: "the peers that should keep our layers did not answer",
}


def settled_wait_s(peers: int) -> float:
    """How long an intent must be visible before a node that serves may act: gossip reaches `peers` peers in
    log_{f+1} rounds, and two more make a miss improbable. Seconds."""
    rounds = 0
    while (_FAN_OUT + 1) ** rounds < peers:
        rounds += 1
    return GOSSIP_S * max(LEAST_WAIT_PERIODS, rounds + 2)


class Mover:
    """The intent of one node, from its announcement to the switch."""

    def __init__(self, draw: Callable[[], float], *, first_epoch: int = 0) -> None:
        """`draw` gives uniform numbers in [0, 1)."""
        self.state = State.RESTING
        self.deadline: float | None = None
        self.epoch = first_epoch
        self.want: Want | None = None  # the move under way
        self.failures = 0  # in a row
        self.reason = ""  # why the last move did not happen
        self._draw = draw

    @property
    def loads(self) -> bool:
        """Whether the target is being fetched, or open already."""
        return self.state in (State.LOADING, State.PARTING)

    def expects(self, event: Event) -> bool:
        """Whether this state allows the event."""
        return (self.state, type(event)) in TRANSITIONS

    def handle(self, event: Event, now: float) -> tuple[Effect, ...]:
        """Take one event, return what to do, in order.

        Raises:
          LocalProtocolError: this state does not allow the event; nothing has changed.
        """
        if not self.expects(event):
            raise LocalProtocolError(f"an intent does not expect {type(event).__name__} while {self.state.value}")
        before = self.state
        following = TRANSITIONS[before, type(event)]
        match event:
            case Want():
                self.epoch += 1
                self.want = event
                self._enter(following, now + event.wait_s)
                return (Announce(event.target, self.epoch),)
            case Confirmed():
                want = self._wanted()
                if want.exclusive and want.leaves:
                    self._enter(following, now + HOLD_TIMEOUT_S, State.ASKING)
                    return (AskHolds(want.target, True, self.epoch),)
                self._enter(following, now + LOAD_TIMEOUT_S, State.LOADING)
                return (*((Vacate(),) if want.exclusive and want.source else ()), Load(want.target))
            case Guarded() if before is State.ASKING:
                self._enter(following, now + LOAD_TIMEOUT_S)
                return (Vacate(), Load(self._wanted().target))
            case Loaded() if (want := self._wanted()).leaves and not want.exclusive:
                self._enter(following, now + HOLD_TIMEOUT_S, State.PARTING)
                return (AskHolds(want.target, False, self.epoch),)
            case Loaded() | Guarded():
                target = self._wanted().target
                self._enter(following, None, State.RESTING)
                self.failures = 0
                self.reason = ""
                return (Switch(target),)
            case Expired() if before is State.ANNOUNCED:
                self._enter(following, None)
                return (Recheck(),)
            case Expired() if before in (State.RESTING, State.PAUSED):
                self._enter(following, None)
                return ()
            case Cancelled():
                self.reason = event.reason
                self._enter(following, None)
            case Expired():
                self.reason = _OVERDUE[before]
                self._enter(following, now + self._pause(failed=before is State.LOADING))
            case Refused() | Failed():
                self.reason = event.reason
                self._enter(following, now + self._pause(failed=isinstance(event, Failed)))
        discard = (Discard(),) if before in (State.LOADING, State.PARTING) else ()
        return (*discard, *((Withdraw(self.reason),) if before not in (State.RESTING, State.PAUSED) else ()))

    def _wanted(self) -> Want:
        assert self.want is not None, "every state but RESTING and PAUSED has a move"
        return self.want

    def _enter(self, following: tuple[State, ...], deadline: float | None, choice: State | None = None) -> None:
        """Go to the state that the table names, or to the `choice` among those that it names."""
        (self.state,) = following if choice is None else [state for state in following if state is choice]
        self.deadline = deadline
        if self.state in (State.RESTING, State.PAUSED):
            self.want = None

    def _pause(self, *, failed: bool) -> float:
        """Seconds until the next attempt. Call while the move is known."""
        if failed:
            first, cap = FAILURE_PAUSE_S
            pause: float = min(cap, first * 2.0**self.failures) * (0.5 + self._draw())
            self.failures = min(self.failures + 1, 16)
            return pause
        low, high = self._wanted().pause_s
        return low + (high - low) * self._draw()


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the asked node does at this moment."""

    span: Span | None  # serves now
    target: Span | None  # announced to move to
    leaving: bool  # drains


class Keeper:
    """The promises that a node gave: layers it does not leave of its own will until they run out."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, int, float]] = {}  # asker -> first, last, until

    def asked(self, peer: str, hold: Hold, standing: Standing, now: float) -> Answer:
        """Answer a Hold. A new promise to the same peer replaces the old one.

        Raises:
          RemoteProtocolError: an empty range.
        """
        if hold.first >= hold.last:
            raise RemoteProtocolError(f"a hold for layers {hold.first} to {hold.last}, which is no range")
        span, target = standing.span, standing.target
        if span is None or (span.manifest, span.variant) != (hold.manifest, hold.variant):
            return NotHeld(code="fenced", reason="this node does not serve that release")
        if not (span.first <= hold.first and hold.last <= span.last):
            reason = f"this node serves {layers(span.first, span.last)} only"
            return NotHeld(code="fenced", reason=reason)
        if standing.leaving and not hold.returns:
            return NotHeld(code="leaving", reason="this node is leaving")
        keeps = target is None or (
            (target.manifest, target.variant) == (hold.manifest, hold.variant)
            and target.first <= hold.first
            and hold.last <= target.last
        )
        if not keeps:
            return NotHeld(code="moving", reason="this node is moving to other layers itself")
        hold_ms = min(hold.hold_ms, HOLD_MS)
        self._held[peer] = (hold.first, hold.last, now + hold_ms / 1000)
        return Held(hold_ms=hold_ms)

    def promised(self, first: int, last: int, now: float) -> str | None:
        """A peer to whom some layer of [first, last) is promised, or None when we are free to leave them."""
        self._held = {peer: held for peer, held in self._held.items() if held[2] > now}
        for peer, (start, end, _) in sorted(self._held.items()):
            if start < last and first < end:
                return peer
        return None
