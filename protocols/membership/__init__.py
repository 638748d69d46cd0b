"""Networks, certificates, tickets and the hello: see SPEC.md."""

from protocols.membership.machine import Credentials, HelloMachine, Member
from protocols.membership.messages import CODES, HELLO, PROTOCOL, ROLES, Network
from protocols.membership.network import network_id, open_network, sign_network
from protocols.membership.renewal import Secret, Secrets
from protocols.membership.ticket import Ticket, describe, format_ticket, parse_ticket
from protocols.membership.trust import Standing, Trust, Untrusted

__all__ = [
    "CODES",
    "HELLO",
    "PROTOCOL",
    "ROLES",
    "Credentials",
    "HelloMachine",
    "Member",
    "Network",
    "Secret",
    "Secrets",
    "Standing",
    "Ticket",
    "Trust",
    "Untrusted",
    "describe",
    "format_ticket",
    "network_id",
    "open_network",
    "parse_ticket",
    "sign_network",
]
