"""Loading models, and running the server until it is told to stop."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn

from ...models.rows import grows
from ...text.checkpoint import load_checkpoint
from ..engine import Engine
from ..library import STATE_LIMIT, StateLibrary
from ..memory import plan_memory, show_size
from .app import make_app
from .service import Limits, Served, Service

log = logging.getLogger("cumulant.serving")


def load(
    folders: dict[str, str],
    memory: int,
    options: dict[str, Any],
    *,
    limits: Limits,
    context: int | None = None,
    threads: int = 0,
    device: str = "auto",
    template: str | None = None,
    state_dir: Path | None = None,
    state_limit: int = STATE_LIMIT,
) -> Service:
    """Load models, and print what they will use at most. options: of each `Engine`."""
    threads = threads or torch.get_num_threads()
    # a second team of threads, this one's, would keep those of the engine from waiting awake
    torch.set_num_threads(1)
    loaded = {name: load_checkpoint(folder, device) for name, folder in folders.items()}
    models = [model for model, _ in loaded.values()]
    plans = plan_memory(models, options["slots"], memory, options["piece"], context)
    service = Service({}, limits)
    for plan, (name, (model, tokenizer)) in zip(plans, loaded.items(), strict=True):
        if template is not None:
            tokenizer.chat_template = template
        weights = sum(p.numel() * p.element_size() for p in model.state_dict().values())
        engine = Engine(
            model, tokenizer, room=plan.room, snapshot_bytes=plan.snapshots, memory=memory,
            threads=threads,
            **options,
        )  # fmt: skip
        library = StateLibrary(
            model, engine.piece, engine.store, state_dir, state_limit // len(loaded)
        )
        service.models[name] = Served(name, engine, library)
        room = f"contexts of {plan.room:,} tokens" if grows(model) else "contexts of any length"
        print(
            f"{name}: weights {show_size(weights)}; {engine.slots} slots"
            f" {show_size(plan.slots)}, {room}; snapshots {show_size(plan.snapshots)}"
        )
    print(
        f"memory: {show_size(sum(plan.total for plan in plans))} at most, with the process itself"
    )
    return service


class Server(uvicorn.Server):
    """Finishes replies after the first signal, for at most `grace` seconds; a second one stops."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float):
        super().__init__(config)
        self._service, self._grace = service, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"listening at http://{shown}:{port}", flush=True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        self._stop_engines(drain=True, timeout=self._grace)
        self._stop_engines(drain=False, timeout=10)
        self.should_exit = True

    def _stop_engines(self, *, drain: bool, timeout: float) -> None:
        threads = [
            threading.Thread(target=served.engine.stop, kwargs={"drain": drain, "timeout": timeout})
            for served in self._service.models.values()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def run(service: Service, listener: socket.socket, grace: float) -> None:
    """Serve until a signal, and return when all replies are finished or stopped."""
    config = uvicorn.Config(
        make_app(service), log_level="warning", access_log=False, timeout_keep_alive=75,
        timeout_graceful_shutdown=10, server_header=False,
    )  # fmt: skip
    for served in service.models.values():
        served.engine.start()
    server = Server(config, service, grace)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, server.handle_exit)
    server.run(sockets=[listener])
    for served in service.models.values():
        served.library.close()
