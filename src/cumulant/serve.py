"""`cumulant serve`: its options."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench.console import expand_home

Folders = Annotated[list[str], typer.Argument(help="folders of trained models")]
Host = Annotated[str, typer.Option(help="address to listen at")]
Port = Annotated[int, typer.Option(help="port; 0: any that is free")]
Slots = Annotated[int, typer.Option(help="replies of a model that are drawn at a time")]
Memory = Annotated[str, typer.Option(help="most memory of the process")]
Context = Annotated[
    int | None,
    typer.Option(help="tokens of a context, if the model's state grows; default: what fits"),
]
StateDir = Annotated[
    str | None, typer.Option(help="folder that keeps states; default: memory", callback=expand_home)
]
StateLimit = Annotated[str, typer.Option(help="most bytes of the models' files in --state-dir")]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(help="key that requests need; may be repeated", envvar="CUMULANT_API_KEY"),
]
ChatTemplate = Annotated[
    str | None, typer.Option(help="file with a chat template (Jinja)", callback=expand_home)
]
MaxTokens = Annotated[int, typer.Option(help="most tokens of a reply")]
Queue = Annotated[int, typer.Option(help="requests that may wait for a slot")]
Piece = Annotated[
    int, typer.Option(help="tokens of a prompt that are read between two steps of the others")
]
Grace = Annotated[
    float, typer.Option(help="seconds that replies may take to finish when the server stops")
]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: as many as PyTorch takes")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]


def serve(
    runs: Folders,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    slots: Slots = 16,
    memory: Memory = "2GiB",
    context: Context = None,
    state_dir: StateDir = None,
    state_limit: StateLimit = "8GiB",
    api_key: ApiKey = None,
    chat_template: ChatTemplate = None,
    max_tokens: MaxTokens = 4096,
    queue: Queue = 256,
    piece: Piece = 128,
    grace: Grace = 30.0,
    threads: Threads = 0,
    device: Device = "auto",
) -> None:
    """Serve models over HTTP as OpenAI's API does, in a fixed amount of memory."""
    for name, value, least in (
        ("slots", slots, 1), ("max_tokens", max_tokens, 1), ("queue", queue, 1),
        ("piece", piece, 16), ("context", 1 if context is None else context, 1),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if grace < 0:
        raise ValueError(f"grace: expected 0 or more seconds, got {grace}")
    from .bench.commands import silence_libraries

    silence_libraries()
    try:
        from .serving.http import server
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"cumulant serve needs {error.name}: pip install 'cumulant[serve]'"
        ) from error
    from .serving.http.service import Limits
    from .serving.memory import parse_size

    size = parse_size("memory", memory)
    listener = _bind(host, port)
    with listener:
        template = None if chat_template is None else Path(chat_template).read_text("utf-8")
        options: dict[str, Any] = {"slots": slots, "piece": piece, "most_waiting": queue}
        service = server.load(
            _names(runs), size, options, context=context, threads=threads, device=device,
            template=template, state_dir=None if state_dir is None else Path(state_dir),
            state_limit=parse_size("state-limit", state_limit),
            limits=Limits(keys=tuple(api_key or ()), max_tokens=max_tokens),
        )  # fmt: skip
        if not api_key and host not in ("127.0.0.1", "::1", "localhost"):
            print("anybody who reaches this address may use it; --api-key would ask for a key")
        server.run(service, listener, grace)


def _names(runs: list[str]) -> dict[str, str]:
    """Each model's folder by its name, the folder's own."""
    names: dict[str, str] = {}
    for run in runs:
        path = os.path.expanduser(run)
        name = Path(path).name or Path(path).resolve().name
        if name in names:
            raise ValueError(f"runs: two models are named {name}: {names[name]} and {path}")
        names[name] = path
    return names


def _bind(host: str, port: int) -> socket.socket:
    """A socket at the address, which does not listen yet."""
    if not 0 <= port < 65536:
        raise ValueError(f"port: expected 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ValueError(f"host: {host!r} is no address of this machine: {error}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"port: cannot listen at {host}, port {port}: {error.strerror}; pass another --port"
        ) from error
    return listener
