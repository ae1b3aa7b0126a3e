"""A small server that speaks vLLM's protocol (0.33.0) and really applies the adapters that are pushed to it.

It shares no code with what it tests: the model comes from transformers, adapters are loaded by peft, and tokens are
drawn by a plain loop. ``faults`` lets it misbehave in the ways that real servers do.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

SAMPLING = {
    "n", "seed", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "ignore_eos", "stop_token_ids", "logit_bias", "logprobs",
}  # fmt: skip
COMPLETION = SAMPLING | {"model", "prompt", "return_token_ids"}
GENERATE = {"model", "token_ids", "content_parts", "sampling_params", "return_token_ids"}
"""What is understood. vLLM passes over names that it does not know; here they are errors, so that none is misspelt."""


@dataclass
class Faults:
    """How the server misbehaves. Nothing by default."""

    ignored: tuple[str, ...] = ()
    """Modules whose names have one of these parts get no LoRA; ``("",)`` is all of them."""
    strength: float = 1.0
    """A factor on every adapter."""
    raw_logprobs: bool = False
    """vLLM's default: log-probs before temperature and filters."""
    prompt_shift: int = 0
    """Added to the last token of every prompt that is read."""
    silent_prompt: bool = False
    """Does not say which prompt was read."""
    statuses: list[int] = field(default_factory=list)
    """Answers to the next requests, before any is served."""
    lives: int | None = None
    """Requests for tokens until it dies: each later one is cut off without an answer."""
    draws: int | None = None
    """Draws this token alone, whatever is ruled out."""
    reads: int | None = None
    """--max-model-len."""
    closed: tuple[str, ...] = ()
    """Paths that are switched off."""
    off: int = 403
    """What those answer."""
    noise: float = 0.0
    """Spread of what is added to the base's LM head: another model."""


class VllmServer:
    """Serves the model in ``folder`` at ``url`` until ``close``."""

    def __init__(self, folder: Path | str, *, max_lora_rank: int = 64) -> None:
        self.folder, self.max_lora_rank = str(folder), max_lora_rank
        config = AutoConfig.from_pretrained(folder)
        self.sees = hasattr(config, "vision_config")
        auto = AutoModelForImageTextToText if self.sees else AutoModelForCausalLM
        self.base = auto.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = (AutoProcessor if self.sees else AutoTokenizer).from_pretrained(folder)
        self.model: Any = self.base
        self.adapters: dict[str, str] = {}
        self.faults = Faults()
        self.key: str | None = None
        self.loaded: list[str] = []
        """Every adapter that was ever pushed, in order."""
        self.asked: list[dict[str, Any]] = []
        """Every request for tokens."""
        self.headers: list[dict[str, str]] = []
        self._lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self._thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self._thread.join()

    def reset(self) -> None:
        """Healthy again, with nothing loaded."""
        for name in list(self.adapters):
            self.unload(name)
        self.faults, self.key = Faults(), None
        self.loaded, self.asked, self.headers = [], [], []

    # -- adapters --------------------------------------------------------------------------------------------------

    def load(self, name: str, path: str) -> tuple[int, str]:
        if name in self.adapters:
            return 400, f"The lora adapter '{name}' has already been loaded."
        settings = Path(path, "adapter_config.json")
        if not settings.is_file():
            return 404, f"Loading lora {name} failed: No adapter found for {path}"
        written = json.loads(settings.read_text())
        rank = max([written["r"], *written["rank_pattern"].values()])
        if written["modules_to_save"] or written["use_dora"] or rank > self.max_lora_rank:
            return 500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(path, adapter_name=name)
        else:
            self.model = PeftModel.from_pretrained(self.base, path, adapter_name=name).eval()
        with torch.no_grad():
            for key, value in self.model.named_parameters():
                if f".lora_B.{name}." in key:
                    value *= 0.0 if any(part in key for part in self.faults.ignored) else self.faults.strength
        self.adapters[name] = path
        self.loaded.append(name)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> tuple[int, str]:
        if self.adapters.pop(name, None) is None:
            return 404, f"The lora adapter '{name}' cannot be found."
        if self.adapters:
            self.model.delete_adapter(name)
        else:
            self.base = self.model.unload()
            self.model = self.base
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    # -- tokens ----------------------------------------------------------------------------------------------------

    def fill(self, ids: Sequence[int], urls: Sequence[str]) -> tuple[list[int], dict[str, Tensor]]:
        """The prompt with what stands for each picture written out, and the pixels."""
        if not urls:
            return list(ids), {}
        pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) for url in urls]
        image = self.processor.tokenizer.convert_tokens_to_ids("<image>")
        written = self.processor(text=["<image>"] * len(pictures), images=[[one] for one in pictures])
        fillings = iter(written["input_ids"])
        filled = [one for token in ids for one in (next(fillings) if token == image else [token])]
        pixels = self.processor.image_processor([pictures], return_tensors="pt")
        return filled, {key: value for key, value in pixels.items() if key.startswith("pixel")}

    @torch.no_grad()
    def draw(
        self, adapter: str, ids: list[int], pixels: dict[str, Tensor], settings: dict[str, Any]
    ) -> tuple[list[int], list[float], str]:
        if self.adapters and adapter in self.adapters:
            self.model.set_adapter(adapter)
        generator = torch.Generator().manual_seed(settings["seed"])
        noise = torch.Generator().manual_seed(1)
        tokens: list[int] = []
        logprobs: list[float] = []
        room = settings["max_tokens"] if self.faults.reads is None else self.faults.reads - len(ids)
        for step in range(min(settings["max_tokens"], room)):
            read = torch.tensor([[*ids, *tokens]])
            logits = self.model(input_ids=read, attention_mask=torch.ones_like(read), **pixels).logits[0, -1].float()
            if self.faults.noise:
                logits = logits + self.faults.noise * torch.randn(logits.shape, generator=noise)
            raw = torch.log_softmax(logits, dim=-1)
            for token, bias in settings["logit_bias"].items():
                logits[int(token)] += bias
            if step < settings["min_tokens"]:
                logits[settings["stop_token_ids"]] = float("-inf")
            probs, order = torch.softmax(logits / settings["temperature"], dim=-1).sort(descending=True)
            outside = probs.cumsum(0) - probs >= settings["top_p"]
            probs = torch.where(outside, torch.zeros_like(probs), probs)
            probs = probs / probs.sum()
            place = int(torch.multinomial(probs, 1, generator=generator))
            token = int(order[place]) if self.faults.draws is None else self.faults.draws
            tokens.append(token)
            logprobs.append(float(raw[token]) if self.faults.raw_logprobs else float(probs[place].log()))
            if token in settings["stop_token_ids"] or self.faults.draws is not None:
                return tokens, logprobs, "stop"
        return tokens, logprobs, "length"

    def complete(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append(body)
        flat = path == "/v1/completions"
        settings = {key: body[key] for key in SAMPLING} if flat else body["sampling_params"]
        unknown = body.keys() - (COMPLETION if flat else GENERATE) | settings.keys() ^ SAMPLING
        if unknown:
            return 400, {"error": {"message": f"unknown or missing: {unknown}"}}
        if body["model"] != self.folder and body["model"] not in self.adapters:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "type": "NotFoundError"}}
        urls = [] if flat else [part["url"] for part in body["content_parts"] if part["type"] == "image_url"]
        with self._lock:
            read, pixels = self.fill(body["prompt" if flat else "token_ids"], urls)
            tokens, logprobs, why = self.draw(body["model"], read, pixels, settings)
        read = [*read[:-1], read[-1] + self.faults.prompt_shift]
        said = None if self.faults.silent_prompt else read
        choice: dict[str, Any] = {"index": 0, "token_ids": tokens, "finish_reason": why}
        if flat:
            return 200, {"choices": [{**choice, "prompt_token_ids": said, "logprobs": {"token_logprobs": logprobs}}]}
        content = [
            {"token_id": token, "logprob": value, "top_logprobs": []}
            for token, value in zip(tokens, logprobs, strict=True)
        ]
        return 200, {"choices": [{**choice, "logprobs": {"content": content}}], "prompt_token_ids": said}

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and body; a None status cuts the connection."""
        if self.faults.statuses:
            return self.faults.statuses.pop(0), "not now"
        if path in self.faults.closed:
            return self.faults.off, {"error": {"message": "switched off"}}
        if (method, path) == ("GET", "/health"):
            return 200, ""
        if (method, path) == ("GET", "/v1/models"):
            cards = [{"id": self.folder, "root": self.folder}]
            cards += [{"id": name, "root": root, "parent": self.folder} for name, root in self.adapters.items()]
            return 200, {"object": "list", "data": cards}
        if (method, path) == ("POST", "/v1/load_lora_adapter"):
            with self._lock:
                return self.load(body["lora_name"], body["lora_path"])
        if (method, path) == ("POST", "/v1/unload_lora_adapter"):
            with self._lock:
                return self.unload(body["lora_name"])
        if method == "POST" and path in ("/v1/completions", "/inference/v1/generate"):
            return self.complete(path, body)
        return 404, {"detail": "Not Found"}


def _handler(server: VllmServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            server.headers.append(dict(self.headers))
            faults = server.faults
            if faults.lives is not None and self.path in ("/v1/completions", "/inference/v1/generate"):
                faults.lives -= 1
            if faults.lives is not None and faults.lives < 0:
                self.close_connection = True
                return
            guarded = server.key is not None and self.path.startswith(("/v1", "/inference"))
            if guarded and self.headers.get("Authorization") != f"Bearer {server.key}":
                status, said = 401, {"error": "Unauthorized", "given": self.headers.get("Authorization")}
            else:
                status, said = server.answer(self.command, self.path, body)
            written = (said if isinstance(said, str) else json.dumps(said)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(written)))
            self.end_headers()
            self.wfile.write(written)

        do_GET = do_POST = respond

        def log_message(self, *args: Any) -> None:
            pass

    return Handler
