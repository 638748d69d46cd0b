"""The Kademlia DHT of libp2p, provider records only; see SPEC.md."""
