"""GEMMs, embedding lookup, RMSNorm and the gated activation."""
