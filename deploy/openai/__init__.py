"""The OpenAI protocol over HTTP: bodies, answers, streams, keys and errors."""
