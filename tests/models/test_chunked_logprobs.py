"""Log-probs made a chunk of tokens at a time: the same numbers and gradients as from all logits at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    PreTrainedConfig,
    RecurrentGemmaConfig,
)

from perl_vlm.errors import PerlVlmError
from perl_vlm.formulas import inverse_cdf, token_entropy, token_logprobs
from perl_vlm.models import forward, lm_head
from perl_vlm.models import logits as logits_module
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.chunks import chunk_tokens
from perl_vlm.models.forward import response_hidden, response_logits, response_logprobs, response_states
from perl_vlm.models.logits import filter_top_p, logprobs_of
from perl_vlm.models.shared_prefix import refuse
from perl_vlm.types import Sequences

VOCABULARY = 97
PROMPT, RESPONSE, ROWS = 5, 6, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Values(nn.Module):
    """A value head as ``perl_vlm.models.heads`` has it, trainable."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, SIZES["hidden_size"]))

    def value(self, hidden: Tensor) -> Tensor:
        return hidden.float() @ self.weight


def build(config: PreTrainedConfig, head_scale: float = 20.0) -> Backbone:
    """A random model whose logits are large enough for what is done to them afterwards to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.mul_(head_scale)
    tokenizer = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return Backbone(
        name="random", revision=None, model=model, processor=tokenizer, tokenizer=tokenizer, eos_ids=(2,),
        sees_images=False, generation_config=model.generation_config,
    )  # fmt: skip


def llama(**changes: Any) -> Backbone:
    return build(LlamaConfig(**{**SIZES, **changes}))


@pytest.fixture
def sequences() -> Sequences:
    """Four rows with prompts of 5, 4, 3, 2 tokens and responses of 6, 5, 4, 3; padding is full of real-looking ids."""
    ids = torch.randint(3, VOCABULARY, (ROWS, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(ids)
    for row in range(ROWS):
        attention[row, :row] = 0
        attention[row, PROMPT + RESPONSE - row :] = 0
    return Sequences(ids, attention, attention[:, PROMPT:].bool(), {}, (0,) * ROWS)


def at_once(backbone: Backbone, sequences: Sequences, **settings: Any) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies from [B, R, V], zero outside the responses."""
    logits = response_logits(backbone.model, backbone, sequences, **settings)
    mask = sequences.response_mask
    logprobs = token_logprobs(logits, sequences.input_ids[:, PROMPT:])
    return logprobs.masked_fill(~mask, 0.0), token_entropy(logits).masked_fill(~mask, 0.0)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.7, "min_new_tokens": 2}, {"temperature": 0.5, "top_p": 0.8}]
)
@pytest.mark.parametrize("chunk", [1, 4, 18, 1000, None])
def test_any_chunk_gives_the_numbers_and_gradients_of_all_logits_at_once(
    chunk: int | None, settings: dict[str, Any], sequences: Sequences
) -> None:
    def gradients(logprobs: Tensor, entropy: Tensor, values: Tensor) -> list[Tensor]:
        weights = torch.linspace(0.5, 1.5, RESPONSE)
        return list(torch.autograd.grad(((2 * logprobs - 0.3 * entropy + values**2) * weights).sum(), trained))

    backbone, head = llama(), Values()
    refuse(backbone.model, "rows of their own are wanted: what is compared is the head's work, not attention's")
    trained = [*backbone.model.parameters(), *head.parameters()]
    mask = sequences.response_mask
    logprobs, entropy = at_once(backbone, sequences, **settings)
    values = head.value(response_hidden(backbone.model, backbone, sequences)[:, :-1]).masked_fill(~mask, 0.0)
    got = response_logprobs(backbone.model, backbone, sequences, value_head=head, chunk=chunk, **settings)
    assert got.values is not None
    torch.testing.assert_close(got.logprobs, logprobs, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(got.entropy, entropy, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(got.values, values, atol=2e-6, rtol=2e-6)
    wanted = gradients(logprobs, entropy, values)
    for mine, other in zip(gradients(got.logprobs, got.entropy, got.values), wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
    with torch.no_grad():
        still = response_logprobs(backbone.model, backbone, sequences, value_head=head, chunk=chunk, **settings)
    torch.testing.assert_close(still.logprobs, got.logprobs, atol=2e-6, rtol=2e-6)
    assert not still.logprobs.requires_grad
    assert (got.logprobs[~mask] == 0).all()
    assert (got.entropy[~mask] == 0).all()
    assert (got.values[~mask] == 0).all()


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor made."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.seen = max(self.seen, tensor.numel())
        return out


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_no_tensor_is_as_large_as_all_logits_forwards_or_backwards(top_p: float, sequences: Sequences) -> None:
    """PITFALLS: a rollout or a recomputation that keeps B x T x V logits."""
    vocabulary = 1 + 1024 * 4
    backbone = llama(vocab_size=vocabulary, tie_word_embeddings=False)
    backbone.model.requires_grad_(False)
    backbone.model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with Largest() as largest:
        got = response_logprobs(backbone.model, backbone, sequences, top_p=top_p, chunk=2)
        (got.logprobs + got.entropy).sum().backward()
    # The embedding and the head hold H x V; the model's own last column makes B x V.
    assert largest.seen <= max(ROWS, 2, SIZES["hidden_size"]) * vocabulary
    tokens = int(sequences.response_mask.sum())
    assert tokens > SIZES["hidden_size"], "the bound above would not notice N x V"
    with Largest() as largest:
        response_logits(backbone.model, backbone, sequences)
    assert largest.seen >= ROWS * RESPONSE * vocabulary, "the spy sees nothing"


def test_backward_keeps_no_logits(sequences: Sequences) -> None:
    """What autograd saves for later is N x H, not N x V, however small the chunks."""
    backbone = llama(vocab_size=4096)
    states = response_states(backbone.model, backbone, sequences)
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logprobs_of(states, chunk=4)
    assert max(sizes, default=0) < 4096


def test_the_chunk_fits_its_budget() -> None:
    backbone = llama()
    nothing = torch.zeros((1, 3), dtype=torch.long)
    none = Sequences(nothing, nothing + 1, torch.zeros((1, 1), dtype=torch.bool), {}, (0,))
    states = response_states(backbone.model, backbone, none)
    assert states.chunk(None) * 4 * VOCABULARY <= 2**22 < (states.chunk(None) + 1) * 4 * VOCABULARY
    assert (
        chunk_tokens(VOCABULARY, "cuda") * 4 * VOCABULARY
        <= 2**27
        < (chunk_tokens(VOCABULARY, "cuda") + 1) * 4 * VOCABULARY
    )
    assert states.chunk(7) == 7
    got = logprobs_of(states)
    assert got.logprobs.tolist() == [[0.0]]
    assert got.entropy.tolist() == [[0.0]]
    with pytest.raises(ValueError, match="at least one token, got 0"):
        logprobs_of(states, chunk=0)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        logprobs_of(states, temperature=0.0)


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma2": lambda: Gemma2Config(**SIZES, final_logit_softcapping=3.0),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, final_logit_softcapping=3.0),
    "cohere2": lambda: Cohere2Config(**SIZES, logit_scale=0.0625),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=8.0),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        lru_width=16, logits_soft_cap=3.0,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64, pad_token_id=0,
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_does_to_its_logits_is_done(family: str, sequences: Sequences) -> None:
    """Soft caps and scales come after the head, so that the head alone gives another policy."""
    backbone = build(FAMILIES[family]())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message=".*in a way of its own")
        got = response_logprobs(backbone.model, backbone, sequences, chunk=3).logprobs
        wanted, _ = at_once(backbone, sequences)
        states = response_states(backbone.model, backbone, sequences)
        bare = backbone.model.get_output_embeddings()(states.hidden)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    if family not in ("gpt2", "opt"):
        assert (bare - states.head(states.features)).abs().max() > 0.1, "nothing was done to these logits"


@pytest.fixture
def odd() -> Backbone:
    """A model that does something to its logits that no configuration tells."""
    backbone = llama()
    usual = backbone.model.forward

    @wraps(usual)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = usual(*args, **kwargs)
        output.logits = output.logits.roll(1, dims=-1) * 0.5
        return output

    backbone.model.forward = forward
    return backbone


def test_a_head_of_another_kind_is_noticed_and_the_models_own_logits_taken(odd: Backbone, sequences: Sequences) -> None:
    with pytest.warns(UserWarning, match="LlamaForCausalLM turns hidden states into logits in a way of its own"):
        got = response_logprobs(odd.model, odd, sequences, temperature=0.7, min_new_tokens=1, value_head=Values())
    logprobs, entropy = at_once(odd, sequences, temperature=0.7, min_new_tokens=1)
    torch.testing.assert_close(got.logprobs, logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.entropy, entropy, atol=1e-5, rtol=1e-5)
    assert got.values is not None
    usual = response_logprobs(llama().model, llama(), sequences, value_head=Values())
    torch.testing.assert_close(got.values, usual.values, atol=1e-5, rtol=1e-5)
    assert (got.logprobs - usual.logprobs).abs().max() > 0.1
    weight = odd.model.model.layers[0].self_attn.q_proj.weight
    mine, other = (torch.autograd.grad(value.sum(), weight)[0] for value in (got.logprobs, logprobs))
    torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        response_logprobs(odd.model, odd, sequences)


def test_a_family_with_a_head_of_another_kind(sequences: Sequences) -> None:
    """ModernBERT's decoder has a dense layer and a norm between its trunk and its output embeddings."""
    fitting = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
    backbone = build(ModernBertDecoderConfig(**fitting, cls_token_id=1, sep_token_id=2))
    with pytest.warns(UserWarning, match="in a way of its own"):
        got = response_logprobs(backbone.model, backbone, sequences)
    torch.testing.assert_close(got.logprobs, at_once(backbone, sequences)[0], atol=1e-5, rtol=1e-5)


def test_a_model_that_cannot_limit_its_logits(sequences: Sequences) -> None:
    """Without ``logits_to_keep`` the trunk is run by itself, and the head is learnt on one row."""
    backbone = llama()
    usual = backbone.model.forward

    def forward(
        input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool = False
    ) -> SimpleNamespace:
        rows.append(len(input_ids))
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        return SimpleNamespace(logits=usual(input_ids=input_ids, **given).logits)

    rows: list[int] = []
    backbone.model.forward = forward
    got = response_logprobs(backbone.model, backbone, sequences).logprobs
    response_logprobs(backbone.model, backbone, sequences)
    assert rows == [1]
    torch.testing.assert_close(got, at_once(backbone, sequences)[0], atol=1e-5, rtol=1e-5)


def test_a_half_precision_head_is_known_and_upcast(sequences: Sequences) -> None:
    backbone = llama()
    backbone.model.to(torch.bfloat16)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        got = response_logprobs(backbone.model, backbone, sequences, chunk=5).logprobs
        wanted, _ = at_once(backbone, sequences)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, atol=0.1, rtol=0.02)


def test_the_sampled_token_is_never_outside_its_nucleus() -> None:
    """An update moves tokens over the edge of the nucleus; a log-prob of minus infinity would end the run."""
    logits = torch.tensor([[3.0, 2.0, 1.0, -2.0]])
    assert filter_top_p(logits, 0.6)[0].isfinite().tolist() == [True, False, False, False]
    kept = filter_top_p(logits, 0.6, keep=torch.tensor([3]))
    assert kept[0].isfinite().tolist() == [True, False, False, True]
    banned = torch.tensor([[3.0, 2.0, 1.0, float("-inf")]])
    assert filter_top_p(banned, 0.6, keep=torch.tensor([3]))[0, 3] == float("-inf"), "a banned token came back"
    assert filter_top_p(logits, 1.0) is logits


def test_a_trunk_that_shows_no_states_has_no_values(sequences: Sequences) -> None:
    backbone = llama()
    backbone.model.base_model_prefix = "none"  # nothing but the whole model to listen to
    backbone.model.get_decoder = lambda: backbone.model
    with pytest.warns(UserWarning, match="in a way of its own"):
        got = response_logprobs(backbone.model, backbone, sequences).logprobs
    whole = llama()
    torch.testing.assert_close(got, response_logprobs(whole.model, whole, sequences).logprobs, atol=1e-5, rtol=1e-5)
    with pytest.raises(PerlVlmError, match="shows no last hidden state"):
        response_logprobs(backbone.model, backbone, sequences, value_head=Values())
    with pytest.raises(PerlVlmError, match="returns no last_hidden_state"):
        response_hidden(backbone.model, backbone, sequences)


def test_a_head_of_its_own_kind_is_refused_on_a_sharded_base(
    sequences: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward pass for each row, and ranks have different numbers of rows: they would wait for one another."""
    backbone = llama()
    monkeypatch.setattr(lm_head, "_matching", lambda *arguments: None)
    monkeypatch.setattr(forward, "is_sharded", lambda model: True)
    with (
        pytest.warns(UserWarning, match="in a way of its own"),
        pytest.raises(PerlVlmError, match=r"a forward pass for each row; a base that is sharded.*accelerate/ddp"),
    ):
        response_logprobs(backbone.model, backbone, sequences)


def test_the_marks_of_special_tokens_are_made_once() -> None:
    """The sampler asks for them at every token; on an accelerator each copy of the ids waits for the device."""
    logits = torch.zeros(2, VOCABULARY)
    first, again = (logits_module._among((3, VOCABULARY + 5), logits) for _ in range(2))
    assert first is again
    assert first.nonzero()[:, 0].tolist() == [3]


def test_drawing_without_looking_at_the_values_draws_the_same() -> None:
    """On an accelerator the look waits for the device at every token, so the sampler may leave it out."""
    probs = torch.rand(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    uniform = torch.linspace(0, 0.999, 5, dtype=torch.float64)
    assert torch.equal(inverse_cdf(probs, uniform, check=False), inverse_cdf(probs, uniform))
    probs[3] = float("nan")
    with pytest.raises(ValueError, match=r"rows \[3\]"):
        inverse_cdf(probs, uniform)
    token = int(inverse_cdf(probs, uniform, check=False)[3])
    assert probs[3, token].isnan(), "its log-prob tells, at the end of the rollout"
