"""Text that is sent while it grows is the text of the whole answer."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from autoprune.serving.text_stream import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes, so that characters come in pieces."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode("utf-8", "replace")


def pieces(text: str, stops: Sequence[str]) -> tuple[list[str], bool]:
    """What is sent for a text, token by token."""
    stream, sent = TextStream(Bytes(), stops), []
    for token in text.encode():
        sent.append(stream.push(token))
        if stream.stopped:
            break
    return [*sent, stream.finish()], stream.stopped


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """By trying every beginning of the text: the first that holds a stop string ends there."""
    for end in range(len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            return text[: min(found)], True
    return text, False


TEXTS = st.text(st.sampled_from("ab cé漢🙂"), max_size=20)
STOPS = st.lists(st.text(st.sampled_from("abcé漢"), min_size=1, max_size=3), max_size=3)


@given(TEXTS, STOPS)
def test_pieces_make_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    sent, stopped = pieces(text, stops)
    assert ("".join(sent), stopped) == cut(text.lstrip(), stops)


def test_characters_are_sent_whole_and_stops_are_held_back():
    assert pieces("é", ())[0] == ["", "é", ""]
    assert pieces("xaby", ("abc",))[0] == ["x", "", "", "aby", ""]
    assert pieces("xabcy", ("abc",)) == (["x", "", "", "", ""], True)


def test_a_character_that_breaks_off_is_told():
    stream = TextStream(Bytes(), ())
    assert [stream.push(token) for token in "aé".encode()[:-1]] == ["a", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
