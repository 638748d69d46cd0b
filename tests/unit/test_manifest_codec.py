"""Signed manifests: what is written can be read, and everything else is refused with a sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cbor2
import pytest
from nacl.signing import SigningKey

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_CBOR, RAW, cid_of, peer_id_of
from protocols.manifest.codec import DOMAIN, encode_manifest, open_manifest, sign_manifest
from protocols.manifest.messages import MAX_MANIFEST_BYTES, Architecture, FileRef, Manifest, Quality, Variant
from tests.vectors import Case, hold

KEY = SigningKey(b"m" * 32)
OTHER = SigningKey(b"o" * 32)


def file(text: str) -> FileRef:
    return FileRef(cid=cid_of(RAW, text.encode()), size=len(text))


def manifest(layers: int = 2) -> Manifest:
    """A small, complete manifest with tied ends."""
    ends = file("embed and head")
    return Manifest(
        name="tiny-1.5b",
        version="v1.0.2-7",
        created_ms=1_700_000_000_000,
        publisher=peer_id_of(bytes(KEY.verify_key)),
        architecture=Architecture(
            family="llama",
            layers=layers,
            hidden=64,
            heads=4,
            kv_heads=2,
            head_dim=16,
            vocab=256,
            context=128,
            bos_ids=(1,),
            eos_ids=(2, 3),
        ),
        files={"config.json": file("{}"), "chat_template.jinja": file("{{ messages }}")},
        variants={
            "int4": Variant(
                name="int4",
                kernel_class="ort-cpu-int4-b32-a4/1",
                graph=file("graph"),
                embed=ends,
                layers=tuple(file(f"layer {k}") for k in range(layers)),
                head=ends,
                quality=Quality(text="some-text", tokens=700, perplexity_milli=20100, reference_milli=19378),
            ),
            "fp32": Variant(
                name="fp32",
                kernel_class="ort-cpu-fp32/1",
                graph=file("graph 32"),
                embed=ends,
                layers=tuple(file(f"wide layer {k}") for k in range(layers)),
                head=file("head alone"),
                quality=None,
            ),
        },
    )


def sealed(raw: dict[str, Any], key: SigningKey = KEY) -> bytes:
    """A block signed over any map, valid or not."""
    signature = key.sign(DOMAIN + cbor2.dumps(raw, canonical=True)).signature
    block = {"key": bytes(key.verify_key), "manifest": raw, "signature": signature}
    return cbor2.dumps(block, canonical=True)


def raw_manifest() -> dict[str, Any]:
    raw = cbor2.loads(encode_manifest(manifest()))
    assert isinstance(raw, dict)
    return raw


def test_what_is_signed_can_be_opened() -> None:
    assert open_manifest(sign_manifest(KEY, manifest())) == manifest()


def test_the_same_manifest_gives_the_same_bytes_whatever_the_order_of_its_maps() -> None:
    first = manifest()
    turned = replace(
        first,
        files=dict(reversed(first.files.items())),
        variants=dict(reversed(first.variants.items())),
    )
    assert sign_manifest(KEY, turned) == sign_manifest(KEY, first)


def test_keys_are_sorted_by_length_and_links_carry_tag_42() -> None:
    data = sign_manifest(KEY, manifest())
    block = cbor2.loads(data)
    assert list(block) == ["key", "manifest", "signature"]
    assert list(block["manifest"]["files"]) == ["config.json", "chat_template.jinja"]
    link = block["manifest"]["variants"]["int4"]["graph"]["cid"]
    assert link.tag == 42
    assert link.value[:5] == b"\x00\x01\x55\x12\x20"


def test_a_changed_byte_of_the_content_breaks_the_signature() -> None:
    data = sign_manifest(KEY, manifest()).replace(b"tiny-1.5b", b"tiny-1.6b")
    with pytest.raises(RemoteProtocolError, match=r"signature on the manifest tiny-1\.6b v1\.0\.2-7"):
        open_manifest(data)


def test_the_publisher_is_the_signer() -> None:
    with pytest.raises(LocalProtocolError, match="another peer's key"):
        sign_manifest(OTHER, manifest())
    with pytest.raises(RemoteProtocolError, match=r"but 12D3KooW.* signed it"):
        open_manifest(sealed(raw_manifest(), OTHER))


def test_a_record_of_another_kind_is_no_manifest() -> None:
    raw = raw_manifest()
    signature = KEY.sign(cbor2.dumps(raw, canonical=True)).signature  # without the domain
    block = {"key": bytes(KEY.verify_key), "manifest": raw, "signature": signature}
    with pytest.raises(RemoteProtocolError, match="signature"):
        open_manifest(cbor2.dumps(block, canonical=True))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("schema",), 2, "reads schema 1"),
        (("name",), "Tiny", "name is 'Tiny'"),
        (("name",), "", "name is ''"),
        (("version",), "1.0.0", "version is"),
        (("version",), "v1.0.0", "version is"),
        (("version",), "v01.0.0-0", "version is"),
        (("created_ms",), -1, "created_ms"),
        (("created_ms",), True, "created_ms"),
        (("publisher",), 7, "publisher"),
        (("architecture", "layers"), 0, r"architecture\.layers"),
        (("architecture", "layers"), 3, "one group for each of the 3 layers"),
        (("architecture", "kv_heads"), 3, "can't share"),
        (("architecture", "eos_ids"), [256], "eos_ids"),
        (("architecture", "eos_ids"), [1] * 65, "eos_ids"),
        (("architecture", "family"), "ll ama", "family"),
        (("files", "config.json"), None, "not a map"),
        (("files", "config.json", "cid"), b"no link", "not a link"),
        (("files", "config.json", "cid"), cbor2.CBORTag(42, b"\x01abc"), "not a link"),
        (("files", "config.json", "cid"), cbor2.CBORTag(42, b"\x00abc"), "base32 CIDv1"),
        (("files", "config.json", "cid"), cbor2.CBORTag(43, b"\x00abc"), "tag 43"),
        (("files", "config.json", "size"), 1.0, "float"),
        (("files", "../etc/passwd"), {}, "a file name"),
        (("files", ".hidden"), {}, "a file name"),
        (("variants",), {}, "1 to 16 entries"),
        (("variants", "INT4"), {}, "a variant name"),
        (("variants", "int4", "kernel_class"), "", "kernel_class"),
        (("variants", "int4", "layers"), {}, "one group for each"),
        (("variants", "int4", "quality"), {}, "quality lacks"),
        (("variants", "int4", "quality", "tokens"), -4, "tokens"),
        (("variants", "int4", "embed", "size"), 999, "two sizes"),  # it is the head, too
        (("surplus",), 1, "surplus"),
    ],
)
def test_a_value_out_of_form_is_refused(path: tuple[str, ...], value: object, words: str) -> None:
    raw = raw_manifest()
    at = raw
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(RemoteProtocolError, match=words):
        open_manifest(sealed(raw))


@pytest.mark.parametrize("key", ["schema", "name", "architecture", "files", "variants"])
def test_a_missing_key_is_refused(key: str) -> None:
    raw = raw_manifest()
    del raw[key]
    with pytest.raises(RemoteProtocolError):
        open_manifest(sealed(raw))


def test_a_manifest_can_not_link_to_a_manifest_as_a_file() -> None:
    wrong = replace(manifest(), files={"config.json": FileRef(cid=cid_of(DAG_CBOR, b"x"), size=1)})
    with pytest.raises(LocalProtocolError, match="not the CID of a file"):
        encode_manifest(wrong)


def test_a_variant_is_filed_under_its_own_name() -> None:
    first = manifest()
    wrong = replace(first, variants={"int8": first.variants["int4"]})
    with pytest.raises(LocalProtocolError, match="another name"):
        sign_manifest(KEY, wrong)


def test_only_the_canonical_encoding_is_read() -> None:
    block = cbor2.loads(sign_manifest(KEY, manifest()))
    turned = dict(reversed(block.items()))
    with pytest.raises(RemoteProtocolError, match="canonical"):
        open_manifest(cbor2.dumps(turned))


def test_size_and_depth_are_limited() -> None:
    with pytest.raises(RemoteProtocolError, match="limit is"):
        open_manifest(b"\x00" * (MAX_MANIFEST_BYTES + 1))
    with pytest.raises(RemoteProtocolError):
        open_manifest(b"\x81" * 100_000 + b"\x00")


def test_the_span_of_a_variant_names_its_groups() -> None:
    variant = manifest().variants["int4"]
    assert sorted(variant.groups(0, 1)) == ["embed", "layer.0"]
    assert sorted(variant.groups(1, 2)) == ["head", "layer.1"]
    tied = variant.embed.size + sum(f.size for f in variant.layers)
    assert variant.span_bytes(0, 2) == tied


def cases() -> list[Case]:
    whole = manifest()
    plain = replace(
        whole,
        files={},
        variants={"fp32": whole.variants["fp32"]},
        architecture=replace(whole.architecture, bos_ids=(), eos_ids=()),
    )
    good = sign_manifest(KEY, whole)
    floating = raw_manifest()
    floating["created_ms"] = 1.5
    newer = {**raw_manifest(), "schema": 2}
    empty = replace(plain, files={"LICENSE": FileRef(cid=cid_of(RAW, b""), size=0)})
    return [
        Case("two variants, tied ends", good, whole),
        Case("one variant, no quality, no files", sign_manifest(KEY, plain), plain),
        Case("an empty file", sign_manifest(KEY, empty), empty),
        Case("signed by somebody else", sealed(raw_manifest(), OTHER)),
        Case("a float", sealed(floating)),
        Case("a newer schema", sealed(newer)),
        Case("a byte too many", good + b"\x00"),
        Case("a byte too few", good[:-1]),
        Case("nothing", b""),
    ]


def test_vectors() -> None:
    hold("manifest", cases(), open_manifest)
