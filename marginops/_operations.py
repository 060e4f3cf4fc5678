"""What operations do with the scale of their first operand, by their names in PyTorch.

An operation has a name in ATen, and some have another one in ``torch.nn.functional``. Norms judge
a model by these names, and rates are computed by the rules for them.
"""

import re

# Multiplying the operand by c > 0 multiplies the result by c.
KEEPING = """
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

# The scale of the operand has no effect on the result, up to a small eps.
NORMALIZING = """
    batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _native_batch_norm_legit_functional cudnn_batch_norm _batch_norm_with_update layer_norm
    native_layer_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm normalize
"""

# The result is multiplied by this power of c.
POWERS = {"reciprocal": -1.0, "sqrt": 0.5, "rsqrt": -0.5, "square": 2.0, "var": 2.0}

# The result is not multiplied by a power of c.
NEVER = """
    acos acosh asin asinh atan atanh atan2 celu cos cosh elu erf erfc exp exp2 expm1 gelu glu
    hardsigmoid hardswish hardtanh log log10 log1p log2 log_sigmoid log_softmax _log_softmax
    logaddexp logsumexp mish relu6 selu sigmoid silu sin sinc sinh softmax _softmax softplus
    softshrink hardshrink tan tanh xlogy round floor ceil trunc scaled_dot_product_attention
    lstm gru rnn_tanh softsign softmin gumbel_softmax tanhshrink special_expit
    local_response_norm cross_map_lrn fake_quantize_per_tensor_affine
    fake_quantize_per_channel_affine
"""


def _key(name: str) -> str:
    return re.sub("[123]d$", "", name).replace("_", "").lower()


# For these, other arguments decide: the exponent, the constants that are written, the other vector.
_BY_ARGUMENT = ("pow", "threshold", "constant_pad", "cosine_similarity")
_CHANGING = {_key(name) for name in (*f"{NORMALIZING} {NEVER}".split(), *POWERS, *_BY_ARGUMENT)}


def changes_scale(name: str) -> bool:
    """Whether multiplying the operand by c > 0 may not multiply the result by c.

    Args:
        name: The name of a function, of a method, or of a class of ``torch.nn``, such as ``gelu``,
            ``tanh_`` or ``Softmax2d``. An operation that is not known does not change the scale.
    """
    return _key(name) in _CHANGING
