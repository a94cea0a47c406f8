"""Tokens to text and back, piece by piece, against the whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from shoal.replicas.errors import ModelError, RequestError
from shoal.replicas.text.detokenizer import ByteDetokenizer, Detokenizer, StopStrings, WindowDetokenizer
from shoal.replicas.text.tokenizer import Tokenizer
from tests.support.text_model import write_tokenizer

MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hé 🐟"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """Llama 2's kind: words with a mark for the space before them, and a token for every byte."""
    words = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁hello", "▁fish", "s", "🐟", "é", "▁"]
    fast = FastTokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    fast.add_special_tokens([AddedToken("</s>", special=True)])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(fast, settings={}, chat_template=None)


def in_pieces(detokenizer: Detokenizer, tokens: list[int], cuts: list[int]) -> str:
    """The text of tokens that are fed in groups, cut at `cuts`."""
    edges = [0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]
    pieces = [detokenizer.feed(tokens[a:b]) for a, b in pairwise(edges)]
    return "".join(pieces) + detokenizer.finish()


@given(data=st.data(), skip=st.booleans())
def test_bytes_in_pieces_are_the_whole(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=6))
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    assert isinstance(detokenizer, ByteDetokenizer)
    assert in_pieces(detokenizer, tokens, cuts) == tokenizer.decode(tokens, skip_special_tokens=skip)


@given(text=st.text(max_size=60))
def test_any_text_survives_token_by_token(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = tokenizer.detokenizer()
    tokens = tokenizer.encode(text)
    assert "".join([detokenizer.feed([token]) for token in tokens]) + detokenizer.finish() == text


@given(data=st.data())
def test_windows_in_pieces_are_the_whole(byte_fallback: Tokenizer, data: st.DataObject) -> None:
    """Words, and characters spelled in bytes. A window may show one wrong byte more or less."""
    byte = 1
    spelled = [[byte + b for b in character.encode()] for character in "é🐟ñ"]
    [special] = byte_fallback._special_ids
    words = st.sampled_from([*range(257, 263), special]).map(lambda i: [i])
    units = st.one_of(words, st.sampled_from(spelled))
    tokens = [token for unit in data.draw(st.lists(units, max_size=30)) for token in unit]
    detokenizer = byte_fallback.detokenizer()
    assert isinstance(detokenizer, WindowDetokenizer)
    assert in_pieces(detokenizer, tokens, []) == byte_fallback.decode(tokens)
    assert in_pieces(byte_fallback.detokenizer(), tokens, [1, 2, 3]) == byte_fallback.decode(tokens)


def test_skipped_tokens_do_not_make_each_step_dearer(byte_fallback: Tokenizer) -> None:
    windows: list[int] = []

    def decode(token_ids: Sequence[int]) -> str:
        windows.append(len(token_ids))
        return byte_fallback.decode(token_ids)

    detokenizer = WindowDetokenizer(decode)
    [special] = byte_fallback._special_ids
    assert detokenizer.feed([257, *[special] * 200, 258]) + detokenizer.finish() == "hello fish"
    assert max(windows) < 5


def test_nothing_is_shown_of_half_a_character(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("🐟")
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.feed([first]) == ""
    assert detokenizer.feed(rest) == "🐟"
    detokenizer.feed([first])
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"


def test_tokens_beyond_the_tokenizer_have_no_text(tokenizer: Tokenizer) -> None:
    [a] = tokenizer.encode("a")
    assert tokenizer.detokenizer().feed([a, tokenizer.vocab_size + 5, a]) == "aa"


def naive_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first, character by character."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_cuts(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopStrings(tuple(stops), include)
    shown, found = "", None
    for piece in pieces:
        text, found = matcher.feed(piece)
        shown += text
        if found is not None:
            break
        assert not any(stop in shown for stop in stops)
    else:
        shown += matcher.finish()
    assert (shown, found) == naive_stop("".join(pieces), stops, include)


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    matcher = StopStrings(("END",))
    assert matcher.feed("the E") == ("the ", None)
    assert matcher.feed("N") == ("", None)
    assert matcher.feed("T") == ("ENT", None)
    assert matcher.feed("END") == ("", "END")


def test_chat_is_rendered_as_transformers_does(folder: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.render_chat(MESSAGES, add_generation_prompt=prompt) == expected
    assert tokenizer.encode("héllo <|end|> 🐟") == theirs.encode("héllo <|end|> 🐟")


def test_template_errors_are_the_requests(tokenizer: Tokenizer) -> None:
    broken = "{{ 1 // (messages|length - messages|length) }}"
    for template in ("{{ raise_exception('no system') }}", "{{ messages[9].content }}", "{% for %}", broken):
        refusing = Tokenizer(tokenizer._fast, settings={}, chat_template=template)
        with pytest.raises(RequestError, match="refuses"):
            refusing.render_chat(MESSAGES)
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(tokenizer._fast, settings={}, chat_template=None).render_chat(MESSAGES)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(tmp_path)


def test_named_chat_templates(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert Tokenizer.from_folder(tmp_path).render_chat(MESSAGES) == "d"
