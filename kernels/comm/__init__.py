"""All-reduce over symmetric memory."""
