"""Small random checkpoints, and running a published graph whole or in pieces without the engine."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir

from meshnode.engine.graph_file import read_graph
from meshnode.engine.rotary import is_placeholder, parse
from meshnode.engine.runtime import ort as onnxruntime
from meshnode.publisher.expression import Array
from meshnode.publisher.publish import publish

LAYERS = 4
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def byte_tokenizer() -> str:
    """tokenizer.json with one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str())


def random_checkpoint(folder: Path, model_type: str, **settings: Any) -> Any:
    """Save a small random model as Hugging Face does; gives the model."""
    import torch
    import transformers

    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(model_type, **{**SHAPE, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # as built, they are all ones and zeros and could be mixed up
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(str(folder))
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return model


def whole_model(source: str) -> Any:
    """A checkpoint as one transformers model in float32."""
    import torch
    import transformers

    from meshnode.publisher.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source)
    fields = {k: v for k, v in checkpoint.config.items() if k not in ("model_type", "dtype", "torch_dtype")}
    config = transformers.AutoConfig.for_model(checkpoint.config["model_type"], **fields)
    state = {name: torch.from_numpy(np.array(checkpoint.tensor(name))) for name in checkpoint.names()}
    kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()


def published(source: Path | str, out: Path, *variants: str) -> dict[str, Any]:
    """Publish in this process; gives index.json."""
    publish(str(source), out, variants, lambda *_: None)
    index = json.loads((out / "index.json").read_text())
    assert isinstance(index, dict)
    return index


class Pieces:
    """One variant, cut at some layers, with one KV buffer per layer that the kernels write in place."""

    def __init__(self, folder: Path, variant: str, cuts: tuple[int, ...], *, level: str = "ALL") -> None:
        index = json.loads((folder / "index.json").read_text())
        self._folder = folder
        self._entry = index["variants"][variant]
        facts = index["architecture"]
        self.layers, self._heads, self._width = facts["layers"], facts["kv_heads"], facts["head_dim"]
        self._capacity = min(facts["context"], 1024)
        self._level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        self._keep: list[Any] = []  # the mapped weights, as long as the sessions live
        self._stages = [(self._open(a, b), a, b) for a, b in pairwise((0, *cuts, self.layers))]
        self.reset()

    def _open(self, first: int, last: int) -> Any:
        model = onnx_ir.from_proto(read_graph(self._folder / self._entry["graph"]["path"]))
        inputs = ["input_ids" if first == 0 else f"hidden_states.{first - 1}"]
        inputs += [i.name for i in model.graph.inputs if i.name in ("attention_mask", "position_ids")]
        outputs = ["logits" if last == self.layers else f"hidden_states.{last - 1}"]
        for layer in range(first, last):
            inputs += [f"past_key_values.{layer}.{x}" for x in ("key", "value")]
            outputs += [f"present.{layer}.{x}" for x in ("key", "value")]
        part = onnx_ir.convenience.extract(model.graph, inputs, outputs)
        proto = onnx_ir.to_proto(onnx_ir.Model(part, ir_version=model.ir_version))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.graph_optimization_level = self._level
        names, values = [], []
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                names.append(tensor.name)
                values.append(onnxruntime.OrtValue.ortvalue_from_numpy(self._bytes(tensor)))
        self._keep += values
        options.add_external_initializers(names, values)
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _bytes(self, tensor: onnx.TensorProto) -> Array:
        if is_placeholder(tensor):
            return parse(tensor).table()
        external = {e.key: e.value for e in tensor.external_data}
        group = external["location"]
        layer = group.removeprefix("layer.")
        entry = self._entry["layers"][int(layer)] if layer != group else self._entry[group]
        kind = {onnx.TensorProto.FLOAT: "<f4", onnx.TensorProto.UINT8: "u1"}[tensor.data_type]
        offset, length = int(external["offset"]), int(external["length"])
        assert offset % 64 == 0
        raw = np.memmap(self._folder / entry["path"], np.uint8, "r", offset, (length,))
        return np.ascontiguousarray(raw).view(kind).reshape(tuple(tensor.dims))

    def reset(self) -> None:
        """Forget everything: fresh KV buffers."""
        shape = (1, self._heads, self._capacity, self._width)
        self._bindings = []
        for session, first, last in self._stages:
            binding = session.io_binding()
            for layer in range(first, last):
                for x in ("key", "value"):
                    buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                    binding.bind_ortvalue_input(f"past_key_values.{layer}.{x}", buffer)
                    binding.bind_ortvalue_output(f"present.{layer}.{x}", buffer)
            self._bindings.append(binding)

    def step(self, tokens: list[int], position: int) -> Array:
        """Logits [rows, vocabulary] of the tokens at `position`."""
        x: Array = np.array([tokens], np.int64)
        rows = len(tokens)
        for (session, first, last), binding in zip(self._stages, self._bindings, strict=True):
            binding.bind_cpu_input("input_ids" if first == 0 else f"hidden_states.{first - 1}", x)
            binding.bind_cpu_input("attention_mask", np.ones((1, position + rows), np.int64))
            if any(i.name == "position_ids" for i in session.get_inputs()):
                binding.bind_cpu_input("position_ids", np.arange(position, position + rows, dtype=np.int64)[None])
            binding.bind_output("logits" if last == self.layers else f"hidden_states.{last - 1}")
            session.run_with_iobinding(binding)
            x = binding.get_outputs()[-1].numpy()
        return x[0]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The most likely token, `count` times."""
        self.reset()
        tokens = list(prompt)
        logits = self.step(tokens, 0)
        while True:
            tokens.append(int(logits[-1].argmax()))
            if len(tokens) == len(prompt) + count:
                return tokens[len(prompt) :]
            logits = self.step(tokens[-1:], len(tokens) - 1)


def reference_logits(model: Any, tokens: list[int]) -> Array:
    """Logits of transformers, [rows, vocabulary]."""
    import torch

    with torch.inference_mode():
        return np.asarray(model(torch.tensor([tokens])).logits[0].numpy())


def reference_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of transformers' own `generate`, not stopped by an end token."""
    import torch

    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
        )
    return [int(t) for t in out[0, len(prompt) :]]
