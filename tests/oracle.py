"""The slow, plain answer that pruning has to equal.

Nothing is removed here. The unpruned model runs over the whole sequence, and a token that was
dropped on entering layer l is hidden by an additive mask from every other token in layer l and in
all later layers. Positions, sliding windows and bidirectional blocks stay those of the full
sequence. Generated tokens are appended and computed anew, so no cache takes part either.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]
# For a layer: which columns take on other hidden states on entering [batch, length], and which [..., hidden].
States = Mapping[int, tuple[torch.Tensor, torch.Tensor]]


def oracle_logits(
    model: nn.Module,
    inputs: Inputs,
    kept_columns: Sequence[torch.Tensor],
    tokens: torch.Tensor | None = None,
    positions: str = "original",
    states: States | None = None,
    summary: Summary | None = None,
    biases: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits of the pruned model, computed by hiding.

    Args:
        inputs: arguments of a plain forward, left-padded if `tokens` are given.
        kept_columns: for every layer a bool mask [batch, prompt length] over the padded columns of
            the prompt: which tokens still exist on entering that layer (padding may be anything).
        tokens: generated tokens [batch, steps], visible to everything behind them.
        positions: "compacted" numbers the tokens that are left anew in every layer.
        states: for some layers, which columns take on other hidden states on entering, and which.
        summary: what stands for the dropped visual tokens.
        biases: for every layer [batch, prompt length], added to the scores on each column.

    Returns:
        [batch, steps + 1, vocabulary]: the row of the prompt's last column, then one per token.
        Without `tokens`, [batch, 1, vocabulary]; `oracle_forward` gives the logits of every column.
    """
    prompt = inputs["input_ids"].shape[1]
    grown = append(model, inputs, tokens)
    if biases is None:
        logits = oracle_forward(model, grown, kept_columns, positions, states, summary)
        return logits[:, prompt - 1 :]
    with contextlib.ExitStack() as stack:
        for layer, bias in zip(decoder(model).layers, biases, strict=True):
            handle = layer.register_forward_pre_hook(_add(bias), with_kwargs=True)
            stack.callback(handle.remove)
        logits = oracle_forward(model, grown, kept_columns, positions, states, summary)
    return logits[:, prompt - 1 :]


def plain_logits(
    model: nn.Module, inputs: Inputs, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """The unpruned model's logits, in the shape of `oracle_logits`."""
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**append(model, inputs, tokens), use_cache=False).logits
    return logits[:, prompt - 1 :]


def oracle_forward(
    model: nn.Module,
    inputs: Inputs,
    kept_columns: Sequence[torch.Tensor],
    positions: str = "original",
    states: States | None = None,
    summary: Summary | None = None,
) -> torch.Tensor:
    """Logits [batch, length, vocabulary] of a plain forward in which dropped tokens are hidden."""
    prompt = kept_columns[0].shape[1]
    if prompt > inputs["input_ids"].shape[1]:
        raise ValueError(f"{prompt} columns for a prompt of {inputs['input_ids'].shape[1]}")
    with hiding(model, kept_columns, positions, states, summary), torch.no_grad():
        return model(**inputs, use_cache=False).logits


@dataclass
class Summary:
    """What stands for the dropped visual tokens of each prompt.

    columns: where it stands in each prompt, -1 for a prompt without one; visual: bool [batch, length].
    """

    columns: Sequence[int]
    visual: torch.Tensor
    strength: float = 1.0
    typical: bool = False

    def __post_init__(self) -> None:
        self.sizes = [1] * len(self.columns)

    def hook(self, dropped: torch.Tensor) -> Any:
        """For a layer in front of which these tokens, bool [batch, length], are dropped."""

        def change(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            entering, mask = args[0].clone(), kwargs["attention_mask"].clone()
            copies = len(entering) // len(self.columns)
            for row in range(len(entering)):
                prompt = row // copies
                column, gone = self.columns[prompt], dropped[prompt].nonzero().flatten().tolist()
                if column < 0:
                    continue
                if gone and row % copies == 0:
                    self.sizes[prompt] += len(gone)
                size = self.sizes[prompt]
                if gone:
                    entering[row, column] = self._mean(args[0][row], column, size - len(gone), gone)
                mask[row, :, :, column] += self.strength * math.log(size)
            return (entering, *args[1:]), kwargs | {"attention_mask": mask}

        return change

    def _mean(self, states: torch.Tensor, column: int, size: int, gone: list[int]) -> torch.Tensor:
        total = states[column] * size
        norm = float(states[column].norm()) * size
        for other in gone:
            total = total + states[other]
            norm += float(states[other].norm())
        mean = total / (size + len(gone))
        if self.typical:
            mean = mean / mean.norm() * (norm / (size + len(gone)))
        return mean


def summary_of(samples: Sequence[Any], attention_mask: torch.Tensor, form: Any) -> Summary | None:
    """The summaries that a trace speaks of, made in the form of the method (`SummaryToken`)."""
    if form is None:
        return None
    columns, visual = [], torch.zeros_like(attention_mask, dtype=torch.bool)
    for row, sample in enumerate(samples):
        places = attention_mask[row].nonzero().flatten()[sample.visual_positions]
        visual[row, places] = True
        token = sample.summary_token
        columns.append(-1 if token is None else int(places[token]))
        _check_place(sample, form)
    return Summary(columns, visual, form.strength, form.norm == "typical")


def _check_place(sample: Any, form: Any) -> None:
    """A summary stands where it is said to: by what the first cut that drops anything leaves."""
    cut = next((kept for kept in sample.kept if len(kept) < sample.num_visual), None)
    if cut is None or sample.summary_token is None:
        assert sample.summary_token is None or cut is not None
        return
    others = set(cut.tolist()) - {sample.summary_token}
    dropped = [token for token in range(sample.num_visual) if token not in others]
    if form.position == "last":
        assert sample.summary_token == dropped[-1]
        return
    mean = sum(dropped) / len(dropped)
    nearest = min(abs(token - mean) for token in dropped)
    assert abs(abs(sample.summary_token - mean) - nearest) < 1e-4


@contextlib.contextmanager
def hiding(
    model: nn.Module,
    kept_columns: Sequence[torch.Tensor],
    positions: str = "original",
    states: States | None = None,
    summary: Summary | None = None,
) -> Iterator[None]:
    """Hide dropped tokens in forwards without a cache, `generate(use_cache=False)` included."""
    text = decoder(model)
    layers = text.layers
    _check(kept_columns, len(layers))
    rotary = text.rotary_emb if positions == "compacted" else None
    before = torch.ones_like(kept_columns[0])
    with contextlib.ExitStack() as stack:
        stack.enter_context(_eager_decoder(model))
        for index, (layer, kept) in enumerate(zip(layers, kept_columns, strict=True)):
            if not _attends(text, index):
                stack.enter_context(_without(layer, kept))
                continue
            changed = (states or {}).get(index)
            hook = layer.register_forward_pre_hook(_hide(kept, rotary, changed), with_kwargs=True)
            stack.callback(hook.remove)
            if summary is not None:
                dropped = before & ~kept if index else summary.visual & ~kept
                hook = layer.register_forward_pre_hook(summary.hook(dropped), with_kwargs=True)
                stack.callback(hook.remove)
            before = kept
        yield


def decoder(model: nn.Module) -> Any:
    """The stack of layers; Llama 4 gives a language model that holds it."""
    text = model.get_decoder()
    return text if hasattr(text, "layers") else text.model


def append(model: nn.Module, inputs: Inputs, tokens: torch.Tensor | None) -> Inputs:
    """The same inputs with generated tokens [batch, steps] behind the prompt."""
    if tokens is None or tokens.shape[1] == 0:
        return dict(inputs)
    grown = dict(inputs)
    grown["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    ones = torch.ones_like(tokens)
    grown["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            # PaliGemma calls its bidirectional prefix 0 and what follows 1; elsewhere text is 0.
            kind = 1 if model.config.model_type == "paligemma" else 0
            grown[name] = torch.cat([inputs[name], torch.full_like(tokens, kind)], dim=1)
    return grown


def columns_from_trace(
    samples: Sequence[Any], attention_mask: torch.Tensor, num_layers: int
) -> list[torch.Tensor]:
    """What a trace says was kept, as `kept_columns`: `num_layers` masks [batch, prompt length].

    Args:
        samples: one per prompt, with `visual_positions` (positions without padding) and, for every
            layer, `kept[l]` (ascending indices into `visual_positions`).
        attention_mask: [batch, prompt length], 0 on padding, on either side.
    """
    if len(samples) != len(attention_mask):
        raise ValueError(f"{len(samples)} samples for a batch of {len(attention_mask)}")
    columns = [attention_mask.bool().clone() for _ in range(num_layers)]
    for row, sample in enumerate(samples):
        real = attention_mask[row].nonzero().squeeze(1)
        visual = real[sample.visual_positions]
        if len(sample.kept) != num_layers:
            raise ValueError(f"{len(sample.kept)} layers in the trace of {num_layers}")
        for layer, kept in enumerate(sample.kept):
            if len(kept) > 1 and not bool((kept[1:] > kept[:-1]).all()):
                raise ValueError(f"kept[{layer}] of prompt {row} is not ascending: {kept}")
            columns[layer][row, visual] = False
            columns[layer][row, visual[kept]] = True
    return columns


@dataclass
class Comparison:
    """One method against the oracle. Step 0 is the prefill, the others are greedy decode steps.

    generate, manual: largest absolute difference per step, through `model.generate` and through
        plain forwards with a cache.
    effect: per prompt, how far pruning moved the logits of the prefill.
    samples: the trace of the generation.
    """

    generate: list[float]
    manual: list[float]
    effect: list[float]
    samples: list[Any]
    tokens: torch.Tensor

    @property
    def worst(self) -> float:
        return max(self.generate + self.manual)


def compare(model: nn.Module, inputs: Inputs, method: Any, steps: int = 3) -> Comparison:
    """Prune with `method`, then compute the same logits the slow way."""
    batch, layers = inputs["attention_mask"], len(decoder(model).layers)
    with method(model) as trace:
        logits, tokens = generate_logits(model, inputs, steps)
        samples = list(trace.samples)
    with method(model) as trace:
        manual = manual_logits(model, inputs, tokens[:, :steps])
        again = list(trace.samples)
    expected, expected_again = (
        oracle_logits(
            model,
            inputs,
            columns_from_trace(kept, batch, layers),
            tokens[:, :steps],
            positions=getattr(method, "positions", "original"),
            summary=summary_of(kept, batch, getattr(method, "summary", None)),
        )
        for kept in (samples, again)
    )
    plain = plain_logits(model, inputs)
    return Comparison(
        generate=_per_step(logits, expected),
        manual=_per_step(manual, expected_again),
        effect=(expected[:, 0] - plain[:, 0]).abs().amax(dim=-1).tolist(),
        samples=samples,
        tokens=tokens,
    )


def generate_logits(
    model: nn.Module, inputs: Inputs, steps: int, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy `generate`: logits [batch, steps + 1, vocabulary], tokens [batch, steps + 1]."""
    out = model.generate(
        **inputs,
        max_new_tokens=steps + 1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    prompt = inputs["input_ids"].shape[1]
    return torch.stack(out.logits, dim=1), out.sequences[:, prompt:]


def manual_logits(
    model: nn.Module, inputs: Inputs, tokens: torch.Tensor, cache: Any = None
) -> torch.Tensor:
    """A hand-written decode loop along given tokens: [batch, steps + 1, vocabulary].

    Without `cache` the model makes its own.
    """
    conversation = Conversation(model, inputs, cache)
    rows = [conversation.logits[:, -1]]
    rows += [
        conversation.feed(tokens[:, step : step + 1])[:, -1] for step in range(tokens.shape[1])
    ]
    return torch.stack(rows, dim=1)


class Conversation:
    """Plain forwards on one cache: the prompt first, then whatever is fed."""

    def __init__(self, model: nn.Module, inputs: Inputs, cache: Any = None):
        self.model, self.mask = model, inputs["attention_mask"]
        given = {} if cache is None else {"past_key_values": cache}
        with torch.no_grad():
            out = model(**inputs, use_cache=True, **given)
        self.cache, self.logits = out.past_key_values, out.logits
        self.deltas = getattr(model.base_model, "rope_deltas", None)

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, new, vocabulary] of new text tokens [batch, new]."""
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
        positions = {}
        if self.deltas is not None:  # the M-RoPE families cannot derive them from a padded mask
            place = self.mask.cumsum(dim=1)[:, -tokens.shape[1] :] - 1 + self.deltas
            positions = {"position_ids": place.expand(3, *place.shape)}
        with torch.no_grad():
            out = self.model(
                input_ids=tokens,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                **positions,
            )
        self.cache = out.past_key_values
        return out.logits


def beam_search(
    model: nn.Module, inputs: Inputs, method: Any, beams: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that a pruned model finds by beams, and those found where dropped tokens are hidden."""
    options = {"max_new_tokens": tokens, "num_beams": beams, "do_sample": False}
    batch = inputs["attention_mask"]
    with method(model) as trace:
        pruned = model.generate(**inputs, **options)
    # Older releases repeat the prompts before the prefill.
    samples = trace.samples[:: len(trace.samples) // len(batch)]
    columns = columns_from_trace(samples, batch, len(decoder(model).layers))
    with hiding(model, columns):
        return pruned, model.generate(**inputs, **options, use_cache=False)


def _per_step(actual: torch.Tensor, expected: torch.Tensor) -> list[float]:
    return (actual - expected).abs().amax(dim=(0, 2)).tolist()


def _check(kept_columns: Sequence[torch.Tensor], layers: int) -> None:
    if len(kept_columns) != layers:
        raise ValueError(f"kept_columns has {len(kept_columns)} entries for {layers} layers")
    for layer in range(1, layers):
        risen = kept_columns[layer] & ~kept_columns[layer - 1]
        if risen.any():
            raise ValueError(
                f"tokens dropped before layer {layer} come back in it: {risen.nonzero()}"
            )


@contextlib.contextmanager
def _eager_decoder(model: nn.Module) -> Iterator[None]:
    """Only eager attention always gets an explicit additive mask."""
    config = decoder(model).config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def _attends(text: nn.Module, index: int) -> bool:
    kinds = getattr(text.config, "layer_types", None)
    return kinds is None or kinds[index] not in ("linear_attention", "conv")


@contextlib.contextmanager
def _without(layer: nn.Module, kept: torch.Tensor) -> Iterator[None]:
    """A layer that passes a state on cannot have a token hidden: it runs on the kept ones, prompt by prompt."""
    run = layer.forward

    def forward(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for row in range(len(hidden)):
            new = torch.ones(hidden.shape[1] - kept.shape[1], dtype=torch.bool)
            left = torch.cat([kept[row // (len(hidden) // len(kept))], new])
            out[row, left] = run(hidden[row : row + 1, left], **kwargs | {"attention_mask": None})[
                0
            ]
        return out

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _add(bias: torch.Tensor) -> Any:
    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask = kwargs["attention_mask"].expand(len(bias), -1, -1, -1).clone()
        mask[..., : bias.shape[1]] += bias[:, None, None]
        return args, kwargs | {"attention_mask": mask}

    return hook


def _hide(
    kept: torch.Tensor,
    rotary: nn.Module | None,
    states: tuple[torch.Tensor, torch.Tensor] | None,
) -> Any:
    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask = kwargs["attention_mask"]
        if mask is None or mask.ndim != 4 or mask.dtype == torch.bool:
            raise RuntimeError("the oracle needs the explicit additive mask of eager attention")
        length, copies = mask.shape[-1], args[0].shape[0] // kept.shape[0]
        hidden = torch.zeros(kept.shape[0] * copies, length, dtype=torch.bool)
        hidden[:, : kept.shape[1]] = ~kept.repeat_interleave(copies, dim=0)  # beams of a prompt
        # A dropped token still sees itself, which keeps its unused row finite.
        blocked = hidden[:, None, None, :] & ~torch.eye(length, dtype=torch.bool)
        # Gemma 4 goes on with the last token alone in its last layers.
        blocked = blocked[:, :, -mask.shape[2] :]
        mask = mask.expand(hidden.shape[0], -1, -1, -1)
        changed = {"attention_mask": mask.masked_fill(blocked, torch.finfo(mask.dtype).min)}
        if rotary is not None:
            order = ((~hidden).cumsum(dim=1) - 1).clamp(min=0)
            changed["position_embeddings"] = rotary(args[0], order)
        if states is not None:
            columns, values = states
            entering = args[0].clone()
            entering[:, : columns.shape[1]][columns] = values[columns].to(entering)
            args = (entering, *args[1:])
        return args, kwargs | changed

    return hook
