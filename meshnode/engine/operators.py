"""Which operators a graph may use, and which of their attributes: everything else is refused (`graph_check.py`).

Listed is arithmetic on tensors: what the publisher's graphs are made of, and its plain relatives. Left out:

- `If`, `Loop`, `Scan`, `SequenceMap`: they hold graphs of their own, and a loop may run for ever. No model needs one.
- `ConstantOfShape`, `Range`, `Tile`, `OneHot`, `EyeLike`, `Pad`, `Resize`: one number makes them allocate any amount.
  `Expand` does so too and is listed, because masks are made with it; so does a product of two long vectors. What
  bounds them all is the memory limit of the engine process.
- Random numbers: stages must agree on every value. Strings, sequences, optionals, images, regular expressions: a
  language model has none. `sparse_value` of `Constant`: a second way to say the same.
- Weights that are laid out for a kernel in advance (`weight_prepacked`): the kernel trusts their layout.

An attribute is written `name:type`. Whoever adds a family adds what its graph needs, if it is of this kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

STANDARD, CONTRIB = "", "com.microsoft"

_REDUCE: Final = "axes:ints keepdims:int noop_with_empty_axes:int"

_STANDARD: Final = f"""
Abs
Acos
Acosh
Add
And
ArgMax axis:int keepdims:int select_last_index:int
ArgMin axis:int keepdims:int select_last_index:int
Asin
Asinh
Atan
Atanh
Attention is_causal:int kv_num_heads:int q_num_heads:int qk_matmul_output_mode:int scale:float softcap:float \
softmax_precision:int
BitShift direction:string
BitwiseAnd
BitwiseNot
BitwiseOr
BitwiseXor
Cast to:int saturate:int round_mode:string
CastLike saturate:int round_mode:string
Ceil
Celu alpha:float
Clip
Concat axis:int
Constant value:tensor value_float:float value_floats:floats value_int:int value_ints:ints
Cos
Cosh
CumSum exclusive:int reverse:int
DequantizeLinear axis:int block_size:int output_dtype:int
Div
DynamicQuantizeLinear
Elu alpha:float
Equal
Erf
Exp
Expand
Flatten axis:int
Floor
Gather axis:int
GatherElements axis:int
GatherND batch_dims:int
Gelu approximate:string
Gemm alpha:float beta:float transA:int transB:int
Greater
GreaterOrEqual
GroupNormalization epsilon:float num_groups:int stash_type:int
HardSigmoid alpha:float beta:float
HardSwish
Hardmax axis:int
Identity
InstanceNormalization epsilon:float
IsInf detect_negative:int detect_positive:int
IsNaN
LayerNormalization axis:int epsilon:float stash_type:int
LeakyRelu alpha:float
Less
LessOrEqual
Log
LogSoftmax axis:int
LpNormalization axis:int p:int
MatMul
MatMulInteger
Max
Mean
MeanVarianceNormalization axes:ints
Min
Mish
Mod fmod:int
Mul
Neg
NonZero
Not
Or
PRelu
Pow
QuantizeLinear axis:int block_size:int output_dtype:int precision:int saturate:int
RMSNormalization axis:int epsilon:float stash_type:int
Reciprocal
ReduceL1 {_REDUCE}
ReduceL2 {_REDUCE}
ReduceLogSum {_REDUCE}
ReduceLogSumExp {_REDUCE}
ReduceMax {_REDUCE}
ReduceMean {_REDUCE}
ReduceMin {_REDUCE}
ReduceProd {_REDUCE}
ReduceSum {_REDUCE}
ReduceSumSquare {_REDUCE}
Relu
Reshape allowzero:int
RotaryEmbedding interleaved:int num_heads:int rotary_embedding_dim:int
Round
ScatterElements axis:int reduction:string
ScatterND reduction:string
Selu alpha:float gamma:float
Shape end:int start:int
Sigmoid
Sign
SimplifiedLayerNormalization axis:int epsilon:float stash_type:int
Sin
Sinh
Size
Slice
Softmax axis:int
Softplus
Softsign
Split axis:int num_outputs:int
Sqrt
Squeeze
Sub
Sum
Swish alpha:float
Tan
Tanh
ThresholdedRelu alpha:float
TopK axis:int largest:int sorted:int
Transpose perm:ints
Trilu upper:int
Unsqueeze
Where
Xor
"""

_CONTRIB: Final = """
BiasGelu
FastGelu
FusedMatMul alpha:float transA:int transB:int transBatchA:int transBatchB:int
GatherBlockQuantized bits:int block_size:int gather_axis:int quantize_axis:int
Gelu
GroupQueryAttention causal:int do_rotary:int kv_num_heads:int local_window_size:int num_heads:int qk_output:int \
rotary_embedding_dim:int rotary_interleaved:int scale:float smooth_softmax:int softcap:float
MatMulNBits K:int N:int accuracy_level:int bits:int block_size:int
MoE activation_alpha:float activation_beta:float activation_type:string k:int normalize_routing_weights:int \
swiglu_fusion:int swiglu_limit:float use_sparse_mixer:int
MultiHeadAttention mask_filter_value:float num_heads:int scale:float unidirectional:int
QMoE accuracy_level:int activation_alpha:float activation_beta:float activation_type:string block_size:int \
expert_weight_bits:int k:int normalize_routing_weights:int quant_type:string swiglu_fusion:int swiglu_limit:float \
use_sparse_mixer:int
QuickGelu alpha:float
RotaryEmbedding interleaved:int is_packed_batching:int num_heads:int rotary_embedding_dim:int scale:float
SkipLayerNormalization epsilon:float
SkipSimplifiedLayerNormalization epsilon:float
"""


def _table(text: str) -> dict[str, dict[str, str]]:
    rows = (line.split() for line in text.split("\n") if line)
    return {name: dict(_pair(word) for word in attributes) for name, *attributes in rows}


def _pair(word: str) -> tuple[str, str]:
    name, _, kind = word.partition(":")
    return name, kind


# domain -> operator -> attribute -> its type
OPERATORS: Final[Mapping[str, Mapping[str, Mapping[str, str]]]] = {
    STANDARD: _table(_STANDARD),
    CONTRIB: _table(_CONTRIB),
}
# domain -> versions of its operator set: those that the kernels of our ONNX Runtime have
VERSIONS: Final[Mapping[str, range]] = {STANDARD: range(13, 27), CONTRIB: range(1, 2)}
