"""The network port and its adapters: py-libp2p, direct TLS lanes, and a network in memory."""
