"""From logits to tokens: the sampler, penalties and sampling over a split vocabulary."""
