"""From logits to tokens: sampler, penalties and sampling over a split vocabulary."""
