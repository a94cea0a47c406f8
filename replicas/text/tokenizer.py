"""Tokenizer and chat templates without torch.

`transformers.AutoTokenizer` imports torch (0.5 GB and 3 s). `tokenizers` reads the fast tokenizer's
file instead, and transformers' own rendering function, which needs no torch, renders the template.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from ..errors import ModelError, RequestError
from .detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer

# A template repeats messages only a few times; more is a runaway template.
_MAX_RENDERED_CHARS = 32 << 20
# Exceptions of code in a template, beside jinja's own.
_TEMPLATE_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Tokenizer:
    """The tokenizer of one model folder. Thread-safe."""

    def __init__(self, fast: FastTokenizer, *, settings: Mapping[str, Any], chat_template: str | None) -> None:
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self.settings = dict(settings)  # tokenizer_config.json
        self.chat_template = chat_template
        self.vocab_size = fast.get_vocab_size(with_added_tokens=True)
        self._special_ids = frozenset(i for i, token in fast.get_added_tokens_decoder().items() if token.special)
        self._bytes = _byte_table(fast)
        self._shown_bytes = self._bytes and [
            b"" if i in self._special_ids else raw for i, raw in enumerate(self._bytes)
        ]

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises ModelError naming the file."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{path} does not exist; a tokenizer of another form is converted with "
                "transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"
            )
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ModelError(f"{path} is not a tokenizer: {error}") from error
        settings = _read_settings(folder / "tokenizer_config.json")
        return cls(fast, settings=settings, chat_template=_read_chat_template(folder, settings))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._fast.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [e.ids for e in self._fast.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        table = self._shown_bytes if skip_special_tokens else self._bytes
        if table is not None:
            return ByteDetokenizer(table)
        return WindowDetokenizer(lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; partial characters if the vocabulary is byte-level."""
        if self._bytes is not None:
            return self._bytes[token_id] if token_id < len(self._bytes) else b""
        return self.token_text(token_id).encode()

    def token_text(self, token_id: int) -> str:
        """One token as text; incomplete characters become replacement characters."""
        if self._bytes is not None:
            return self.token_bytes(token_id).decode("utf-8", "replace")
        return self.decode((token_id,), skip_special_tokens=False)

    def token_name(self, token_id: int) -> str:
        return self._fast.id_to_token(token_id) or ""

    def prepare_chat(self) -> None:
        """Import the template renderer in advance: it takes a second, which would block every stream of the process."""
        if self.chat_template is not None:
            importlib.import_module("transformers.utils.chat_template_utils")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Render `messages` with the model's chat template, in jinja's sandbox. Special
        tokens are in the text.

        Raises RequestError if the model has no template, or it rejects the messages.
        """
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions, or add chat_template.jinja to its folder",
                param="messages",
            )
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **self._special_token_texts(),
                **variables,
            )
        except (*_TEMPLATE_FAILURES, TemplateError) as error:
            reason = f"{type(error).__name__}: {error}" if isinstance(error, _TEMPLATE_FAILURES) else error
            raise RequestError(f"the chat template refuses these messages: {reason}", param="messages") from error
        if len(rendered[0]) > _MAX_RENDERED_CHARS:
            raise RequestError(
                f"the rendered chat has {len(rendered[0])} characters; the limit is {_MAX_RENDERED_CHARS}",
                param="messages",
            )
        return rendered[0]

    def _special_token_texts(self) -> dict[str, str]:
        texts = {}
        for name, value in self.settings.items():
            if name.endswith("_token"):
                content = value.get("content") if isinstance(value, dict) else value
                if isinstance(content, str):
                    texts[name] = content
        return texts


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} holds no JSON object")
    return settings


def _read_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the entry of tokenizer_config.json (its `default` if named)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _byte_table(fast: FastTokenizer) -> list[bytes] | None:
    """The bytes of every token of a byte-level vocabulary; None for others.

    Bytes are printable characters (GPT-2's table). A token with other characters stays as it
    is; `tokenizers` decodes by this rule, added tokens included.
    """
    decoder = json.loads(fast.to_str())["decoder"]
    if not decoder or decoder["type"] != "ByteLevel":
        return None
    byte_of = _byte_of_character()
    table = []
    for token_id in range(1 + max(fast.get_vocab(with_added_tokens=True).values())):
        spelled = fast.id_to_token(token_id) or ""
        if all(character in byte_of for character in spelled):
            table.append(bytes([byte_of[character] for character in spelled]))
        else:
            table.append(spelled.encode())
    return table


def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the rest from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table
