#!/bin/sh
# How containers become a network: one service makes it and keeps a fresh ticket where the others can read it,
# the others use the ticket once, on their first start.
#
#   entry.sh network          make the network if this data folder has none; write a ticket
#   entry.sh node [FLAG...]   join with the ticket if this data folder has no network; then meshnode start [FLAG...]
#
# MESHNODE_DATA     data folder                               (/data)
# TICKET_FILE       where the ticket lies                     (/ticket/ticket)
# TICKET_USES       how many devices one ticket lets in       (3)
# TICKET_HOURS      how long it is valid                      (1)
# NETWORK_NAME      name of a new network                     (home)
set -eu
umask 077

data=${MESHNODE_DATA:-/data}
ticket=${TICKET_FILE:-/ticket/ticket}

is_member() {
    [ -e "$data/network/network.cbor" ]
}

fail() {
    echo "entry: $1" >&2
    exit 1
}

make_network() {
    # The ticket that `init` prints goes nowhere: logs are no place for secrets.
    is_member || meshnode init "${NETWORK_NAME:-home}" > /dev/null
    # A new ticket every time: the last one may be used up or too old for a node that comes later.
    meshnode invite --uses "${TICKET_USES:-3}" --hours "${TICKET_HOURS:-1}" |
        sed -n 's/^ *meshnode join //p' > "$ticket.new"
    [ -s "$ticket.new" ] || fail "no ticket could be made; the lines above say why"
    mv "$ticket.new" "$ticket"
    echo "entry: a ticket for ${TICKET_USES:-3} devices, valid for ${TICKET_HOURS:-1} h, lies in $ticket" >&2
}

run_node() {
    if ! is_member; then
        [ -s "$ticket" ] || fail "this node is in no network, and there is no ticket in $ticket; run: docker compose up"
        meshnode join --ticket-file "$ticket"  # an argument could be read by others
    fi
    exec meshnode start "$@"
}

case ${1-} in
    network) make_network ;;
    node) shift && run_node "$@" ;;
    *) fail "say what to do: network or node" ;;
esac
