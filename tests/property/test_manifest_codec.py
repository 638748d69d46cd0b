"""Properties of signed manifests: round trip, and nothing but the original opens."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_PB, RAW, PeerId, cid_of
from protocols.manifest.codec import open_manifest, sign_manifest
from protocols.manifest.messages import Architecture, FileRef, Manifest, Quality, Variant
from tests.hostile import mutated
from tests.unit.test_manifest_codec import KEY, manifest

files = st.builds(
    lambda seed, codec: FileRef(cid=cid_of(codec, seed), size=int.from_bytes(seed, "big")),
    st.binary(min_size=1, max_size=6),
    st.sampled_from((RAW, DAG_PB)),
)
words = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=20)
counts = st.integers(1, 1 << 31)
quality = st.none() | st.builds(Quality, text=words, tokens=counts, perplexity_milli=counts, reference_milli=counts)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    layers = draw(st.integers(1, 6))
    kv_heads = draw(st.integers(1, 8))
    vocab = draw(counts)
    ids = st.lists(st.integers(0, vocab - 1), max_size=4).map(tuple)
    names = draw(st.lists(words, min_size=1, max_size=3, unique=True))
    return Manifest(
        name=draw(words),
        version="v{}.{}.{}-{}".format(*draw(st.tuples(*[st.integers(0, 999)] * 4))),
        created_ms=draw(st.integers(0, 1 << 53)),
        publisher=PeerId(manifest().publisher),
        architecture=Architecture(
            family=draw(words),
            layers=layers,
            hidden=draw(counts),
            heads=kv_heads * draw(st.integers(1, 8)),
            kv_heads=kv_heads,
            head_dim=draw(counts),
            vocab=vocab,
            context=draw(counts),
            bos_ids=draw(ids),
            eos_ids=draw(ids),
        ),
        files=draw(st.dictionaries(words, files, max_size=4)),
        variants={
            name: Variant(
                name=name,
                kernel_class=draw(words),
                graph=draw(files),
                embed=draw(files),
                layers=tuple(draw(files) for _ in range(layers)),
                head=draw(files),
                quality=draw(quality),
            )
            for name in names
        },
    )


@settings(max_examples=60)
@given(manifests())
def test_a_signed_manifest_opens_to_itself(given_manifest: Manifest) -> None:
    data = sign_manifest(KEY, given_manifest)
    assert open_manifest(data) == given_manifest
    assert sign_manifest(KEY, open_manifest(data)) == data


SIGNED = sign_manifest(KEY, manifest())


@given(mutated(st.just(SIGNED)) | st.binary(max_size=300))
@settings(max_examples=800)
def test_other_bytes_are_refused(data: bytes) -> None:
    if data != SIGNED:
        with pytest.raises(RemoteProtocolError) as caught:
            open_manifest(data)
        assert len(str(caught.value)) > 10


@given(st.integers(0, len(SIGNED) * 8 - 1))
@settings(max_examples=300)
def test_every_flipped_bit_is_refused(bit: int) -> None:
    data = bytearray(SIGNED)
    data[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(RemoteProtocolError):
        open_manifest(bytes(data))
