"""Embedding dropout: words are dropped from the embedding for one batch.

Gal and Ghahramani 2016 (1512.05287); section 4.3 of Merity et al. 2017 (1708.02182).
"""

def embedded_dropout(embed, words, dropout=0.1, scale=None):
    """Looks up `words` in `embed` (an nn.Embedding [V, E]) with rows dropped at rate `dropout`.

    words [...] int64 -> [..., E]. A dropped word is zero everywhere in the batch; the others are
    scaled by 1 / (1 - dropout). `scale` [V, 1], if given, also multiplies each row. In evaluation
    the caller passes `dropout` 0.
    """
    embedded = embed(words)
    # (mask * W)[words] = mask[words] * W[words], which needs no masked copy of W.
    if dropout:
        mask = embed.weight.new_empty(embed.weight.size(0), 1).bernoulli_(1 - dropout)
        embedded = embedded * mask.div_(1 - dropout)[words]
    if scale is not None:
        embedded = embedded * scale[words]
    return embedded
