"""Routes about models: the list of models, and their tokenizers."""

from __future__ import annotations

from starlette.responses import Response

from ...replicas.engine.request_limits import check_token_ids
from .answers import ModelCard, ModelList, Text, Tokens
from .api_state import ApiState, ServedModel
from .chat import render_prompt
from .chat_schema import TokenizeChatBody
from .docs import json_response
from .schema import DetokenizeBody, TokenizeTextBody


def list_models(state: ApiState) -> Response:
    """GET /v1/models."""
    return json_response(ModelList([_card(state, model) for model in state.models.values()]))


def get_model(state: ApiState, name: str) -> Response:
    """GET /v1/models/{id}. Raises UnknownModel."""
    return json_response(_card(state, state.resolve(name)))


def _card(state: ApiState, model: ServedModel) -> ModelCard:
    limit = min((info.max_model_len for info, _ in state.replicas(model)), default=None)
    return ModelCard(model.name, model.created, model.root, limit)


async def tokenize(state: ApiState, body: TokenizeTextBody | TokenizeChatBody) -> Response:
    """POST /tokenize."""
    model = state.resolve(body.model)
    text = render_prompt(model, body) if isinstance(body, TokenizeChatBody) else body.prompt
    [tokens] = await model.encode([text], add_special_tokens=body.add_special_tokens)
    names = [model.tokenizer.token_name(token) for token in tokens] if body.return_token_strs else None
    return json_response(Tokens(len(tokens), state.limits(model).max_model_len, tokens, names))


def detokenize(state: ApiState, body: DetokenizeBody) -> Response:
    """POST /detokenize."""
    tokenizer = state.resolve(body.model).tokenizer
    check_token_ids(body.tokens, tokenizer.vocab_size, "tokens")
    return json_response(Text(tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)))


def tokenizer_info(state: ApiState) -> Response:
    """GET /tokenizer_info of the first model: tokenizer_config.json and the chat template."""
    tokenizer = next(iter(state.models.values())).tokenizer
    settings = {key: value for key, value in tokenizer.settings.items() if not key.startswith("_")}
    return json_response({**settings, "chat_template": tokenizer.chat_template})
