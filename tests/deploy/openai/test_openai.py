"""The OpenAI API as openai-python sees it."""

from __future__ import annotations

import pytest

from tests.deploy.conftest import Api
from tests.support.served import wait_until
from tests.support.text_model import CHAT_TEMPLATE

MESSAGES = [{"role": "user", "content": "hello"}]


def test_completion(api: Api) -> None:
    answer = api.openai.completions.create(model="fake", prompt="def add", max_tokens=12)
    assert answer.object == "text_completion"
    [choice] = answer.choices
    assert choice.text == api.expected(12)
    assert choice.finish_reason == "length"
    prompt_len = len(api.tokenizer.encode("def add"))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_len, 12)
    assert answer.usage.total_tokens == prompt_len + 12


def test_completion_defaults_to_sixteen_tokens_and_needs_no_model(api: Api) -> None:
    answer = api.post("/v1/completions", {"prompt": "x"}).json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["model"] == "fake"


def test_stream_is_the_whole_answer(api: Api) -> None:
    chunks = list(api.openai.completions.create(model="fake", prompt="x", max_tokens=40, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == api.expected(40)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_ends_with_done_and_counts_usage(api: Api) -> None:
    options = {"include_usage": True}
    body = {"prompt": "x" * 40, "max_tokens": 5, "stream": True, "stream_options": options}
    response = api.post("/v1/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    chunks = list(api.openai.completions.create(model="fake", **body))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 5
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 16 * 16 > 0


def test_continuous_usage(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        api.openai.completions.create(model="fake", prompt="x", max_tokens=5, stream=True, stream_options=options)
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert counts == [*range(1, 6), 5]


def test_n_choices_stream_side_by_side(api: Api) -> None:
    texts = ["", "", ""]
    finished = set()
    for chunk in api.openai.completions.create(model="fake", prompt="x", n=3, max_tokens=20, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                finished.add(choice.index)
    assert texts == [api.expected(20, sample) for sample in range(3)]
    assert finished == {0, 1, 2}
    assert api.router.requests[-1].num_samples == 3


def test_batches_of_prompts_are_numbered_prompt_by_prompt(api: Api) -> None:
    answer = api.openai.completions.create(model="fake", prompt=["a", "b"], n=2, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    one, two = api.expected(4, 0), api.expected(4, 1)
    assert [choice.text for choice in answer.choices] == [one, two, one, two]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert [r.prompt_token_ids for r in api.router.requests] == [tuple(api.tokenizer.encode(p)) for p in "ab"]


def test_batches_stream(api: Api) -> None:
    texts = {}
    for chunk in api.openai.completions.create(model="fake", prompt=["a", "b", "c"], max_tokens=9, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == dict.fromkeys(range(3), api.expected(9))


@pytest.mark.parametrize("prompt", [[7, 8, 9], [[7, 8, 9]]])
def test_token_id_prompts(api: Api, prompt: list) -> None:
    api.openai.completions.create(model="fake", prompt=prompt, max_tokens=1)
    assert api.router.requests[-1].prompt_token_ids == (7, 8, 9)


def test_return_token_ids(api: Api) -> None:
    body = {"prompt": [7, 8, 9], "max_tokens": 6, "return_token_ids": True}
    whole = api.post("/v1/completions", body).json()["choices"][0]
    assert whole["prompt_token_ids"] == [7, 8, 9]
    assert whole["token_ids"] == api.router.output(api.router.requests[-1])
    chunks = list(
        api.openai.completions.create(
            model="fake", prompt=[7, 8, 9], max_tokens=6, stream=True, extra_body={"return_token_ids": True}
        )
    )
    choices = [chunk.choices[0].model_dump() for chunk in chunks]
    assert choices[0]["prompt_token_ids"] == [7, 8, 9]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]


def test_logprobs_of_completions(api: Api) -> None:
    answer = api.openai.completions.create(model="fake", prompt="x", max_tokens=12, logprobs=3)
    [choice] = answer.choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    ids = api.router.output(api.router.requests[-1])
    assert logprobs.tokens == [api.tokenizer.token_text(token) for token in ids]
    assert logprobs.token_logprobs == [-0.5] * 12
    assert all(len(top) in (3, 4) and max(top.values()) == -0.5 for top in logprobs.top_logprobs or [])
    assert logprobs.text_offset is not None
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if "\N{REPLACEMENT CHARACTER}" not in token:
            assert choice.text.startswith(token, offset)


def test_streamed_logprobs_are_those_of_the_whole_answer(api: Api) -> None:
    whole = api.openai.completions.create(model="fake", prompt="x", max_tokens=30, logprobs=1).choices[0].logprobs
    assert whole is not None
    parts = list(api.openai.completions.create(model="fake", prompt="x", max_tokens=30, logprobs=1, stream=True))
    streamed = [chunk.choices[0].logprobs for chunk in parts]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        joined = [item for part in streamed if part is not None for item in getattr(part, name)]
        assert joined == getattr(whole, name)


def test_echo_scores_the_prompt(api: Api) -> None:
    """What lm-evaluation-harness asks for, with tokens as the prompt and with no token beside them."""
    ids = api.tokenizer.encode("for i in range(10)")
    for max_tokens in (1, 0):
        body = {"prompt": [ids, ids], "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
        answer = api.post("/v1/completions", body).json()
        for choice in answer["choices"]:
            logprobs = choice["logprobs"]
            assert choice["text"] == "for i in range(10)" + (api.expected(1) if max_tokens else "")
            assert len(logprobs["tokens"]) == len(ids) + max_tokens
            assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(ids) - 1 + max_tokens)
            assert logprobs["top_logprobs"][0] is None
            assert logprobs["text_offset"][0] == 0
            for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
                assert choice["text"].startswith(token, offset)
        assert answer["usage"]["completion_tokens"] == 2 * max_tokens


def test_echo_streams(api: Api) -> None:
    chunks = list(api.openai.completions.create(model="fake", prompt="héllo", echo=True, max_tokens=7, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "héllo" + api.expected(7)


def test_prompt_logprobs(api: Api) -> None:
    body = {"prompt": [7, 8, 9], "max_tokens": 1, "prompt_logprobs": 2}
    [choice] = api.post("/v1/completions", body).json()["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert [entry[str(token)]["rank"] for token, entry in zip([8, 9], rest, strict=True)] == [1, 1]
    assert rest[0]["8"]["decoded_token"] == api.tokenizer.token_text(8)


def test_best_of_returns_the_likeliest(api: Api) -> None:
    """The fake's samples 0, 3, 6 are the most probable, in this order."""
    answer = api.openai.completions.create(model="fake", prompt="x", n=2, best_of=6, max_tokens=8)
    assert [choice.text for choice in answer.choices] == [api.expected(8, 0), api.expected(8, 3)]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 48


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_tokens(api: Api, stream: bool) -> None:
    body = {"prompt": "x", "max_tokens": 100, "stop": ["jumps over", "never"]}
    if stream:
        chunks = list(api.openai.completions.create(model="fake", stream=True, **body))
        text = "".join(chunk.choices[0].text for chunk in chunks)
        last = chunks[-1].choices[0].model_dump()
    else:
        last = api.post("/v1/completions", body).json()["choices"][0]
        text = last["text"]
    assert text == "the quick brown fox — näïve 🐟 fish — "
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "jumps over")
    wanted = [api.router.requests[-1].request_id]
    assert wait_until(lambda: api.router.aborted == wanted)  # perhaps after the client has read the end
    assert api.server.call(lambda: api.router.num_streams) == 0


def test_stop_string_can_be_kept(api: Api) -> None:
    body = {"prompt": "x", "max_tokens": 100, "stop": "fox", "include_stop_str_in_output": True}
    assert api.post("/v1/completions", body).json()["choices"][0]["text"] == "the quick brown fox"


def test_stop_string_waits_for_min_tokens(api: Api) -> None:
    body = {"prompt": "x", "max_tokens": 100, "stop": "the quick", "min_tokens": 20}
    text = api.post("/v1/completions", body).json()["choices"][0]["text"]
    assert text.count("the quick") == 1
    assert text.endswith("the lazy dog; ")


def test_stop_strings_end_each_choice_alone(api: Api) -> None:
    body = {"prompt": "x", "n": 2, "max_tokens": 30, "stop": "the"}
    first, second = api.post("/v1/completions", body).json()["choices"]
    assert (first["text"], first["finish_reason"]) == ("", "stop")
    assert (api.router.requests[-1].request_id, 0) in api.router.ended
    assert second["text"].startswith("quick brown")


def test_stop_token(api: Api) -> None:
    space_fox = api.tokenizer.encode("the quick brown fox", add_special_tokens=False)[-1]
    body = {"prompt": "x", "max_tokens": 100, "stop_token_ids": [space_fox]}
    choice = api.post("/v1/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == space_fox
    assert not choice["text"].endswith(api.tokenizer.token_text(space_fox))


def test_chat(api: Api) -> None:
    answer = api.openai.chat.completions.create(model="fake", messages=MESSAGES, max_completion_tokens=12)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == api.expected(12)
    prompt = "<|user|>hello<|end|>\n<|assistant|>"
    assert api.router.requests[-1].prompt_token_ids == tuple(api.tokenizer.encode(prompt))


def test_chat_without_a_limit_may_fill_the_context(api: Api) -> None:
    api.openai.chat.completions.create(model="fake", messages=MESSAGES, stop=["quick"])
    request = api.router.requests[-1]
    assert request.sampling.max_tokens == 256 - len(request.prompt_token_ids)


def test_chat_stream_starts_with_the_role(api: Api) -> None:
    stream = api.openai.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=30, n=2, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert {c.index for chunk in chunks for c in chunk.choices if c.delta.role == "assistant"} == {0, 1}
    assert chunks[0].choices[0].delta.role == "assistant"
    for index in (0, 1):
        mine = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert "".join(c.delta.content or "" for c in mine) == api.expected(30, index)
        assert mine[-1].finish_reason == "length"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 60


def test_chat_logprobs(api: Api) -> None:
    create = api.openai.chat.completions.create
    args = {"model": "fake", "messages": MESSAGES, "max_tokens": 25, "logprobs": True, "top_logprobs": 2}
    whole = create(**args).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    raw = b"".join(bytes(entry.bytes or []) for entry in whole.content)
    assert raw.decode("utf-8", "replace") == api.expected(25)
    assert all(len(entry.top_logprobs) == 2 for entry in whole.content)
    streamed = [c.logprobs for chunk in create(**args, stream=True) for c in chunk.choices if c.logprobs]
    assert [entry for part in streamed for entry in part.content or []] == whole.content


def test_chat_message_forms(api: Api) -> None:
    """Content parts, the developer role, and an earlier answer sent back as it came."""
    answer = api.openai.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=3)
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]},
        answer.choices[0].message.model_dump(),
        {"role": "user", "content": "go on"},
    ]
    answered = api.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    assert answered.status_code == 200, answered.text
    prompt = api.tokenizer.decode(api.router.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt.startswith("<|system|>be\nkind<|end|>\n<|assistant|>the")
    assert prompt.endswith("<|user|>go on<|end|>\n<|assistant|>")


def test_continue_final_message(api: Api) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "I say"}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True, "max_tokens": 1}
    assert api.post("/v1/chat/completions", body).status_code == 200
    prompt = api.tokenizer.decode(api.router.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("<|assistant|>I say")


def test_seeds(api: Api) -> None:
    for _ in range(2):
        api.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    first, second = [request.sampling.seed for request in api.router.requests]
    assert first != second
    api.post("/v1/completions", {"prompt": "x", "max_tokens": 1, "seed": -1})
    assert api.router.requests[-1].sampling.seed == 2**64 - 1


def test_sampling_parameters_arrive(api: Api) -> None:
    body = {
        "prompt": "x", "max_tokens": 9, "min_tokens": 2, "temperature": 0.7, "top_p": 0.9, "top_k": -1, "min_p": 0.1,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "logit_bias": {"7": -100},
        "allowed_token_ids": [3, 3, 4], "bad_words": ["fox"], "stop_token_ids": [9], "ignore_eos": True, "seed": 5,
        "priority": -3, "cache_salt": "tenant", "user": "me", "store": False, "tools": [], "response_format": None,
    }  # fmt: skip
    assert api.post("/v1/completions", body).status_code == 200
    request = api.router.requests[-1]
    sampling = request.sampling
    assert (request.priority, request.cache_salt) == (-3, "tenant")
    assert (sampling.min_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (2, 0.7, 0.9, 0)
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.5, -0.5)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.1, ((7, -100.0),))
    assert (sampling.allowed_token_ids, sampling.stop_token_ids) == ((3, 4), (9,))
    assert (sampling.ignore_eos, sampling.seed, sampling.logprobs) == (True, 5, None)
    words = {api.tokenizer.decode(ids) for ids in sampling.bad_words}
    assert words == {"fox", " fox"}


def test_truncation_keeps_the_end(api: Api) -> None:
    prompt = list(range(5, 25))
    api.post("/v1/completions", {"prompt": prompt, "truncate_prompt_tokens": 4, "max_tokens": 1})
    assert api.router.requests[-1].prompt_token_ids == (21, 22, 23, 24)
    assert api.post("/v1/completions", {"prompt": prompt * 20, "max_tokens": 1}).status_code == 400
    body = {"prompt": prompt * 20, "truncate_prompt_tokens": -1, "max_tokens": 1}
    assert api.post("/v1/completions", body).status_code == 200
    assert len(api.router.requests[-1].prompt_token_ids) == 255


def test_models(api: Api) -> None:
    [model] = api.openai.models.list().data
    assert model.id == api.openai.models.retrieve("fake").id == "fake"
    assert model.model_dump()["max_model_len"] == 256
    assert model.model_dump()["root"] == "/models/fake"


def test_tokenize_and_back(api: Api) -> None:
    body = api.post("/tokenize", {"prompt": "näïve 🐟", "return_token_strs": True}).json()
    assert body["tokens"] == api.tokenizer.encode("näïve 🐟")
    assert (body["count"], len(body["token_strs"])) == (len(body["tokens"]),) * 2
    assert body["max_model_len"] == 256
    assert api.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": "näïve 🐟"}
    chat = api.post("/tokenize", {"messages": MESSAGES}).json()
    assert chat["tokens"] == api.tokenizer.encode("<|user|>hello<|end|>\n<|assistant|>")
    assert api.http.get("/tokenizer_info").json()["chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "type": "text"},  # lm-evaluation-harness
        {"role": "user", "content": "x", "name": "ann"},
        {"role": "assistant", "content": "x", "reasoning_content": "because"},
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ],
    ids=str,
)
def test_messages_as_clients_send_them(api: Api, message: dict) -> None:
    response = api.post("/v1/chat/completions", {"messages": [message], "max_tokens": 1})
    assert response.status_code == 200, response.text


def test_nulls_inside_objects_are_absent_fields(api: Api) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": {"enable_thinking": None}}
    assert api.post("/v1/chat/completions", body).status_code == 200


def test_the_larger_limit_is_the_older_name(api: Api) -> None:
    body = {"messages": MESSAGES, "max_tokens": 9999, "max_completion_tokens": 2}
    assert api.post("/v1/chat/completions", body).json()["usage"]["completion_tokens"] == 2
