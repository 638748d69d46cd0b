"""vectors.json: what this revision puts on the wire, byte for byte; truncated and flipped in every bit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols.codec import decode, dumps, encode
from protocols.envelope import open_record
from protocols.errors import RemoteProtocolError
from protocols.membership import (
    HELLO,
    Network,
    Trust,
    Untrusted,
    format_ticket,
    open_network,
    parse_ticket,
    sign_network,
)
from protocols.membership.machine import Round
from protocols.membership.messages import (
    Certificate,
    Chain,
    Granted,
    Hello,
    Join,
    NewSecret,
    Refused,
    Renewal,
    Roster,
    Succession,
    Welcome,
    Withdrawal,
)
from protocols.membership.renewal import id_of, sign_renewal
from protocols.membership.sealing import open_secret, seal_secret
from protocols.membership.succession import sign_succession
from protocols.membership.ticket import PREFIX
from tests.unit.membership_actors import NOW_MS, World, key_of, peer_of_key
from tests.unit.test_membership_ticket import TICKET
from tests.vectors import Case, hold
from tests.wire import damaged

W = World()
ANN, BOB = peer_of_key("ann"), peer_of_key("bob")
ROUND = Round(W.trust().id, ANN, BOB, b"a" * 16, b"b" * 16)
RENEWED = sign_renewal(key_of("ann"), W.trust().id, bytes(range(32, 64)), NOW_MS, W.chain("ann"))
SUCCEEDED = sign_succession(key_of("ann"), key_of("ann 2"), W.trust().id, NOW_MS)
RECORDS = {
    "network": Network,
    "member": Certificate,
    "withdrawal": Withdrawal,
    "secret": Renewal,
    "succession": Succession,
}


def cases() -> list[Case]:
    hello = Hello(
        network=W.trust().id,
        nonce=b"a" * 16,
        chain=W.chain("ann"),
        software="0.1.0",
        name="ann",
        wall_ms=NOW_MS,
        secrets=(id_of(W.secret),),
    )
    answer = Hello(
        network=W.trust().id,
        nonce=b"b" * 16,
        chain=W.chain("ann", "bob", roles=("serve",)),
        software="0.1.0",
        name="bob",
        wall_ms=NOW_MS,
        proof=ROUND.proof(W.secret, "answerer"),
        secrets=(id_of(RENEWED.secret), id_of(W.secret)),
    )
    sealed = seal_secret(W.secret, invite=b"i" * 16, invite_secret=b"s" * 16, joiner=BOB, nonce=b"n" * 24)
    messages = {
        "hello of the asker": hello,
        "hello of the answerer": answer,
        "welcome of the asker": Welcome(wall_ms=NOW_MS, proof=ROUND.proof(W.secret, "asker")),
        "welcome of the answerer": Welcome(wall_ms=NOW_MS),
        "refused": Refused(code="stranger", reason="it shows no certificate of this network"),
        "refused with the word that put it out": Refused(
            code="forbidden", reason="it was sold", withdrawals=(W.withdrawal("bob", by="founder"),)
        ),
        "join": Join(
            network=W.trust().id, invite=b"i" * 16, secret=b"s" * 16, name="new", software="0.1.0", wall_ms=NOW_MS
        ),
        "granted": Granted(network=W.network_record, chain=W.chain("ann", "bob"), sealed=sealed, wall_ms=NOW_MS),
        "granted after a renewal": Granted(
            network=W.network_record,
            chain=W.chain("ann", "bob"),
            sealed=sealed,
            wall_ms=NOW_MS,
            renewal=RENEWED.renewal,
        ),
        "new secret": NewSecret(renewal=RENEWED.renewal, secret=RENEWED.secret),
        "roster": Roster(
            members=(Chain(certificates=W.chain("ann")),), withdrawals=(W.withdrawal("bob", by="founder"),)
        ),
    }
    out = [Case(name, HELLO.encode(message), message) for name, message in messages.items()]
    (certificate,) = W.chain("ann")
    withdrawal = W.withdrawal("bob", by="founder")
    out += [
        Case("network", W.network_record, W.network),
        Case("certificate by a founder", certificate, read(certificate)),
        Case("withdrawal by a founder", withdrawal, read(withdrawal)),
        Case("succession of a member's key", SUCCEEDED, read(SUCCEEDED)),
        Case("renewal by a founder's device", RENEWED.renewal, read(RENEWED.renewal)),
        Case("ticket", format_ticket(TICKET).encode(), TICKET),
    ]
    wrong = {
        "no such tag": dumps({0: 99}),
        "hello without a nonce": dumps({0: 1, 1: "n", 3: [], 4: "", 5: "", 6: 0, 8: []}),
        "proof of 31 bytes": dumps({0: 2, 1: 0, 2: bytes(31)}),
        "nine records in a chain": dumps({0: 1, 1: "n", 2: bytes(16), 3: [b""] * 9, 4: "", 5: "", 6: 0, 8: []}),
        "unknown even key": dumps({0: 3, 1: "stranger", 2: "no", 4: 1}),
        "new secret of 31 bytes": dumps({0: 7, 1: b"", 2: bytes(31)}),
        "secrets of nine bytes": dumps({0: 1, 1: "n", 2: bytes(16), 3: [], 4: "", 5: "", 6: 0, 8: [bytes(9)]}),
        "seventeen secrets": dumps({0: 1, 1: "n", 2: bytes(16), 3: [], 4: "", 5: "", 6: 0, 8: [bytes(8)] * 17}),
        "five withdrawals in a refusal": dumps({0: 3, 1: "forbidden", 2: "no", 3: [b""] * 5}),
        "negative time": dumps({0: 2, 1: -1}),
        "trailing byte": HELLO.encode(Welcome(wall_ms=1)) + bytes(1),
        "keys out of order": bytes.fromhex("a201000002"),
        "certificate with another's signature": certificate[:-1] + bytes([certificate[-1] ^ 1]),
        "ticket with a wrong checksum": format_ticket(TICKET)[:-1].encode() + b"a",
    }
    return out + [Case(name, data) for name, data in wrong.items()]


def read(data: bytes) -> object:
    """Any of our vectors: a message, a signed record, or a ticket."""
    if data.startswith(PREFIX.encode()):
        return parse_ticket(data.decode("utf-8", "replace"))
    try:
        opened = open_record(data)
    except RemoteProtocolError:
        return HELLO.decode(data)
    return decode(RECORDS[opened.domain], opened.payload)


ACCEPTED = [case for case in cases() if case.message is not None]


def test_the_file_is_what_this_code_makes_and_reads() -> None:
    hold("membership", cases(), read)


@pytest.mark.parametrize("case", ACCEPTED, ids=[case.name for case in ACCEPTED])
def test_every_damage_is_refused_or_seen(case: Case) -> None:
    signed = isinstance(case.message, (Network, Certificate, Withdrawal, Renewal, Succession))
    for bad in damaged(case.data):
        try:
            value = read(bad)
        except RemoteProtocolError:
            continue
        assert not signed, "a byte is not covered by the signature"
        assert value != case.message or case.name == "ticket"  # the case of a ticket's letters does not matter


def test_the_sealed_secret_opens_for_its_joiner_alone() -> None:
    sealed = seal_secret(W.secret, invite=b"i" * 16, invite_secret=b"s" * 16, joiner=BOB, nonce=b"n" * 24)
    assert open_secret(sealed, invite=b"i" * 16, invite_secret=b"s" * 16, joiner=BOB) == W.secret
    for invite, secret, joiner in (
        (b"j" * 16, b"s" * 16, BOB),
        (b"i" * 16, b"t" * 16, BOB),
        (b"i" * 16, b"s" * 16, ANN),
    ):
        with pytest.raises(RemoteProtocolError):
            open_secret(sealed, invite=invite, invite_secret=secret, joiner=joiner)


def test_network_records_that_do_not_hold() -> None:
    founder, network = key_of("founder"), W.network
    other = bytes(key_of("other").verify_key)
    for wrong in (
        replace(network, founders=()),
        replace(network, founders=(other,)),
        replace(network, founders=tuple(sorted((other, *network.founders)))[::-1]),
        replace(network, name="  "),
        replace(network, name="a\nb"),
    ):
        with pytest.raises(RemoteProtocolError):
            open_network(sign_network(founder, wrong))


def test_untrusted_is_the_peers_fault() -> None:
    with pytest.raises(Untrusted) as caught:
        Trust(W.network).check((encode(W.network),), NOW_MS)
    assert isinstance(caught.value, RemoteProtocolError)
