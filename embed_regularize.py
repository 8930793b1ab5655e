"""Embedding dropout: whole words vanish from the embedding for the length of one batch.

Gal and Ghahramani 2016 (1512.05287); section 4.3 of Merity et al. 2017 (1708.02182).
"""

from torch.nn import functional as F


def embedded_dropout(embed, words, dropout=0.1, scale=None):
    """Looks `words` up in `embed` (an nn.Embedding [V, E]) with rows dropped at rate `dropout`.

    words [...] int64 -> [..., E]. A dropped word is zero wherever it occurs in the batch; the
    others are scaled by 1 / (1 - dropout). `scale` [V, 1], where given, multiplies each row too.
    The caller passes dropout 0 in evaluation.
    """
    embedded = F.embedding(
        words, embed.weight, embed.padding_idx, embed.max_norm, embed.norm_type,
        embed.scale_grad_by_freq, embed.sparse,
    )
    # (mask * W)[words] = mask[words] * W[words]: one number a word, not a masked copy of W.
    if dropout:
        mask = embed.weight.new_empty(embed.weight.size(0), 1).bernoulli_(1 - dropout)
        embedded = embedded * mask.div_(1 - dropout)[words]
    if scale is not None:
        embedded = embedded * scale[words]
    return embedded
