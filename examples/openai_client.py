"""Stream a completion and a chat answer from a running server, with OpenAI's own client.

    shoal serve tiny                          # in one terminal
    python examples/openai_client.py          # in another

The server is found by OPENAI_BASE_URL (http://127.0.0.1:8000/v1), and its key by OPENAI_API_KEY.
"""

from __future__ import annotations

import os

from openai import OpenAI


def complete(client: OpenAI, model: str) -> None:
    """Continue a piece of code, token by token."""
    prompt = "def read_lines(path):\n"
    print(prompt, end="")
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=64, temperature=0.3, seed=0, stop=["\n\n\n"], stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print("\n")


def chat(client: OpenAI, model: str) -> None:
    """Ask for an answer and show what it took."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Write a function that adds two numbers."}],
        max_tokens=64,
        temperature=0.3,
        seed=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage is not None:
            print(f"\n[{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]")


def main() -> None:
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    model = client.models.list().data[0].id
    complete(client, model)
    chat(client, model)


if __name__ == "__main__":
    main()
