"""Puts the HTTP door together for one node."""

from __future__ import annotations

import ssl

from meshnode.config.settings import HttpSection
from meshnode.core.clock import monotonic
from meshnode.core.errors import ConfigError
from meshnode.core.supervise import Service
from meshnode.http.app import App
from meshnode.http.door import NodeDoor
from meshnode.http.gate import Gate
from meshnode.http.listen import bind
from meshnode.http.page.files import read_page
from meshnode.http.server import HttpService
from meshnode.node import Node
from meshnode.state.api_keys import keys


def http_service(node: Node) -> tuple[tuple[Service, ...], str]:
    """The service, and the URL where it will answer.

    Raises ConfigError: it can't listen there, others can reach it and there is no key, or TLS can't be spoken.
    """
    settings = node.config.http
    tls = _tls(settings)
    binding = bind(settings.listen, secure=tls is not None)
    wall = node.parts.wall
    keyed = settings.require_keys or not binding.loopback
    if keyed and not any(not key.revoked_ms and not 0 < key.expires_ms <= wall() for key in keys(node.database)):
        binding.socket.close()
        why = "http.require_keys is set" if binding.loopback else f"others can reach {settings.listen} (http.listen)"
        raise ConfigError(f"{why}, and there is no key. Make one first: meshnode key add NAME")
    gate = Gate(node.database, wall, monotonic, keyed=keyed, origins=settings.cors)
    app = App(NodeDoor(node, binding.url), wall, gate, read_page())
    return (HttpService(binding, app.build(), tls),), binding.url


def _tls(settings: HttpSection) -> ssl.SSLContext | None:
    if not settings.tls_cert and not settings.tls_key:
        return None
    if not settings.tls_cert or not settings.tls_key:
        raise ConfigError("TLS needs both http.tls_cert and http.tls_key")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"http.tls_cert {settings.tls_cert} and http.tls_key {settings.tls_key} can't be used: {error}"
        ) from error
    return context
