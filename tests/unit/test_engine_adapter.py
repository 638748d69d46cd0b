"""Adapters in the engine: the numbers that they give, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from meshnode.core.errors import Declined
from meshnode.engine.backend import Array, Factors
from meshnode.engine.onnx_stage import OnnxStage
from meshnode.engine.port import AdapterSpec
from meshnode.engine.requests import adapt_request, load_request
from meshnode.engine.sessions import Sessions, kv_bytes
from meshnode.model.adapter_file import Pair, write_layer
from tests.adapters import ALL, ALPHA, RANK, WIDTHS, random_pairs, written
from tests.conformance.tiny_model import VARIANTS, tiny_models, weight

LAYERS, HIDDEN, HEADS, KV_HEADS, WIDTH = 4, 64, 4, 2, 16
TOKENS = np.random.default_rng(5).integers(0, 96, 23).astype(np.int32)
SCALE = ALPHA / RANK


def stage_of(variant: str, first: int = 0, last: int = LAYERS) -> OnnxStage:
    return OnnxStage(load_request(tiny_models()[variant].spec(first, last)))


def factors(stage: OnnxStage, seed: int, targets: Sequence[str] = ALL, layers: range = range(LAYERS)) -> Any:
    stage.adapt(layers.start, layers.stop, targets)
    return {layer: stage.factors(layer, random_pairs(seed, layer, targets), SCALE) for layer in layers}


def logits(stage: OnnxStage, given: dict[int, Factors], *, cuts: Sequence[int] = (0, LAYERS)) -> Array:
    """Of the prompt's last token, and of one decode step."""
    tracks = [stage.open(a, b, 32, given) for a, b in pairwise(cuts)]
    out = []
    for position, tokens, prefill in ((0, TOKENS, True), (len(TOKENS), TOKENS[:1], False)):
        x: Array = tokens
        for track in tracks:
            x = track.run(position, x, prefill=prefill, wanted=True).copy()
        out.append(x)
    return np.stack(out)


# ---------------------------------------------------------------- numbers


Read = Callable[[str, tuple[int, ...]], Array]  # a weight by its name and shape


def stored(variant: str) -> Read:
    """The weights of a quantised variant, as its files have them."""
    tensors = {}
    for path in set(tiny_models()[variant].groups.values()):
        tensors |= safetensors.numpy.load_file(path)

    def unpacked(name: str) -> Array:
        data, scales = tensors[f"{name}.data"], tensors[f"{name}.scales"]  # (rows, blocks, bytes), (rows, blocks)
        if data.shape[2] == 32:  # a byte each
            return ((data.astype(np.float32) - 128) * scales[:, :, None]).reshape(len(data), -1)
        values = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:2], 32).astype(np.float32)
        zeros = tensors[f"{name}.zero_points"]
        zeros = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(len(data), -1)[:, : data.shape[1]]
        return ((values - zeros[:, :, None]) * scales[:, :, None]).reshape(len(data), -1)

    def read(name: str, shape: tuple[int, ...]) -> Array:
        if name in tensors:
            return tensors[name]
        for letters in ("", "qkv", "qk"):
            begin = 0
            joined = re.sub(r"\.[qkv]_proj", f".{letters}_proj", name) if letters else name
            if f"{joined}.data" in tensors:
                for letter in letters:
                    if f".{letter}_proj" in name:
                        break
                    begin += WIDTHS[f"{letter}_proj"][1]
                return unpacked(joined)[begin : begin + shape[0]]
        raise AssertionError(name)

    return read


def reference(pairs: dict[int, dict[str, Pair]], weight: Read = weight) -> Array:
    """The logits of the prompt's last token, in float64 and by the book."""
    positions = np.arange(len(TOKENS))
    angles = positions[:, None] * 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]  # (rows, 1, half)

    def norm(x: Array, name: str) -> Array:
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight(name, (HIDDEN,)))

    def turned(x: Array) -> Array:
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = weight("model.embed_tokens.weight", (96, HIDDEN))[TOKENS].astype(np.float64)
    for layer in range(LAYERS):

        def linear(x: Array, part: str, layer: int = layer) -> Array:
            inputs, outputs = WIDTHS[part.split(".")[1]]
            y = x @ weight(f"model.layers.{layer}.{part}.weight", (outputs, inputs)).T.astype(np.float64)
            pair = pairs.get(layer, {}).get(part.split(".")[1])
            return y if pair is None else y + SCALE * (x @ pair.a.T.astype(np.float64) @ pair.b.T.astype(np.float64))

        h = norm(x, f"model.layers.{layer}.input_layernorm.weight")
        q, k, v = (
            linear(h, f"self_attn.{p}_proj").reshape(len(TOKENS), heads, WIDTH)
            for p, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        k, v = (np.repeat(part, HEADS // KV_HEADS, axis=1) for part in (turned(k), v))
        scores = np.einsum("qhd,khd->hqk", turned(q), k) / np.sqrt(WIDTH)
        scores += np.where(positions[:, None] >= positions, 0, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(len(TOKENS), HIDDEN)
        x = x + linear(mixed, "self_attn.o_proj")
        h = norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    return np.asarray(norm(x, "model.norm.weight")[-1] @ weight("model.embed_tokens.weight", (96, HIDDEN)).T)


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), *((target,) for target in ALL)], ids="+".join)
def test_numbers_are_those_of_the_book(targets: Sequence[str]) -> None:
    layers = range(1, 3)
    expected = reference({layer: random_pairs(1, layer, targets) for layer in layers})
    assert np.abs(expected - reference({})).max() > 0.05, "an adapter that changes nothing shows nothing"
    stage = stage_of("fp32")
    np.testing.assert_allclose(logits(stage, factors(stage, 1, targets, layers))[0], expected, atol=2e-5)


@pytest.mark.parametrize("variant", ["int8", "int4"])
@pytest.mark.parametrize("targets", [ALL, *((target,) for target in ALL)], ids="+".join)
def test_quantised_products_take_each_part_in_its_columns(variant: str, targets: Sequence[str]) -> None:
    """The kernels round what goes in to 8 bits, which random layers amplify: the change that an adapter makes is met
    more or less. In other columns it would be another change altogether."""
    stage, read = stage_of(variant), stored(variant)
    pairs = {layer: random_pairs(1, layer, targets) for layer in range(LAYERS)}
    ours = (logits(stage, factors(stage, 1, targets)) - logits(stage, {}))[0]
    theirs = reference(pairs, read) - reference({}, read)
    assert np.linalg.norm(ours - theirs) < 0.4 * np.linalg.norm(theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_an_adapter_all_bits_are_those_of_the_plain_graph(variant: str) -> None:
    plain = stage_of(variant)
    expected = logits(plain, {})
    stage = stage_of(variant)
    before = stage.open(0, LAYERS, 32)
    changed = logits(stage, factors(stage, 1))
    assert np.abs(changed - expected).max() > 0.05
    np.testing.assert_array_equal(logits(stage, {}), expected)
    np.testing.assert_array_equal(before.run(0, TOKENS, prefill=True, wanted=True), expected[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_session_goes_on_while_another_adapter_comes(variant: str) -> None:
    """The graph is opened anew under a session that runs; its next step has the numbers of an undisturbed one."""
    stage, quiet = stage_of(variant), stage_of(variant)
    expected = logits(quiet, factors(quiet, 1, ("q_proj",)))
    track = stage.open(0, LAYERS, 32, factors(stage, 1, ("q_proj",)))
    np.testing.assert_array_equal(track.run(0, TOKENS, prefill=True, wanted=True), expected[0])
    other = factors(stage, 2, ("down_proj", "gate_proj"))
    np.testing.assert_array_equal(track.run(len(TOKENS), TOKENS[:1], prefill=False, wanted=True), expected[1])
    assert np.abs(logits(stage, other) - expected).max() > 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_cut_gives_the_same_numbers(variant: str) -> None:
    stage = stage_of(variant)
    given = factors(stage, 3)
    expected = logits(stage, given)
    np.testing.assert_array_equal(logits(stage, given, cuts=(0, 1, 3, LAYERS)), expected)
    chain = [stage_of(variant, a, b) for a, b in pairwise((0, 1, 3, LAYERS))]
    x: Array = TOKENS
    for part, (first, last) in zip(chain, pairwise((0, 1, 3, LAYERS)), strict=True):
        own = factors(part, 3, layers=range(first, last))
        x = part.open(first, last, 32, own).run(0, x, prefill=True, wanted=True).copy()
    np.testing.assert_array_equal(x, expected[0])


# ---------------------------------------------------------------- sessions


def sessions_of(**limits: Any) -> Sessions:
    load = load_request(tiny_models()["int4"].spec(0, LAYERS))
    return Sessions(stage_of("int4"), dataclasses.replace(load, **limits))


def loaded(sessions: Sessions, spec: AdapterSpec) -> None:
    sessions.adapters.announce(adapt_request(spec))
    for layer, path in spec.layers.items():
        sessions.adapters.fill(spec.name, layer, path.read_bytes())


def opened(sessions: Sessions, name: bytes, adapter: str) -> None:
    sessions.open(
        name, first=0, last=LAYERS, capacity=64, sampling=None, prompt=np.zeros(0, np.int32), adapter=adapter
    )


def answers(sessions: Sessions, names: Sequence[bytes], count: int = 12) -> dict[bytes, list[int]]:
    """Greedy tokens of open sessions, a step of each in turn."""
    rows: dict[bytes, Array] = dict.fromkeys(names, TOKENS)
    out: dict[bytes, list[int]] = {name: [] for name in names}
    position = 0
    for turn in range(count):
        for name in names:
            token = sessions.step(
                name,
                position=position,
                rows=len(rows[name]),
                body=rows[name].tobytes(),
                sample_after=True,
                prefill=not turn,
            ).token
            assert token is not None
            out[name].append(token)
        position += len(rows[names[0]])
        rows = {name: np.array(out[name][-1:], np.int32) for name in names}
    return out


def test_sessions_with_several_adapters_take_turns(tmp_path: Path) -> None:
    specs = [written(tmp_path, f"adapter {seed}", seed, 0, LAYERS) for seed in (1, 2)]
    names = [b"none", b"first", b"second"]
    alone = {}
    for name, adapter in zip(names, ("", "adapter 1", "adapter 2"), strict=True):
        sessions = sessions_of()
        for spec in specs:
            loaded(sessions, spec)
        opened(sessions, name, adapter)
        alone |= answers(sessions, [name])
    assert len({tuple(answer) for answer in alone.values()}) == 3
    sessions = sessions_of()
    for spec in specs:
        loaded(sessions, spec)
    for name, adapter in zip(names, ("", "adapter 1", "adapter 2"), strict=True):
        opened(sessions, name, adapter)
    sessions.adapters.drop("adapter 1")  # its session keeps it
    loaded(sessions, written(tmp_path / "new", "adapter 2", 7, 0, LAYERS))  # and that one keeps the one before
    assert answers(sessions, names) == alone
    with pytest.raises(Declined, match="not loaded here"):
        opened(sessions, b"late", "adapter 1")


def test_what_adapters_take_counts(tmp_path: Path) -> None:
    spec = written(tmp_path, "a", 1, 0, LAYERS)
    sessions = sessions_of()
    loaded(sessions, spec)
    size = sessions.adapters.nbytes
    assert size >= LAYERS * RANK * 4 * sum(a + b for a, b in WIDTHS.values())
    load = load_request(tiny_models()["int4"].spec(0, LAYERS))
    keys = kv_bytes(load, 0, LAYERS, 64)
    sessions = sessions_of(max_kv_bytes=size + keys)
    loaded(sessions, spec)
    opened(sessions, b"one", "a")
    with pytest.raises(Declined, match="taken by sessions and adapters") as refused:
        opened(sessions, b"two", "")
    assert refused.value.code == "busy"
    other = dataclasses.replace(spec, name="b")
    with pytest.raises(Declined, match="Layer 0 of the adapter needs") as refused:
        loaded(sessions, other)
    assert refused.value.code == "busy" and refused.value.retry_ms
    sessions.adapters.drop("a")
    assert sessions.adapters.nbytes == size, "a session still runs with it"
    sessions.close(b"one")
    assert sessions.adapters.nbytes == 0
    loaded(sessions, other)


def test_an_adapter_that_is_not_whole_is_not_used(tmp_path: Path) -> None:
    spec = written(tmp_path, "a", 1, 1, 3)
    sessions = sessions_of()
    sessions.adapters.announce(adapt_request(spec))
    sessions.adapters.fill("a", 1, spec.layers[1].read_bytes())
    with pytest.raises(Declined, match="Layer 2 of the adapter a has not come") as refused:
        opened(sessions, b"s", "a")
    assert refused.value.code == "fenced"
    for layer in (0, 3):
        with pytest.raises(Declined, match="was not announced"):
            sessions.adapters.fill("a", layer, spec.layers[1].read_bytes())
    sessions.adapters.fill("a", 2, spec.layers[2].read_bytes())
    opened(sessions, b"s", "a")


def test_too_many(tmp_path: Path) -> None:
    spec = written(tmp_path, "a", 1, 0, 1)
    sessions = sessions_of()
    for number in range(8):
        loaded(sessions, dataclasses.replace(spec, name=str(number)))
    with pytest.raises(Declined, match="8 adapters already") as refused:
        loaded(sessions, spec)
    assert refused.value.code == "busy"
    loaded(sessions, dataclasses.replace(spec, name="3"))  # takes the place of its namesake


def foreign(target: str, inputs: int, outputs: int) -> bytes:
    return write_layer({target: Pair(np.ones((RANK, inputs), np.float32), np.ones((outputs, RANK), np.float32))})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"nonsense", "file of layer 0 of the adapter can't be used: it is no safetensors file"),
        (
            foreign("q_proj", 64, 100),
            "a matrix with 64 inputs and 100 outputs; in the graph of this model it has 64 and 64",
        ),
        (foreign("q_proj", 32, 64), "32 inputs"),
        (foreign("v_proj", 64, 32), "lacks or has too much: q_proj, v_proj"),
        (write_layer(random_pairs(1, 0, ("q_proj",), rank=2)), "not of rank 4"),
    ],
)
def test_files_of_another_model(tmp_path: Path, content: bytes, words: str) -> None:
    sessions = sessions_of()
    sessions.adapters.announce(adapt_request(written(tmp_path, "a", 1, 0, 1, ("q_proj",))))
    with pytest.raises(Declined, match=words) as refused:
        sessions.adapters.fill("a", 0, content)
    assert refused.value.code == "bad-adapter"
    opened(sessions, b"s", "")


def test_a_graph_without_such_a_layer(tmp_path: Path) -> None:
    spec = dataclasses.replace(written(tmp_path, "a", 1, 0, 2, ("q_proj",)), targets=("q_proj", "w_proj"))
    sessions = sessions_of()
    with pytest.raises(Declined, match="no w_proj in layer 0") as refused:
        sessions.adapters.announce(adapt_request(spec))
    assert refused.value.code == "bad-adapter"
    with pytest.raises(Declined, match="holds the layers 0 to 3; an adapter comes for 0 to 4"):
        sessions.adapters.announce(adapt_request(dataclasses.replace(spec, last=5)))
