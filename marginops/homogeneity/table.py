"""The rule of each ATen operation."""

from . import rules
from .rules import Rule

KEEP = """
    abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d alias amax
    amin aminmax as_strided avg_pool1d avg_pool2d avg_pool3d broadcast_to channel_shuffle chunk
    clone col2im contiguous cummax cummin cumsum detach diag diag_embed diagonal diff dropout
    expand feature_dropout flatten flip fliplr flipud fractional_max_pool2d im2col kthvalue
    leaky_relu lift_fresh lift_fresh_copy max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d max_unpool3d mean
    median mode movedim msort nanmean nanmedian nansum narrow native_dropout neg permute
    pixel_shuffle pixel_unshuffle positive ravel reflection_pad1d reflection_pad2d
    reflection_pad3d relu repeat repeat_interleave replication_pad1d replication_pad2d
    replication_pad3d reshape resolve_conj resolve_neg roll rot90 rrelu select slice sort split
    split_with_sizes squeeze std std_mean sum swapaxes swapdims t tile topk trace transpose tril
    triu unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze
    _unsafe_view upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_trilinear3d view
"""

LOOK_UP = """
    embedding gather index index_select masked_select take take_along_dim _unsafe_index
"""

CHOOSE = """
    argmax argmin argsort count_nonzero empty_like isfinite isinf isnan new_empty new_ones
    ones_like rand_like randn_like sgn sign signbit sym_numel sym_size sym_stride
"""

NORMALIZE = """
    batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _native_batch_norm_legit_functional cudnn_batch_norm _batch_norm_with_update layer_norm
    native_layer_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm
"""

CAST = "to _to_copy"

EQUAL = {
    "self other": "add sub rsub max min maximum minimum fmax fmin where gt ge lt le eq ne",
    "tensors": "cat concat concatenate stack hstack vstack dstack column_stack row_stack",
    "self value": "masked_fill index_fill",
    "self source": "masked_scatter index_add index_copy",
    "self src": "slice_scatter select_scatter diagonal_scatter as_strided_scatter scatter_add",
    "self values": "index_put",
    "src": "copy",
}

PRODUCT = {
    "self other": "mul vdot inner matmul kron linalg_cross cross tensordot",
    "self mat2": "mm bmm",
    "self tensor": "dot",
    "x y": "linalg_vecdot",
    "self vec": "mv",
    "self vec2": "outer ger",
    "tensors": "einsum linalg_multi_dot",
    "matrices": "chain_matmul",
}

AFFINE = {
    "input weight": """linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d
        conv_transpose3d convolution""",
    "input1 input2 weight": "bilinear",
}

ADDED = {
    "mat1 mat2": "addmm",
    "batch1 batch2": "addbmm baddbmm",
    "mat vec": "addmv",
    "vec1 vec2": "addr",
    "tensor1 tensor2": "addcmul",
}

# Operations that are never quasi-homogeneous. An operation that is in no list has no rule yet.
NEVER = """
    acos acosh asin asinh atan atanh atan2 celu cos cosh elu erf erfc exp exp2 expm1 gelu glu
    hardsigmoid hardswish hardtanh log log10 log1p log2 log_sigmoid log_softmax _log_softmax
    logaddexp logsumexp mish relu6 selu sigmoid silu sin sinc sinh softmax _softmax softplus
    softshrink hardshrink tan tanh xlogy round floor ceil trunc scaled_dot_product_attention
    lstm gru rnn_tanh
"""


def _table() -> dict[str, Rule]:
    table: dict[str, Rule] = {}

    def follow(rule: Rule, names: str) -> None:
        table.update(dict.fromkeys(names.split(), rule))

    follow(rules.keep, KEEP)
    follow(rules.look_up, LOOK_UP)
    follow(rules.choose, CHOOSE)
    follow(rules.normalization, NORMALIZE)
    follow(rules.zeros, "zeros zeros_like new_zeros")
    follow(rules.filled, "full full_like new_full fill")
    follow(rules.bounded, "clamp clamp_min clamp_max clip")
    follow(rules.threshold, "threshold")
    follow(rules.padded, "pad constant_pad_nd")
    follow(rules.cast, CAST)
    follow(rules.normed(rules.keep), "linalg_vector_norm norm")
    follow(rules.normed(rules.equal("self", "other")), "dist")
    follow(rules.normed(rules.equal("x1", "x2")), "cdist")
    follow(rules.parametric_relu, "prelu _prelu_kernel")
    follow(rules.interpolation("self", "end", "weight"), "lerp")
    follow(rules.interpolation("input", "grid"), "grid_sampler grid_sampler_2d grid_sampler_3d")
    follow(rules.scattered, "scatter")
    follow(rules.quotient, "div divide true_divide")
    follow(rules.scaled(-1), "reciprocal")
    follow(rules.scaled(0.5), "sqrt")
    follow(rules.scaled(-0.5), "rsqrt")
    follow(rules.scaled(2), "square var")
    follow(rules.variance_and_mean, "var_mean")
    follow(rules.power, "pow")
    follow(rules.product_of_elements, "prod")
    follow(rules.cosine, "cosine_similarity")
    follow(rules.weight_normalization, "_weight_norm _weight_norm_interface")
    follow(rules.product("weight", "per_sample_weights"), "embedding_bag _embedding_bag")
    for operands, names in EQUAL.items():
        follow(rules.equal(*operands.split()), names)
    for operands, names in PRODUCT.items():
        follow(rules.product(*operands.split()), names)
    for operands, names in AFFINE.items():
        follow(rules.product(*operands.split(), plus="bias"), names)
    for operands, names in ADDED.items():
        follow(rules.product(*operands.split(), plus="self"), names)
    return table


RULES = _table()
UNSCALED = frozenset(NEVER.split())
# Operations on parameters whose results are views or sums of these parameters.
CARRYING = frozenset(f"{KEEP} {LOOK_UP} {CAST} {' '.join(EQUAL.values())}".split())
# Operations that create constants, which may be 0.
CREATING = frozenset(["zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full"])
