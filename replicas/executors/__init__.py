"""Executors: run plans in the caller's thread, or in one process per rank."""
