"""Tokenizer, chat template and incremental detokenizer; no torch."""
