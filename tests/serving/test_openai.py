"""The unmodified `openai` package, curl and lm-eval as clients."""

import asyncio
import json
import shutil
import subprocess

import pytest

openai = pytest.importorskip("openai")

BIAS = {"256": -100}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completions(client):
    options = {"model": "small", "prompt": "Hello", "seed": 1, "max_tokens": 20}
    options |= {"logit_bias": BIAS}
    whole = client.completions.create(**options, logprobs=2, echo=True)
    assert whole.choices[0].text.startswith("Hello")
    assert len(whole.choices[0].logprobs.tokens) == 25
    plain = client.completions.create(**options)
    parts = list(client.completions.create(**options, stream=True))
    assert "".join(p.choices[0].text for p in parts) == plain.choices[0].text
    again = client.completions.create(**options)
    assert again.usage.prompt_tokens_details.cached_tokens == 5
    extra = client.completions.create(**options, extra_body={"top_k": 1})
    assert (
        extra.choices[0].text
        == client.completions.create(**options | {"temperature": 0}).choices[0].text
    )


def test_chats(client):
    messages = [{"role": "user", "content": "Hello"}]
    options = {"model": "small", "messages": messages, "seed": 1, "max_completion_tokens": 20}
    options |= {"logit_bias": BIAS}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content) == 20
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == 20
    with client.chat.completions.stream(**options) as stream:
        assert "".join(e.delta for e in stream if e.type == "content.delta") == text


def test_models_and_errors(client):
    assert [m.id for m in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="small", prompt="x", temperature=-1)


def test_many_asynchronous_clients(server):
    async def ask(client, i):
        stream = await client.completions.create(
            model="small", prompt=f"Number {i % 3}", seed=i % 3, max_tokens=15, stream=True,
            logit_bias=BIAS,
        )  # fmt: skip
        return "".join([p.choices[0].text async for p in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            alone = [await ask(client, i) for i in range(3)]
            together = await asyncio.gather(*(ask(client, i) for i in range(24)))
            return alone, together

    alone, together = asyncio.run(all_of_them())
    assert together == [alone[i % 3] for i in range(24)]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server):
    command = [
        "curl", "--silent", "--no-buffer", f"{server.url}/v1/completions", "-H",
        "Content-Type: application/json", "-d",
        json.dumps({"prompt": "x", "max_tokens": 3, "stream": True, "logit_bias": BIAS}),
    ]  # fmt: skip
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    assert len([line for line in lines if line.startswith("data: {")]) >= 1
