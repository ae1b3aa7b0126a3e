"""Rollout servers, and the engines that ask them. A server is loaded once a file and healthy before each test."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perl_vlm.data.rendering import PromptRenderer
from perl_vlm.models.backbone import TINY
from perl_vlm.models.roles import Roles
from perl_vlm.rollout import protocol
from perl_vlm.rollout.protocol import Client
from perl_vlm.rollout.served import ServedEngine


def _server_module() -> Any:
    # Tests are imported by path (importmode=importlib), so that a helper beside them is too.
    spec = importlib.util.spec_from_file_location("vllm_server", Path(__file__).with_name("vllm_server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["vllm_server"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Any]]:
    """``start(folder)`` serves a model until the file's tests are over."""
    module, running = _server_module(), []

    def serve(folder: Path | str, **options: Any) -> Any:
        running.append(module.VllmServer(folder, **options))
        return running[-1]

    yield serve
    for server in running:
        server.close()


@pytest.fixture(scope="module")
def tiny_server(start: Callable[..., Any]) -> Any:
    return start(TINY)


@pytest.fixture
def server(tiny_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bundled VLM, served."""
    monkeypatch.delenv(protocol.TOKEN, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing on this machine is asked through a proxy
    tiny_server.reset()
    return tiny_server


@pytest.fixture
def engine_of(tmp_path: Path) -> Callable[..., ServedEngine]:
    """``engine_of(server, roles, renderer)`` is an engine for the role ``policy``, which is added where it is not."""

    def make(server: Any, roles: Roles, renderer: PromptRenderer, **options: Any) -> ServedEngine:
        if "policy" not in roles:
            roles.add("policy")
        said: list[str] = []
        settings = {"requests": 4, "canary_every": 1000, "warn": said.append, **options}
        client = Client(server.url, timeout=20.0, retries=2, backoff=0.001)
        return ServedEngine(roles, "policy", renderer, client, tmp_path / "engine", **settings)

    return make
