"""What is said to a vLLM server, and what of its answers is believed. Written after the source of vLLM 0.33.0.

Nothing that the server says is taken on trust: the prompt that it read must be, token by token, the one that training
reads, and a response must have ended, or been cut, as the local sampler would have.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from perl_vlm.data.images import to_png_bytes
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.logits import TokenRules
from perl_vlm.rollout.scorers.spec import shown
from perl_vlm.rollout.scorers.transport import Peer, Refused, ask, parse_json, post_json
from perl_vlm.types import ImageSource

TOKEN = "PERL_VLM_ENGINE_TOKEN"
"""The environment variable whose value is sent as a bearer token; it is read at each request and kept nowhere."""
PEER = Peer("the rollout server", TOKEN, "is this the root of a vLLM server?")
RETRIES = 5
_NEVER = -100.0
"""The least bias that vLLM gives to a logit. A token is as good as ruled out by it, and one that is drawn all the same
is refused here."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; see ``sampler.decode``."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    rules: TokenRules

    def payload(self, seed: int) -> dict[str, Any]:
        """The settings as vLLM names them. Each one is given: what is left out comes from the model's own
        generation config, and with it penalties and filters that nobody asked for."""
        return {
            "n": 1,
            "seed": seed,
            "max_tokens": self.max_new_tokens,
            "min_tokens": self.min_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # These tokens end a response and no others do, whatever the server thinks of.
            "ignore_eos": True,
            "stop_token_ids": list(self.rules.ends),
            "logit_bias": {str(token): _NEVER for token in self.rules.never},
            "logprobs": 0,  # that of the sampled token alone
        }


@dataclass(frozen=True)
class Prompt:
    """One prompt, as training reads it and as it is sent."""

    name: str
    """What messages call it."""
    ids: list[int]
    """Every token, those of the pictures among them."""
    sent: list[int]
    """The same with one placeholder for each picture, as the chat template writes it."""
    images: tuple[str, ...]
    """The pictures as data URLs."""


class Answer(NamedTuple):
    """One sampled response."""

    tokens: list[int]
    """Up to and including its end token where it has one."""
    logprobs: list[float]
    """Of each token, as the server saw them."""
    ended: bool
    """Whether it ended by itself."""


def data_url(source: ImageSource) -> str:
    """A picture as a URL that holds it."""
    return "data:image/png;base64," + base64.b64encode(to_png_bytes(source.load())).decode("ascii")


class Client:
    """A vLLM server.

    Args:
        url: its root.
        timeout: seconds for one request.
        retries, backoff: see ``transport.ask``.
    """

    def __init__(self, url: str, *, timeout: float, retries: int = RETRIES, backoff: float = 0.5) -> None:
        self.url = url.rstrip("/")
        self.limits: dict[str, Any] = {"timeout": timeout, "retries": retries, "backoff": backoff, "peer": PEER}

    @property
    def who(self) -> str:
        """What messages call it."""
        return f"{PEER.name} {shown(self.url)}"

    def look(self) -> None:
        """Raise PerlVlmError unless the server is up and serves a model."""
        ask(f"{self.url}/health", **self.limits)
        if not self.models():
            raise PerlVlmError(f"{self.who} serves no model; start it with `vllm serve MODEL`")

    def models(self) -> dict[str, str]:
        """What the server serves, base and adapters, by name, and where each was read from."""
        where = f"{self.url}/v1/models"
        answer = parse_json(ask(where, **self.limits), where, PEER)
        listed = answer.get("data") if isinstance(answer, Mapping) else None
        if not isinstance(listed, list) or not all(isinstance(card, Mapping) and "id" in card for card in listed):
            raise PerlVlmError(f"{self.who} gave no list of models at /v1/models; {PEER.asks}")
        return {str(card["id"]): str(card.get("root") or "") for card in listed}

    def load(self, name: str, folder: Path) -> None:
        """Let the server read an adapter from a folder and serve it under a name that it has not served before.

        Raises PerlVlmError where it cannot, with what it said.
        """
        try:
            ask(f"{self.url}/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, **self.limits)
        except Refused as error:
            if error.status in (404, 405):
                raise PerlVlmError(
                    f"{self.who} takes no adapters while it runs (HTTP {error.status}). Start it with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and --enable-lora"
                ) from error
            # The answer to an earlier attempt may have been lost on its way, and the adapter is there.
            if self.models().get(name) != str(folder):
                raise PerlVlmError(
                    f"{error}. The server must see {folder} under this same path; name one that it sees in "
                    "--ppo.engine_adapters"
                ) from error

    def unload(self, name: str) -> None:
        """Let the server forget an adapter. One that it has forgotten already is no error."""
        try:
            ask(f"{self.url}/v1/unload_lora_adapter", {"lora_name": name}, **self.limits)
        except PerlVlmError:
            if name in self.models():
                raise

    def complete(self, adapter: str, prompt: Prompt, sampling: Sampling, seed: int) -> Answer:
        """Sample one response to a prompt from the base with an adapter.

        Raises PerlVlmError where the server fails for good, read another prompt, or drew what ``sampling`` rules out.
        """
        try:
            if prompt.images:
                return self._with_images(adapter, prompt, sampling, seed)
            settings = sampling.payload(seed)
            body = {"model": adapter, "prompt": prompt.ids, "return_token_ids": True, **settings}
            choice = self._choice(post_json(f"{self.url}/v1/completions", body, **self.limits))
            logprobs = choice.get("logprobs")
            given = logprobs.get("token_logprobs") if isinstance(logprobs, Mapping) else None
            return self._believed(prompt, choice.get("prompt_token_ids"), choice, given, sampling)
        except Refused as error:
            if error.status == 404 and adapter not in self.models():
                raise PerlVlmError(
                    f"{self.who} no longer knows the adapter it was given: it was started anew, or somebody unloaded "
                    "it. Continue with --resume"
                ) from error
            raise

    def _with_images(self, adapter: str, prompt: Prompt, sampling: Sampling, seed: int) -> Answer:
        """The one route of vLLM that takes tokens and pictures both: what it wrote into the prompt for a picture comes
        back and is compared."""
        body = {
            "model": adapter,
            "token_ids": prompt.sent,
            "content_parts": [{"type": "image_url", "url": url} for url in prompt.images],
            "sampling_params": sampling.payload(seed),
            "return_token_ids": True,
        }
        try:
            answer = post_json(f"{self.url}/inference/v1/generate", body, **self.limits)
        except Refused as error:
            if error.status in (403, 405) or (error.status == 404 and adapter in self.models()):
                raise PerlVlmError(
                    f"{self.who} takes no tokens with pictures (HTTP {error.status} at /inference/v1/generate). Start "
                    "it with --enable-scale-out; vLLM 0.33 has what is needed"
                ) from error
            raise
        choice = self._choice(answer)
        logprobs = choice.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
        given = None
        if isinstance(content, list) and all(isinstance(entry, Mapping) for entry in content):
            given = [entry.get("logprob") for entry in content]
        return self._believed(prompt, answer.get("prompt_token_ids"), choice, given, sampling)

    # -- what is believed ------------------------------------------------------------------------------------------

    def _choice(self, answer: Any) -> Mapping[str, Any]:
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
            raise PerlVlmError(f"{self.who} gave an answer without its one choice; {PEER.asks}")
        return choices[0]

    def _believed(
        self, prompt: Prompt, read: Any, choice: Mapping[str, Any], logprobs: Any, sampling: Sampling
    ) -> Answer:
        self._same_prompt(prompt, read)
        tokens = choice.get("token_ids")
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            raise PerlVlmError(f"{self.who} gave no token ids for {prompt.name}; its vLLM knows no return_token_ids")
        if (
            not isinstance(logprobs, list)
            or len(logprobs) != len(tokens)
            or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in logprobs)
        ):
            raise PerlVlmError(f"{self.who} gave {len(tokens)} tokens for {prompt.name} without as many log-probs")
        ended = self._ended(prompt, tokens, str(choice.get("finish_reason")), sampling)
        return Answer(tokens, [float(value) for value in logprobs], ended)

    def _same_prompt(self, prompt: Prompt, read: Any) -> None:
        if read == prompt.ids:
            return
        if not isinstance(read, list):
            raise PerlVlmError(
                f"{self.who} does not say which prompt it read (prompt_token_ids), so nothing tells whether training "
                "would read the same. Use a newer vLLM (0.33 is known to say it), or --ppo.engine local"
            )
        pairs = enumerate(zip(read, prompt.ids, strict=False))
        place = next((at for at, (one, other) in pairs if one != other), min(len(read), len(prompt.ids)))
        raise PerlVlmError(
            f"{self.who} read another prompt than training does at {prompt.name}: {len(read)} tokens against "
            f"{len(prompt.ids)}, and from token {place} on {read[place : place + 4]} against "
            f"{prompt.ids[place : place + 4]}. It must serve the same model with the same processor settings "
            "(--mm-processor-kwargs); where its vLLM writes pictures in another way, use --ppo.engine local"
        )

    def _ended(self, prompt: Prompt, tokens: Sequence[int], why: str, sampling: Sampling) -> bool:
        """Whether the response ended by itself. Raises PerlVlmError where it stopped for any reason but its own end
        and the limit."""
        drawn = [token for token in tokens if token in sampling.rules.never]
        if drawn:
            raise PerlVlmError(
                f"{self.who} drew token {drawn[0]}, the placeholder of a picture, at {prompt.name}: it does not heed "
                "logit_bias. Speculative decoding is one reason; switch it off"
            )
        ends = [place for place, token in enumerate(tokens) if token in sampling.rules.ends]
        if why == "stop" and ends == [len(tokens) - 1] and len(tokens) > sampling.min_new_tokens:
            return True
        if why == "length" and not ends and len(tokens) == sampling.max_new_tokens:
            return False
        raise PerlVlmError(
            f"{self.who} ended the response to {prompt.name} after {len(tokens)} tokens ({why}; the last one is "
            f"{tokens[-1]}), where an end token ({', '.join(map(str, sampling.rules.ends))}) or the limit of "
            f"{sampling.max_new_tokens} tokens should end it. Its --max-model-len must hold prompt and response, and "
            "its --generation-config may name no other ends (use --generation-config vllm)"
        )
