"""The page itself: three tabs of gradio components, and what happens when they are used."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from .. import tiny
from ..commands.explanation import information_of_flat, schedules_at
from ..commands.report import as_options, bits, saved
from ..errors import UnsupportedError
from ..loading import Loaded
from ..methods import list_methods
from ..methods.autoprune import AutoPrune
from ..methods.base import Method
from ..trace import Sample
from ..viz import kept_at_layer, retention_curves, tokens_against_flat
from ..viz.page import paragraph, table
from .asking import Asked, ask, build, compare, warm_up
from .conversation import Conversation, keep_recent
from .upload import MAX_BYTES, read_upload

HOURS = 3600
MOST_METHODS = 8
MOST_BROWSERS = 32
_COMPARED = ("autoprune", "divprune", "fastv", "scope")
# Fonts of the reader's own system: others would be fetched.
_THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def launch(loaded: Loaded, method: str, percent: float, host: str, port: int) -> gr.Blocks:
    """Serve the page by threads of its own.

    Args:
        method, percent: what is chosen at first.
    """
    warm_up(loaded)
    page = make_page(loaded, method, percent)
    page.queue(max_size=32)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=MAX_BYTES,
        theme=_THEME,
        footer_links=[],
        quiet=True,
        # What a browser was answered is in memory, with its picture and its cache.
        state_session_capacity=MOST_BROWSERS,
        prevent_thread_lock=True,
    )
    return page


def make_page(loaded: Loaded, method: str = "autoprune", percent: float = 11) -> gr.Blocks:
    """The page of one model."""
    with gr.Blocks(title="AutoPrune", analytics_enabled=False, delete_cache=(HOURS, HOURS)) as page:
        gr.Markdown(
            f"# AutoPrune\nAsk about a picture. **{loaded.name}** answers twice: with a share of the visual "
            "tokens, and with all of them."
        )
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    label="Picture",
                    format="png",
                    elem_id="picture",
                    height=260,
                    sources=["upload", "clipboard"],
                )
                # Hands over the file itself: the header is read before anything is decoded.
                picture.preprocess = _file_of  # type: ignore[method-assign]
                move = _only_files(picture.async_move_resource_to_block_cache)
                picture.async_move_resource_to_block_cache = move  # type: ignore
                folder = picture.GRADIO_CACHE
                with gr.Row():
                    draw = gr.Button("Draw a scene", elem_id="draw")
                    kind = gr.Dropdown(
                        [*tiny.EASY, *tiny.HARD],
                        value="colour",
                        label="and ask for",
                        elem_id="kind",
                    )
            with gr.Column():
                question = gr.Textbox(label="Question", elem_id="question")
                name = gr.Dropdown(list_methods(), value=method, label="Method", elem_id="method")
                share = gr.Slider(
                    min(1, percent),
                    100,
                    percent,
                    label="Visual tokens kept, mean of all layers, %",
                    elem_id="budget",
                )
                summary = gr.Checkbox(
                    label="One summary token stands for those that are dropped", elem_id="summary"
                )
        draw.click(_draw, kind, [picture, question], concurrency_limit=None)
        asks = [picture, question, name, share, summary]
        with gr.Tab("Ask"):
            _ask_tab(loaded, folder, asks)
        with gr.Tab("Compare methods"):
            _compare_tab(loaded, folder, [picture, question, share])
        with gr.Tab("Conversation"):
            _conversation_tab(loaded, folder, picture, [name, share, summary])
    return page


def _ask_tab(loaded: Loaded, folder: str, asks: Sequence[Any]) -> None:
    button = gr.Button("Ask", variant="primary", elem_id="ask")
    asked = gr.State(time_to_live=HOURS)
    with gr.Row():
        pruned = gr.Textbox(label="Answer, pruned", elem_id="pruned")
        full = gr.Textbox(label="Answer, all visual tokens", elem_id="full")
    costs = gr.HTML(elem_id="costs")
    with gr.Row():
        with gr.Column():
            layer = gr.Slider(0, 1, 0, step=1, label="Layer", elem_id="layer", interactive=True)
            kept = gr.Image(
                label="What enters the layer",
                show_label=False,
                elem_id="kept",
                format="png",
                buttons=["download", "fullscreen"],
            )
        curve = gr.Plot(label="Visual tokens over depth", show_label=False, elem_id="curve")

    def run(path: str | None, words: str, method: str, percent: float, with_summary: bool) -> Any:
        found = ask(loaded, read_upload(path, folder), words, build(method, percent, with_summary))
        middle = len(found.sample.kept) // 2
        slider = gr.Slider(maximum=len(found.sample.kept) - 1, value=middle)
        return (
            found,
            found.pruned.text,
            found.full.text,
            _costs(found),
            slider,
            _kept(found, middle),
            _curve(loaded, found),
        )

    outputs = [asked, pruned, full, costs, layer, kept, curve]
    for event in (button.click, asks[1].submit):
        event(_said(run), asks, outputs, concurrency_limit=1, concurrency_id="model")
    layer.input(_kept, [asked, layer], kept, concurrency_limit=None, show_progress="hidden")


def _compare_tab(loaded: Loaded, folder: str, asks: Sequence[Any]) -> None:
    names = gr.CheckboxGroup(
        list_methods(),
        value=list(_COMPARED),
        label=f"Methods, {MOST_METHODS} at most",
        elem_id="names",
    )
    button = gr.Button("Compare", variant="primary", elem_id="compare")
    rows = gr.HTML(elem_id="rows")
    gallery = gr.Gallery(
        label="What enters the middle layer",
        elem_id="gallery",
        format="png",
        columns=4,
        object_fit="contain",
        buttons=["download", "fullscreen"],
    )

    def run(path: str | None, words: str, percent: float, chosen: list[str]) -> Any:
        if not 1 <= len(chosen) <= MOST_METHODS:
            raise ValueError(f"choose between 1 and {MOST_METHODS} methods, not {len(chosen)}")
        methods = [build(method, percent) for method in chosen]
        full, found, seen = compare(loaded, read_upload(path, folder), words, methods)
        lines = [["all visual tokens", full.text, "", "", "", _ms(full.first_token_seconds)]]
        pictures = []
        for method, result in zip(methods, found, strict=True):
            if isinstance(result, str):
                lines.append(
                    [method.name, f"not run: {as_options(result, '', '--set ')}", "", "", "", ""]
                )
                continue
            given, sample = result
            lines.append([method.name, given.text, *_spent(sample), _ms(given.first_token_seconds)])
            if seen:
                picture = kept_at_layer(seen, sample, len(sample.kept) // 2)
                pictures.append((picture, method.name))
        head = ("method", "answer", "mean tokens", "FLOPs saved", "KV saved", "first token")
        return table(head, lines, texts=True), pictures

    button.click(
        _said(run), [*asks, names], [rows, gallery], concurrency_limit=1, concurrency_id="model"
    )


def _conversation_tab(loaded: Loaded, folder: str, picture: Any, settings: Sequence[Any]) -> None:
    gr.Markdown(
        "The picture is pruned once, for the first question. Later questions go on with the same cache, where "
        "the model's template allows it. The picture, the method and the share are those of the first question."
    )
    talk = gr.State(time_to_live=HOURS)
    chat = gr.Chatbot(label="Conversation", elem_id="chat", buttons=["copy"], render_markdown=False)
    words = gr.Textbox(label="Say", elem_id="say")
    with gr.Row():
        send = gr.Button("Send", variant="primary", elem_id="send")
        again = gr.Button("Begin anew", elem_id="anew")
    note = gr.HTML(elem_id="note")
    # A cache may fill a part of a GPU, and a browser that was closed is known for an hour.
    recent: list[weakref.ref[Conversation]] = []

    def run(
        current: Conversation | None,
        said: str,
        path: str | None,
        method: str,
        percent: float,
        with_summary: bool,
    ) -> Any:
        if current is None:
            current = Conversation(read_upload(path, folder), build(method, percent, with_summary))
        current.ask(loaded, said)
        keep_recent(recent, current)
        lines = [
            {"role": role, "content": text}
            for turn in current.turns
            for role, text in (("user", turn.question), ("assistant", turn.answer))
        ]
        return current, lines, "", _turns(current)

    inputs = [talk, words, picture, *settings]
    for event in (send.click, words.submit):
        event(
            _said(run),
            inputs,
            [talk, chat, words, note],
            concurrency_limit=1,
            concurrency_id="model",
        )
    for event in (again.click, chat.clear):
        event(lambda: (None, [], "", ""), None, [talk, chat, words, note])


def _only_files(move: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keep gradio from fetching what a request names by an address."""

    async def moved(path: Any) -> Any:
        if "://" in str(path):
            raise gr.Error("addresses are not fetched; upload the picture", print_exception=False)
        return await move(path)

    return moved


def _file_of(payload: Any) -> str | None:
    """The file of an upload."""
    return None if payload is None else payload.path


def _said(run: Callable[..., Any]) -> Callable[..., Any]:
    """Tell the reader in a sentence what cannot be done."""

    def told(*values: Any) -> Any:
        try:
            return run(*values)
        except (ValueError, UnsupportedError) as error:
            message = as_options(str(error), budget="", setting="--set ")
            raise gr.Error(message, duration=None, print_exception=False) from error

    return told


def _draw(kind: str) -> tuple[Image.Image, str]:
    """A scene that nobody drew before, and a question of a kind that it can answer."""
    while True:
        seed = random.randrange(1_000_000)
        scene = tiny.draw_scene(seed, split="heldout")
        found = tiny.ask(scene, seed, [kind])
        if found:
            return scene.image.resize((384, 384), Image.Resampling.NEAREST), found[0].text


def _costs(found: Asked) -> str:
    sample = found.sample
    rows = [
        ["visual tokens, mean per layer", f"{sample.mean_tokens:.4g}", str(sample.num_visual), ""],
        ["decoder prefill, GFLOPs", *_pair(sample.total_flops / 1e9, sample.flops_full / 1e9)],
        ["KV cache, MB", *_pair(sample.kv_bytes / 1e6, sample.kv_bytes_full / 1e6)],
        [
            "first token, ms",
            *_pair(found.pruned.first_token_seconds * 1e3, found.full.first_token_seconds * 1e3),
        ],
    ]
    rows[0][3] = saved(sample.mean_tokens, sample.num_visual)
    if sample.mutual_information is not None:
        rows.append(["mutual information, bits", bits(sample.mutual_information), "", ""])
    words = "Times are of one run, vision tower included; autoprune bench measures."
    return table(("", "pruned", "all visual tokens", "saved"), rows) + paragraph(words)


def _pair(spent: float, full: float) -> list[str]:
    return [f"{spent:.4g}", f"{full:.4g}", saved(spent, full)]


def _spent(sample: Sample) -> list[str]:
    return [
        f"{sample.mean_tokens:.4g}",
        saved(sample.total_flops, sample.flops_full),
        saved(sample.kv_bytes, sample.kv_bytes_full),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _kept(found: Asked | None, layer: float) -> Image.Image | None:
    """What enters a layer; nothing before a question, and where the family's grid is not known."""
    if found is None or not found.views:
        return None
    return kept_at_layer(found.views, found.sample, min(int(layer), len(found.sample.kept) - 1))


def _curve(loaded: Loaded, found: Asked) -> Any:
    method: Method = found.method
    sample = found.sample
    if isinstance(method, AutoPrune) and sample.mutual_information is not None:
        ends = (0.0, information_of_flat(method, sample))
        least, most = schedules_at(ends, loaded, method, sample)
        this = sample.mutual_information, sample.tokens_per_layer
        return retention_curves(least, this, most, ("no information", "flat curve"))
    return tokens_against_flat(sample)


def _turns(current: Conversation) -> str:
    how = {True: "on the pruned cache", False: "picture read and pruned"}
    rows = [[turn.question, f"{turn.seconds:.3g} s", how[turn.on_cache]] for turn in current.turns]
    return table(("question", "whole answer", ""), rows, texts=True)
