"""Tokenizer, image processor and chat template of the embedded model."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from autoprune.tiny.questions import ask
from autoprune.tiny.scenes import draw_scene
from autoprune.tiny.vocabulary import COLOUR_NAMES, IMAGE_SIZE, LETTERS, PATCH_SIZE, SHAPES

PAD, BOS, EOS, IMAGE, USER, ASSISTANT = (
    "<pad>",
    "<s>",
    "</s>",
    "<image>",
    "<|user|>",
    "<|assistant|>",
)
SPECIAL_TOKENS = [PAD, BOS, EOS, IMAGE, USER, ASSISTANT]
VOCABULARY_SIZE = 560
# Words with their space, numbers of at most two digits, and capitals one by one, so that a sign
# is read letter by letter.
_PIECES = r" ?[a-z]+| ?\d{1,2}| ?[A-Z]| ?[^\sa-zA-Z\d]+|\s+"

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% else %}{{ '<|user|>' }}{% endif %}
{%- if message['content'] is string %}{{ ' ' + message['content'] | trim }}
{%- else %}
{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ ' ' + part['text'] | trim }}
{%- endfor %}
{%- endif %}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def train_tokenizer(scenes: int = 150) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained in memory on the questions and answers of drawn scenes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(scenes), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": IMAGE},
    )


def _corpus(scenes: int) -> Iterator[str]:
    for seed in range(scenes):
        for question in ask(draw_scene(seed, "train"), seed):
            yield f" {question.text}"
            yield f" {question.answer}"
    # Every word, number and letter that can occur becomes one token.
    for _ in range(50):
        yield "".join(f" {word}" for word in (*COLOUR_NAMES, *SHAPES))
        yield "".join(f" {number}" for number in range(19))
        yield "".join(f" {letter}{letter}" for letter in LETTERS)


def make_processor() -> LlavaProcessor:
    """The processor with its chat template; pictures of any size become 96x96."""
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=train_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
