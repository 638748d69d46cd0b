"""meshnode: a peer-to-peer mesh runtime.

General layout, lowest first; imports only point down (tests/test_layers.py holds it):

  protocols/          the wire: pure messages and machines, no I/O
  meshnode/core/      words that every part uses: errors, config, health, logs, paths, supervision
  meshnode/policy/    pure decisions: placement, route, chunking
  meshnode/*/port.py  interfaces of the outside world: net, content, engine
  meshnode/net, content, state, engine, models    adapters that implement the ports
  meshnode/services/  one capability each; they meet through what node.py gives them
  meshnode/node.py    the composition root: the only file that knows how it all fits
  meshnode/cli/       what a person types; talks to a running node over its control socket
"""

__version__ = "0.1.0"
